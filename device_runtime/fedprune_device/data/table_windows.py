"""Cuts the rows of a CSV or Parquet file into windows: samples of time series."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import DataError, shape_text
from fedprune.model.lengths import Shape, upper_shape
from fedprune_device.data.dataset import SPLITS, LocalData
from fedprune_device.data.labels import Targets, effective_classes
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_array import Array, Inputs, OpenFiles, Rows, StoredArray
from fedprune_device.data.table_columns import CLASS, TARGET, TableColumns
from fedprune_device.data.tables import CSV, PARQUET, open_table

TABLE_BYTES = 2**30  # most bytes of a table's numbers on the disk

# Windows, end to end, that are for training, validation or testing together. A block's last rows are lost to windows
# that would reach into the next one, so that longer blocks lose less, and shorter ones spread the parts more evenly.
_BLOCK_WINDOWS = 8
# (√5 − 1) / 2: its multiples modulo 1 fill the range from 0 to 1 evenly, however many there are.
_GOLDEN_RATIO = 0.6180339887498949


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.suffix.lower() in (CSV, PARQUET)


@dataclass(frozen=True)
class _StoredTable:
    """A table's rows in a file without a name, as float32 [count, columns]."""

    file: OpenFiles
    columns: TableColumns
    count: int
    effective_classes: int | None

    def windows(self, first: npt.NDArray[np.int64], rows: int, convert: Callable[[Array], Array]) -> StoredArray:
        """Windows of `rows` rows [n, rows, columns], converted."""
        width = len(self.columns.all)
        return StoredArray.at_positions(self.file, first * (4 * width), np.dtype(np.float32), (rows, width), convert)


@dataclass(frozen=True)
class _WindowPlan:
    """The conversion of windows to a model's samples: `steps` rows of inputs, then `horizon` rows to predict (0 for
    none), and the layouts of both."""

    steps: int
    horizon: int
    inputs: Callable[[Array], Array]
    targets: Callable[[Array], Array] | None

    @property
    def span(self) -> int:
        return self.steps + self.horizon


class TableFile:
    """A board's samples as windows of a table's rows; rows that are added are noticed at the next round.

    A round takes at most `max_windows` windows, evenly over the file. Windows are for training, validation or testing
    by the block of rows that they are in and never reach into another, so that no row that is tested on is trained on.
    The numbers are kept in a file without a name in `spool`, of at most `max_bytes`. Raises `DataError` if the file is
    damaged, `MissingExtraError` for Parquet without pyarrow.
    """

    def __init__(
        self,
        path: Path,
        shares: SplitShares,
        max_windows: int,
        class_names: tuple[str, ...] = (),
        spool: Path | None = None,
        max_bytes: int = TABLE_BYTES,
    ) -> None:
        self._path, self._shares, self._max_windows = path, shares, max_windows
        self._names, self._spool, self._max_bytes = class_names, spool, max_bytes
        self._stamp, self._numbers = self._read()
        self._training_count = min(max_windows, self._numbers.count)

    @property
    def samples(self) -> int:
        """Training samples of the last round; before the first one, rows."""
        return self._training_count

    @property
    def effective_classes(self) -> int | None:
        """See `SampleSource`; of all rows, None unless a column has their class."""
        return self._numbers.effective_classes

    @property
    def notes(self) -> tuple[str, ...]:
        """See `SampleSource`."""
        return ()

    def snapshot(self, shape: Shape | None = None, targets: Targets | None = None) -> LocalData:
        """The windows that exist now; raises `DataError` if the model takes others."""
        if shape is None:
            raise DataError("the shape of samples", expected="a model's input")
        if self._stamp != self._file_stamp():
            self._stamp, self._numbers = self._read()
        numbers = self._numbers
        try:
            plan = _plan_windows(numbers.columns, shape, targets)
            first, splits = self._windows(plan.span)
            arrays: list[Inputs] = []
            for split in SPLITS:
                rows = first[splits == split]
                x = numbers.windows(rows, plan.steps, plan.inputs)
                arrays += [x, self._labels(x, rows, plan, targets)]
            data = LocalData(*arrays)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error
        self._training_count = data.samples
        return data

    def _labels(self, x: StoredArray, first: Rows, plan: _WindowPlan, targets: Targets | None) -> Inputs:
        """Labels of the windows that begin at these rows. Without labels the inputs stand in for them (`LocalData`)."""
        if targets is None or (targets.takes_whole_numbers and not self._numbers.columns.classes):
            return x
        if targets.takes_whole_numbers:  # of a window's last row
            last = self._numbers.windows(first + plan.steps - 1, 1, lambda rows: rows[:, 0, -1:])
            return np.concatenate([np.zeros(0), *(some[:, 0] for some in last.chunks())]).astype(np.int64)
        if plan.targets is None:
            return x
        y = self._numbers.windows(first + plan.steps, plan.horizon, plan.targets)
        targets(y)
        return replace(y, in_range=True)

    def _windows(self, span: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.str_]]:
        """First rows of the chosen windows of `span` rows, and which of `SPLITS` each is for."""
        block = _BLOCK_WINDOWS * span
        windows_per_block, (blocks, rest_rows) = block - span + 1, divmod(self._numbers.count, block)
        total = blocks * windows_per_block + max(0, rest_rows - span + 1)
        if not total:
            raise DataError("rows", expected=f"at least {span}, a window's", got=self._numbers.count)
        chosen = np.arange(0, total, -(-total // self._max_windows), dtype=np.int64)
        blocks_of, offsets = np.divmod(chosen, windows_per_block)
        # 1 minus the sequence: the first block then is for training, whatever the shares are.
        positions = 1 - (blocks_of * _GOLDEN_RATIO) % 1
        return blocks_of * block + offsets, np.array([self._shares.split_at(n) for n in positions])

    def _file_stamp(self) -> tuple[int, int, int]:
        with storage_errors(f"can't read {self._path}"):
            status = self._path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> tuple[tuple[int, int, int], _StoredTable]:
        stamp, count, labels = self._file_stamp(), 0, Counter[float]()
        with (
            open_table(self._path, self._names) as (columns, blocks),
            storage_errors("can't write the numbers of a table"),
        ):
            file = OpenFiles.in_folder(self._spool)
            for rows in blocks:
                width = rows.shape[1] * 4
                if (count + len(rows)) * width > self._max_bytes:
                    raise DataError("numbers", expected=f"at most {self._max_bytes // 4}", got="more")
                write_all(file.fileno(), rows.tobytes(), count * width)
                count += len(rows)
                if columns.classes:  # `TableColumns.all` puts the class last
                    labels.update(rows[:, -1].tolist())
            return stamp, _StoredTable(file, columns, count, effective_classes(labels.values()))


def _plan_windows(columns: TableColumns, shape: Shape, targets: Targets | None) -> _WindowPlan:
    """Labels are none, the class of a window's last row, the inputs themselves, or the rows after the inputs."""
    channels = len(columns.inputs)
    steps, channels_first = steps_and_order(shape, channels, True)
    if not steps:
        expected = "a model of [channels, steps] or [steps, channels]"
        raise DataError(f"windows of {channels} columns", expected=expected, got=shape_text(*shape))
    inputs = column_layout(0, channels, channels_first, len(shape))
    if targets is None:
        return _WindowPlan(steps, 0, inputs, None)
    if targets.takes_whole_numbers:
        if columns.classes and targets.shape:
            labels = shape_text("n", *targets.shape)
            raise DataError(f"labels for loss {targets.loss}", expected=labels, got=f"a column {CLASS!r}: [n]")
        return _WindowPlan(steps, 0, inputs, None)
    if not columns.targets and tuple(targets.shape) == tuple(shape):
        return _WindowPlan(steps, 0, inputs, None)
    begin, count = (channels, len(columns.targets)) if columns.targets else (0, channels)
    horizon, channels_first = steps_and_order(targets.shape, count, channels_first)
    if not horizon:
        raise DataError(
            f"labels for loss {targets.loss}", expected=shape_text(*targets.shape), got=f"{count} columns to predict",
            hint=f"Let the names of columns to predict begin with {TARGET!r}; without any, all inputs are predicted.",
        )  # fmt: skip
    return _WindowPlan(steps, horizon, inputs, column_layout(begin, count, channels_first, len(targets.shape)))


def steps_and_order(shape: Shape, channels: int, channels_first: bool) -> tuple[int, bool]:
    """Steps in a shape with this many channels, 0 if it has none, and whether channels are before steps.

    `channels_first` decides if both are possible.
    """
    sizes = [size if isinstance(size, int) else 0 for size in upper_shape(shape)]
    if len(sizes) == 1:
        return (sizes[0], channels_first) if channels == 1 else (int(sizes[0] == channels), channels_first)
    if len(sizes) != 2 or channels not in sizes:
        return 0, channels_first
    channels_first = sizes[0] == channels if sizes[0] != sizes[1] else channels_first
    return sizes[1] if channels_first else sizes[0], channels_first


def column_layout(begin: int, count: int, channels_first: bool, rank: int) -> Callable[[Array], Array]:
    """A function from rows [n, rows, columns] to some columns: [n, columns, rows], [n, rows, columns] or [n, all]."""

    def select_columns(rows: Array) -> Array:
        chosen = rows[:, :, begin : begin + count]
        chosen = chosen.transpose(0, 2, 1) if channels_first else chosen
        return np.ascontiguousarray(chosen.reshape(len(chosen), count * rows.shape[1]) if rank == 1 else chosen)

    return select_columns
