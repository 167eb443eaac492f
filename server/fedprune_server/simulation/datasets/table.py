"""The table [data] of a `fleet.toml`: the data set of a simulated fleet, and its split."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np

from fedprune.core import validation as setting_checks
from fedprune.core.disk import is_there
from fedprune.core.errors import ConfigError, DataError, shown
from fedprune.core.rng import keyed
from fedprune_server.simulation.datasets import partition
from fedprune_server.simulation.datasets.federation import Federation, Rows, default_names, federate
from fedprune_server.simulation.datasets.samples import Preparation, Samples
from fedprune_server.simulation.datasets.source import VARIABLE, read_samples

Kind = Literal["iid", "dirichlet", "pathological", "owners"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class DataPlan:
    """Settings of a data set's split.

    Attributes:
        source: A data set, see `read_samples`.
        devices: Number of devices; 0 for one per owner.
        partition: `iid`, `dirichlet`, `pathological` (a few classes each) or `owners` (people, writers, domains).
        alpha: Concentration of the Dirichlet shares.
        least: Minimum samples per device (dirichlet).
        balance: Whether a device with a fair share gets no further classes (dirichlet).
        classes: Classes per device (pathological).
        spread: Parts are proportional to exp(spread · normal) (iid, pathological).
        most: Samples to use, at random; 0 for all.
        pooled: Whether the data set's own test samples are split with the others; if not, the server gets them.
        test: Share of a device's samples for tests.
        validation: Share of the remaining samples for validation.
        server: Share of the samples for the server's evaluation.
        pool: Factor by which images shrink.
        standardise: Whether channels get mean 0 and deviation 1, measured on the devices' samples.
        size: Height and width of images of a folder; empty to keep theirs.
        colour: Whether images of a folder are read in colour.
        ascending: Whether devices are numbered by their samples, fewest first.
        seed: The partition's seed; None for the job's.
    """

    source: str
    devices: int = 0
    partition: Kind = "dirichlet"
    alpha: float = 0.5
    least: int = 10
    balance: bool = False
    classes: int = 2
    spread: float = 0.0
    most: int = 0
    pooled: bool = True
    test: float = 0.25
    validation: float = 0.0
    server: float = 0.0
    pool: int = 1
    standardise: bool = False
    size: tuple[int, ...] = ()
    colour: bool = True
    ascending: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            raise ConfigError("data: source", expected=f"a file or folder, also one under {VARIABLE}", got=self.source)
        setting_checks.word("data: partition", self.partition, KINDS)
        counts = {
            "devices": (0, 10**6),
            "least": (1, 10**6),
            "classes": (1, 10**6),
            "most": (0, 10**9),
            "pool": (1, 64),
        }
        for name, (low, high) in counts.items():
            setting_checks.whole(f"data: {name}", getattr(self, name), low, high)
        for name, most in (("spread", 10), ("test", 0.99), ("validation", 0.99), ("server", 0.99)):
            setting_checks.number(f"data: {name}", getattr(self, name), 0, most)
        setting_checks.number("data: alpha", self.alpha, 0, math.inf, above=True)
        for name in ("balance", "pooled", "standardise", "colour", "ascending"):
            setting_checks.truth(f"data: {name}", getattr(self, name))
        object.__setattr__(self, "size", tuple(self.size) if isinstance(self.size, (list, tuple)) else self.size)
        if not isinstance(self.size, tuple) or (
            self.size and (len(self.size) != 2 or any(type(n) is not int or not 1 <= n <= 4096 for n in self.size))
        ):
            raise ConfigError("data: size", expected="height and width, such as [64, 64]", got=shown(self.size))
        if self.partition != "owners" and not self.devices:
            raise ConfigError("data: devices", expected="1 or more", got=self.devices)

    @classmethod
    def from_dict(cls, body: object, where: str = "[data]", folder: Path | None = None) -> DataPlan:
        """Read and check the table.

        Raises:
            ConfigError: An unknown key or a wrong value; the message names it.
        """
        if not isinstance(body, Mapping):
            raise ConfigError(where, expected="a table [data]", got=shown(body))
        values = setting_checks.known(cls, body, where)
        if "source" not in body:
            raise ConfigError(f"{where}: source is missing", expected=f"a file or folder, also one under {VARIABLE}")
        source = values["source"]
        if folder is not None and isinstance(source, str) and source and is_there(folder / source):
            values["source"] = str(folder / source)
        try:
            return cls(**values)
        except ConfigError as error:
            what = error.what.removeprefix("data: ")
            raise ConfigError(f"{where} {what}", expected=error.expected, got=error.got, hint=error.hint) from error

    def read(self, seed: int = 0) -> Federation:
        """Read the data set and split it.

        Args:
            seed: The job's seed, used if the table has none.

        Raises:
            DataError: The source can't be read, or can't be split like this.
        """
        size = (self.size[0], self.size[1]) if self.size else None
        return self.deal(read_samples(self.source, size=size, colour=self.colour), seed)

    def deal(self, samples: Samples, seed: int = 0) -> Federation:
        """Split samples; arguments and errors as `read`."""
        own = seed if self.seed is None else self.seed
        everything = np.arange(len(samples)) if self.pooled else np.flatnonzero(~samples.testing)
        if self.partition == "owners" and samples.owners is None:
            raise DataError(
                f"owners of the samples of {self.source}",
                expected="an array owner, subject, writer, domain or user, or a folder per owner",
                hint="Choose another partition.",
            )
        rows = partition.chosen(everything, self.most, seed=own)
        kept = rows[:0]
        if self.server:
            order = keyed(own, "server").permutation(len(rows))
            aside = max(1, round(self.server * len(rows)))
            kept, rows = np.sort(rows[order[:aside]]), np.sort(rows[order[aside:]])
        if not self.pooled:
            kept = np.sort(np.concatenate([kept, np.flatnonzero(samples.testing)]))
        preparation = Preparation(self.pool)
        if self.standardise:
            preparation = preparation.standardised(samples, rows)
        hands = self._hands(samples, rows, own)
        if self.ascending:
            hands.sort(key=len)
        return federate(
            samples,
            hands,
            seed=own,
            names=self._names(samples, rows, len(hands)),
            test=self.test,
            validation=self.validation,
            server=kept,
            preparation=preparation,
        )

    def _hands(self, samples: Samples, rows: Rows, seed: int) -> list[Rows]:
        if self.partition == "iid":
            return partition.iid(rows, self.devices, seed=seed, spread=self.spread)
        if self.partition == "owners" and samples.owners is not None:
            return partition.by_owner(rows, samples.owners, self.devices, seed=seed)
        if self.partition == "pathological":
            return partition.pathological(
                rows, samples.labels, self.devices, classes=self.classes, seed=seed, spread=self.spread
            )
        return partition.dirichlet(
            rows, samples.labels, self.devices, alpha=self.alpha, seed=seed, least=self.least, balance=self.balance
        )

    def _names(self, samples: Samples, rows: Rows, devices: int) -> list[str]:
        """The owners' names if each device is one owner and the names are valid for devices."""
        if self.partition == "owners" and samples.owners is not None and not self.ascending:
            present = [samples.owner_names[int(o)] for o in np.unique(samples.owners[rows])]
            if len(present) == devices and all(n.isascii() and n.isidentifier() for n in present):
                return present
        return default_names(devices)
