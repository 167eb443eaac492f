"""A data set split among devices by the table [data]: the rows that each device trains, validates and tests on.

A thousand devices cost a thousand lists of rows: `load` copies a device's samples each time, from arrays that may be
memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import path_exists
from fedprune.core.errors import ConfigError, DataError, value_text
from fedprune.core.rng import keyed_generator
from fedprune.core.text import quantity
from fedprune.output.chart import share_strip
from fedprune.output.chart_html import heat_scale
from fedprune.output.page import Bar, bars_html, page_html, paragraph_html
from fedprune_device.data.dataset import LocalData
from fedprune_server.config.setting import check_settings, read_table, setting
from fedprune_server.simulation.datasets import partition
from fedprune_server.simulation.datasets.columns import ParquetColumns
from fedprune_server.simulation.datasets.samples import Preparation, Samples
from fedprune_server.simulation.datasets.source import DATA_FOLDER_VARIABLE, read_samples

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Holding:
    """One device's rows of the data set, each in ascending order.

    Attributes:
        train: Training rows.
        validation: Rows for early stopping and choices; may be empty.
        test: Test rows; may be empty.
    """

    train: Rows
    validation: Rows
    test: Rows

    @property
    def rows(self) -> Rows:
        """All rows, in ascending order."""
        return np.sort(np.concatenate([self.train, self.validation, self.test]))


@dataclass(frozen=True, eq=False)
class Federation:
    """A data set and its split.

    Raises `DataError` if there are no devices, two of them hold the same row, or a device has no training rows.

    Attributes:
        holdings: Every device's rows, by its name.
        server: The server's rows, for evaluation; may be empty.
        preparation: Conversion of inputs when they are loaded.
        calibration: The server's rows for batch-norm statistics; may be empty.
    """

    samples: Samples
    holdings: Mapping[str, Holding]
    server: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    preparation: Preparation = field(default_factory=Preparation)
    calibration: Rows = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not self.holdings:
            raise DataError("a federation without devices", expected="one or more")
        uses = np.zeros(len(self.samples), np.int64)
        for name, holding in self.holdings.items():
            if not len(holding.train):
                raise DataError(f"training samples of {name}", expected="at least one", got=0)
            np.add.at(uses, holding.rows, 1)
        np.add.at(uses, self.server, 1)
        np.add.at(uses, self.calibration, 1)
        if uses.max() > 1:
            raise DataError(f"row {int(uses.argmax())} is held {int(uses.max())} times", expected="once at most")

    @property
    def names(self) -> tuple[str, ...]:
        """Devices in the order of the split."""
        return tuple(self.holdings)

    def count(self, name: str) -> int:
        """Training samples of a device, without loading them."""
        return len(self.holdings[name].train)

    def load(self, name: str) -> LocalData:
        """Load a device's data. Raises `DataError` if samples can't be prepared, or are not usable."""
        holding = self.holdings[name]
        validation = self._load_rows(holding.validation) if len(holding.validation) else ()
        return LocalData(*self._load_rows(holding.train), *self._load_rows(holding.test), *validation)

    def evaluation(self) -> tuple[Array, Array] | None:
        """The server's samples and labels, or None."""
        return self._load_rows(self.server) if len(self.server) else None

    def calibration_inputs(self) -> Array | None:
        """The server's samples for batch-norm statistics, or None."""
        return self._load_rows(self.calibration)[0] if len(self.calibration) else None

    def pooled_tests(self) -> tuple[Array, Array]:
        """The test samples and labels of all devices together, for comparisons of global models."""
        return self._load_rows(np.sort(np.concatenate([h.test for h in self.holdings.values()])))

    def fingerprint(self, name: str) -> str:
        """Digest of a device's data: the data set, its rows and the preparation. Cheap after the first call."""
        holding = self.holdings[name]
        digest = hashlib.sha256(json.dumps([self._source, asdict(self.preparation)]).encode())
        for rows in (holding.train, holding.validation, holding.test):
            digest.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self) -> npt.NDArray[np.int64]:
        """Samples per device and class, all splits together, int64 [devices, classes]."""
        rows = [h.rows for h in self.holdings.values()]
        return partition.counts_per_class(rows, self.samples.labels, self.samples.classes)

    @cached_property
    def _source(self) -> str:
        return self.samples.digest

    def _load_rows(self, rows: Rows) -> tuple[Array, Array]:
        return self.preparation(self.samples.take(rows)), self.samples.labels[rows]


def federate(
    samples: Samples,
    hands: Sequence[Rows],
    *,
    seed: int,
    names: Sequence[str] | None = None,
    test: float = 0.25,
    validation: float = 0.0,
    server: Rows | None = None,
    calibration: Rows | None = None,
    preparation: Preparation | None = None,
) -> Federation:
    """Split each device's rows into training, validation and test rows.

    Raises `DataError` if names repeat or are too few, or a device has too few samples to split.

    Args:
        test: Share of a device's rows for tests.
        validation: Share of the remaining rows for validation.
        server: Rows of the server, for evaluation.
        calibration: Rows of the server, for batch-norm statistics.
        preparation: Conversion of inputs when they are loaded.
    """
    device_names = list(names) if names is not None else default_names(len(hands))
    if len(device_names) != len(hands) or len(set(device_names)) != len(device_names):
        raise DataError("names of devices", expected=f"{len(hands)} different ones", got=len(set(device_names)))
    holdings = {}
    for name, hand in zip(device_names, hands, strict=True):
        # Keyed by the device's name, so that its split doesn't depend on the other devices.
        test_rows, validation_rows, train_rows = partition.split_rows(
            hand, (test, (1 - test) * validation), seed=seed, device=name
        )
        holdings[name] = Holding(train_rows, validation_rows, test_rows)
    no_rows = np.zeros(0, np.int64)
    return Federation(
        samples,
        holdings,
        no_rows if server is None else np.asarray(server, np.int64),
        preparation or Preparation(),
        no_rows if calibration is None else np.asarray(calibration, np.int64),
    )


def default_names(devices: int) -> list[str]:
    """`device-000` and so on, with as many digits (three at least) as sorting needs."""
    digits = max(3, len(str(devices - 1)))
    return [f"device-{i:0{digits}}" for i in range(devices)]


MAX_MAP_DEVICES = 300  # devices that a heat map shows; larger fleets are sampled evenly


@dataclass(frozen=True)
class FleetData:
    """The data of a fleet.

    Attributes:
        data: The data set's name; empty if devices have their own samples.
        classes: Names of its classes; empty if they are numbers.
        counts: Samples per class of each device; empty if labels are not classes, or unknown.
        settings: The table [data], as JSON types; empty if devices have their own samples.
    """

    data: str = ""
    classes: tuple[str, ...] = ()
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> str:
        """The data set's name, the partition with its own setting, and further settings that aren't defaults."""
        usual: dict[str, Any] = {f.name: f.default for f in fields(DataPlan)}
        kind = self.settings.get("partition", "")
        always = ("partition", _SETTING_OF.get(kind, ""))
        stated_settings = {
            k: v for k, v in self.settings.items() if k in always or (v and v != usual.get(k) and k != "source")
        }
        return ", ".join(filter(None, [self.data, *(f"{k} {v}" for k, v in stated_settings.items())]))

    @classmethod
    def of_federation(cls, federation: Federation, data: str = "") -> FleetData:
        """The partition of a data set."""
        rows = zip(federation.names, federation.counts(), strict=True)
        return cls(data, federation.samples.class_names, {name: tuple(map(int, row)) for name, row in rows})

    @classmethod
    def of_devices(cls, devices: Mapping[str, LocalData], data: str = "") -> FleetData:
        """The partition of loaded samples; without counts if labels are not classes."""
        labels = {n: np.concatenate([d.y_train, d.y_val, d.y_test]) for n, d in devices.items() if d.y_train.ndim == 1}
        if len(labels) < len(devices) or any(y.dtype.kind != "i" for y in labels.values()):
            return cls(data)
        class_count = max((int(y.max()) + 1 for y in labels.values()), default=0)
        return cls(
            data, (), {name: tuple(map(int, np.bincount(y, minlength=class_count))) for name, y in labels.items()}
        )

    def class_name(self, label: int) -> str:
        return self.classes[label] if label < len(self.classes) else str(label)

    def heat_map(self) -> str:
        """HTML with a row per device and a tile per class; empty without counts."""
        if not self.counts:
            return ""
        largest_count = max(max(counts, default=0) for counts in self.counts.values()) or 1
        names = list(self.counts)
        if len(names) > MAX_MAP_DEVICES:
            names = [names[i * (len(names) - 1) // (MAX_MAP_DEVICES - 1)] for i in range(MAX_MAP_DEVICES)]
        rows = []
        for name in names:
            counts = self.counts[name]
            classes_of = ", ".join(f"{self.class_name(i)}: {n:,}" for i, n in enumerate(counts) if n)
            strip = share_strip(name, [n / largest_count for n in counts])
            rows.append(Bar(name, (strip,), quantity(sum(counts), "sample", form=","), f"{name}: {classes_of}"))
        classes = ", ".join(self.class_name(i) for i in range(max(map(len, self.counts.values()))))
        return (
            paragraph_html(
                f"A row per device, a tile per class, all splits together. Classes, from left to right: {classes}."
            )
            + heat_scale("0", quantity(largest_count, "sample", form=","))
            + bars_html(rows, "Samples per device and class")
        )


def draw_partition(federation: Federation, path: Path, title: str = "Data of the devices") -> Path:
    """Write the heat map of a partition as a self-contained page."""
    data_partition = FleetData.of_federation(federation)
    total = sum(map(sum, data_partition.counts.values()))
    facts = {"Devices": f"{len(data_partition.counts):,}", "Samples": f"{total:,}"}
    path.write_text(page_html(title, [data_partition.heat_map()], facts), encoding="utf-8")
    return path


PartitionKind = Literal["iid", "dirichlet", "pathological", "owners"]

# The setting on which a partition's skew depends.
_SETTING_OF: Mapping[str, str] = {"dirichlet": "alpha", "pathological": "classes"}


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
    ascending: bool = setting(False, "Whether devices are numbered by their samples, fewest first.")
    seed: int | None = setting(None, "The partition's seed; None for the job's.")

    def __post_init__(self) -> None:
        if not isinstance(self.source, str) or not self.source.strip():
            expected = f"a file or folder, also one under {DATA_FOLDER_VARIABLE}"
            raise ConfigError(("data", "source"), expected=expected, got=value_text(self.source))
        check_settings(self, ("data",))
        input_columns: object = self.x  # one name may be given as a text
        columns = (
            (input_columns,)
            if isinstance(input_columns, str)
            else tuple(input_columns)
            if isinstance(input_columns, (list, tuple))
            else (input_columns,)
        )
        if not all(isinstance(name, str) and name.strip() for name in columns):
            expected = "a column's name, or a list of them"
            raise ConfigError(("data", "x"), expected=expected, got=value_text(input_columns))
        object.__setattr__(self, "x", columns)
        object.__setattr__(self, "size", tuple(self.size) if isinstance(self.size, (list, tuple)) else self.size)
        if not isinstance(self.size, tuple) or (
            self.size and (len(self.size) != 2 or any(type(n) is not int or not 1 <= n <= 4096 for n in self.size))
        ):
            expected = "height and width, such as [64, 64]"
            raise ConfigError(("data", "size"), expected=expected, got=value_text(self.size))
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
        columns = None
        if self.x or self.y is not None or self.owner is not None:
            usual = ParquetColumns()
            columns = ParquetColumns(self.x or usual.x, self.y or usual.y, self.owner or usual.owner)
        return self.deal(read_samples(self.source, columns, size=size, colour=self.colour), seed)

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
