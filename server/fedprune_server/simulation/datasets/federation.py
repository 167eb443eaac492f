"""A data set split among devices: the rows that each device trains, validates and tests on.

A thousand devices cost a thousand lists of rows: `load` copies a device's samples each time, from arrays that may be
memory-mapped files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune_device.data.dataset import LocalData
from fedprune_server.simulation.datasets import partition
from fedprune_server.simulation.datasets.preparation import Preparation
from fedprune_server.simulation.datasets.samples import Samples

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
        digest = hashlib.sha256(json.dumps([self.samples.digest, asdict(self.preparation)]).encode())
        for rows in (holding.train, holding.validation, holding.test):
            digest.update(len(rows).to_bytes(8, "little") + rows.astype("<i8").tobytes())
        return digest.hexdigest()

    def counts(self) -> npt.NDArray[np.int64]:
        """Samples per device and class, all splits together, int64 [devices, classes]."""
        rows = [h.rows for h in self.holdings.values()]
        return partition.counts_per_class(rows, self.samples.labels, self.samples.classes)

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
    server: Sequence[int] | Rows = (),
    calibration: Sequence[int] | Rows = (),
    preparation: Preparation | None = None,
) -> Federation:
    """Split each device's rows into training, validation and test rows.

    Raises `DataError` if names repeat or are too few, or a device has too few samples to split.

    `test`: share of a device's rows for tests; `validation`: share of the remaining rows for validation; `server`: rows
    of the server, for evaluation; `calibration`: rows of the server, for batch-norm statistics; `preparation`:
    conversion of inputs when they are loaded.
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
    server, calibration = np.asarray(server, np.int64), np.asarray(calibration, np.int64)
    return Federation(samples, holdings, server, preparation or Preparation(), calibration)


def default_names(devices: int) -> list[str]:
    """`device-000` and so on, with as many digits (three at least) as sorting needs."""
    digits = max(3, len(str(devices - 1)))
    return [f"device-{i:0{digits}}" for i in range(devices)]
