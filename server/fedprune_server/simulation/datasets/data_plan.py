"""The table [data] of a `fleet.toml`: which data set is read, and how it is dealt out to devices and server."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import path_exists
from fedprune.core.errors import ConfigError, DataError, value_text
from fedprune.core.rng import keyed_generator
from fedprune.core.validation import MAX_INT, check_items, check_whole
from fedprune_device.data.audio_decoding import RATES
from fedprune_device.data.colours import COLOUR_FORM, WHITE, parse_colour
from fedprune_server.config.setting import check_settings, read_table, setting
from fedprune_server.simulation.datasets import partition
from fedprune_server.simulation.datasets.columns import ParquetColumns
from fedprune_server.simulation.datasets.decoding import Decoding
from fedprune_server.simulation.datasets.federation import Federation, default_names, federate
from fedprune_server.simulation.datasets.preparation import Preparation
from fedprune_server.simulation.datasets.samples import Samples
from fedprune_server.simulation.datasets.source import DATA_FOLDER_VARIABLE, read_samples

Rows = npt.NDArray[np.int64]

PartitionKind = Literal["iid", "dirichlet", "pathological", "owners"]

# The setting on which a partition's skew depends.
SKEW_SETTINGS: Mapping[str, str] = {"dirichlet": "alpha", "pathological": "classes"}


@dataclass(frozen=True)
class DataPlan:
    """Settings of a data set's split: the table [data]."""

    source: str = setting("", "A data set, see `read_samples`.")
    x: tuple[str, ...] = setting(
        (), "Columns of inputs in Parquet files, each of numbers if there are several; empty for `image`."
    )
    y: str | None = setting(None, "Their column of labels; None for `label`.")
    owner: str | None = setting(None, "Their column that says whose sample it is; None without owners.")
    devices: int = setting(0, "Number of devices; 0 for one per owner.", within=(0, 10**6))
    partition: PartitionKind = setting(
        "dirichlet", "Who gets what: `pathological` devices have a few classes each, owners are people or domains."
    )
    alpha: float = setting(0.5, "Concentration of the Dirichlet shares.", within=(0, math.inf), above=True)
    least: int = setting(10, "Minimum samples per device (dirichlet).", within=(1, 10**6))
    classes: int = setting(2, "Classes per device (pathological).", within=(1, 10**6))
    most: int = setting(0, "Samples to use, at random; 0 for all.", within=(0, 10**9))
    pooled: bool = setting(
        True, "Whether the data set's own test samples are split with the others; if not, the server gets them."
    )
    test: float = setting(0.25, "Share of a device's samples for tests.", within=(0, 0.99))
    validation: float = setting(0.0, "Share of the remaining samples for validation.", within=(0, 0.99))
    server: float = setting(0.0, "Share of the samples for the server's evaluation.", within=(0, 0.99))
    calibration: float = setting(
        0.0, "Share of the samples for the server's calibration of batch-norm statistics.", within=(0, 0.99)
    )
    pool: int = setting(1, "Factor by which images shrink.", within=(1, 64))
    standardise: bool = setting(False, "Whether channels get mean 0 and deviation 1, measured on the devices' samples.")
    size: tuple[int, ...] = setting((), "Height and width of images of a folder; empty to keep theirs.")
    colour: bool = setting(True, "Whether images of a folder are read in colour.")
    background: str = setting("white", f"What transparent images are drawn on: {COLOUR_FORM}.")
    audio_rate: int = setting(16_000, "Rate to which recordings are resampled, in Hz.", within=RATES)
    seconds: float = setting(
        0.0, "Length to which recordings are cut, or padded with zeros; 0 to keep theirs.", within=(0, 3600)
    )
    ascending: bool = setting(False, "Whether devices are numbered by their samples, fewest first.")
    seed: int | None = setting(None, "The partition's seed; None for the job's.", within=(0, MAX_INT))

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            expected = f"a file or folder, also one under {DATA_FOLDER_VARIABLE}"
            raise ConfigError(("data", "source"), expected=expected, got=value_text(self.source))
        check_settings(self, ("data",))
        input_columns: object = self.x  # one name may be given as a text
        columns = tuple(input_columns) if isinstance(input_columns, (list, tuple)) else (input_columns,)
        if not all(isinstance(name, str) and name.strip() for name in columns):
            expected = "a column's name, or a list of them"
            raise ConfigError(("data", "x"), expected=expected, got=value_text(input_columns))
        object.__setattr__(self, "x", columns)
        size = check_items(("data", "size"), self.size, 2, "numbers: height and width", min_items=2 * bool(self.size))
        object.__setattr__(self, "size", tuple(check_whole(("data", "size"), number, 1, 4096) for number in size))
        if parse_colour(self.background) is None:
            raise ConfigError(("data", "background"), expected=COLOUR_FORM, got=value_text(self.background))
        if self.partition != "owners" and not self.devices:
            raise ConfigError(("data", "devices"), expected="1 or more", got=self.devices)

    @classmethod
    def from_dict(cls, body: object, folder: Path | None = None) -> DataPlan:
        """Read and check the table. Raises `ConfigError` for an unknown key or a wrong value; the message names it."""
        if folder is not None and isinstance(body, Mapping):
            source = body.get("source")
            if isinstance(source, str) and source and path_exists(folder / source):
                body = {**body, "source": str(folder / source)}
        return read_table(cls, body, ("data",))

    def settings(self) -> dict[str, Any]:
        """The table as JSON types, with the source's name instead of its path: a run's folder may move to another
        machine."""
        table = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return table | {"source": Path(self.source).name}

    def read(self, seed: int = 0) -> Federation:
        """Read the data set and split it. Raises `DataError` if it can't be read, or can't be split like this."""
        size = (self.size[0], self.size[1]) if self.size else None
        named_columns: dict[str, Any] = {k: v for k in ("x", "y", "owner") if (v := getattr(self, k))}
        columns = ParquetColumns(**named_columns) if named_columns else None
        decoding = Decoding(size, self.colour, parse_colour(self.background) or WHITE, self.audio_rate, self.seconds)
        return self.deal(read_samples(self.source, columns, decoding), seed)

    def deal(self, samples: Samples, seed: int = 0) -> Federation:
        """Split samples; arguments and errors as `read`."""
        split_seed = seed if self.seed is None else self.seed
        candidates = np.arange(len(samples)) if self.pooled else np.flatnonzero(~samples.is_test)
        if self.partition == "owners" and samples.owners is None:
            raise DataError(
                f"owners of the samples of {self.source}",
                expected="an array owner, subject, writer, domain or user, a column, or a folder per owner",
                hint="Choose another partition.",
            )
        rows = partition.draw_rows(candidates, self.most, seed=split_seed)
        total = len(rows)
        server_rows, rows = _set_aside(rows, self.server, total, split_seed, "server")
        unlabelled, rows = _set_aside(rows, self.calibration, total, split_seed, "calibration")
        if not self.pooled:
            # The data set's own test samples are nobody's training data, so the server evaluates on them.
            server_rows = np.sort(np.concatenate([server_rows, np.flatnonzero(samples.is_test)]))
        preparation = Preparation(self.pool)
        if self.standardise:
            # Not on what the server evaluates: a board's preparation can't know it either.
            preparation = preparation.with_scaling(samples, rows)
        hands = self._hands(samples, rows, split_seed)
        if self.ascending:
            hands.sort(key=len)
        return federate(
            samples,
            hands,
            seed=split_seed,
            names=self._names(samples, rows, len(hands)),
            test=self.test,
            validation=self.validation,
            server=server_rows,
            calibration=unlabelled,
            preparation=preparation,
        )

    def _hands(self, samples: Samples, rows: Rows, seed: int) -> list[Rows]:
        if self.partition == "iid":
            return partition.iid(rows, self.devices, seed=seed)
        if self.partition == "owners" and samples.owners is not None:
            return partition.by_owner(rows, samples.owners, self.devices, seed=seed)
        if self.partition == "pathological":
            return partition.pathological(rows, samples.labels, self.devices, classes=self.classes, seed=seed)
        labels, least = samples.labels, self.least
        return partition.dirichlet(rows, labels, self.devices, alpha=self.alpha, seed=seed, min_samples=least)

    def _names(self, samples: Samples, rows: Rows, devices: int) -> list[str]:
        """The owners' names if each device is one owner and the names are valid for devices."""
        if self.partition == "owners" and samples.owners is not None and not self.ascending:
            owner_names = [samples.owner_names[int(o)] for o in np.unique(samples.owners[rows])]
            # An owner's name that no device may have, such as one with spaces, would be refused later.
            if len(owner_names) == devices and all(n.isascii() and n.isidentifier() for n in owner_names):
                return owner_names
        return default_names(devices)


def _set_aside(rows: Rows, share: float, total: int, seed: int, purpose: str) -> tuple[Rows, Rows]:
    """Set aside a share of all samples for the server; returns the server's rows and the others."""
    if not share:
        return rows[:0], rows
    order = keyed_generator(seed, purpose).permutation(len(rows))
    count = max(1, round(share * total))
    return np.sort(rows[order[:count]]), np.sort(rows[order[count:]])
