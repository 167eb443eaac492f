"""Cuts the rows of a CSV or Parquet file into windows: samples of time series."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.errors import DataError, shape_text
from fedprune.core.text import first_few, quantity
from fedprune.model.input_type import FLOATS, InputType
from fedprune.model.lengths import Shape, upper_shape
from fedprune_device.data.column_statistics import ColumnStatistics
from fedprune_device.data.dataset import SPLITS, Channels, LocalData, ReadSource
from fedprune_device.data.labels import Targets
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_array import Array, Inputs, Rows, StoredArray
from fedprune_device.data.stored_table import CSV, NO_CLASS, NO_NUMBER, PARQUET, StoredTable, read_table
from fedprune_device.data.table_columns import CLASS, TARGET, ColumnsError, TableColumns
from fedprune_device.data.table_options import TableOptions

TABLE_BYTES = 2**30  # most bytes of a table's numbers on the disk

_COUNTER_WARNING = (
    "column {} counts the rows, which is no measurement: leave it out (--columns), or call it time if it is the time"
)
_STATISTICS_ROWS = 2**13  # rows that are read at once for their mean


# Windows, end to end, in a block. A block's last rows are lost to windows that would reach into the next one, so that
# longer blocks lose less, and shorter ones spread the parts more evenly. A short table needs short blocks to have
# several, and rows that are appended must not change the blocks before them: blocks grow along the file.
_MIN_BLOCK_WINDOWS, MAX_BLOCK_WINDOWS = 2, 8
_BLOCK_GROWTH = 5  # a block has this share of the windows before it: of 1 to 5, the one that keeps --test-share best
# (√5 − 1) / 2: its multiples modulo 1 fill the range from 0 to 1 evenly, however many there are.
_GOLDEN_RATIO = 0.6180339887498949


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.suffix.lower() in (*CSV, PARQUET)


@dataclass(frozen=True)
class _WindowPlan:
    """The conversion of windows to a model's samples: `steps` rows of inputs, then `horizon` rows to predict (0 for
    none), and the layouts of both."""

    steps: int
    horizon: int
    inputs: Callable[[Array], Array]
    targets: Callable[[Array], Array] | None
    channels: Channels

    @property
    def span(self) -> int:
        return self.steps + self.horizon


class TableFile(ReadSource):
    """A board's samples as windows of a table's rows; rows that are added are noticed at the next round.

    A round takes at most `max_windows` windows, evenly over the file. None spans a gap between the times of two rows.
    Windows are for training, validation or testing by the block of rows that they are in and never reach into another,
    so that no row that is tested on is trained on. The numbers are kept in a file without a name in `spool`, of at most
    `max_bytes`. Raises `DataError` if the file is damaged, `MissingExtraError` for Parquet without pyarrow.
    """

    def __init__(
        self,
        path: Path,
        shares: SplitShares,
        max_windows: int,
        class_names: tuple[str, ...] = (),
        spool: Path | None = None,
        max_bytes: int = TABLE_BYTES,
        options: TableOptions | None = None,
    ) -> None:
        super().__init__(path)
        self._path, self._shares, self._max_windows = path, shares, max_windows
        self._names, self._spool, self._max_bytes = class_names, spool, max_bytes
        self._options = options or TableOptions()
        self._stamp, self._numbers = self._read()
        self._training_count = min(max_windows, self._numbers.count)

    def snapshot(
        self, shape: Shape | None = None, targets: Targets | None = None, input_type: InputType = FLOATS
    ) -> LocalData:
        """The windows that exist now; raises `DataError` if the model takes others."""
        if shape is None:
            raise DataError("the shape of samples", expected="a model's input")
        if self._stamp != self._file_stamp():
            self._stamp, self._numbers = self._read()
        numbers = self._numbers
        try:
            plan = _plan_windows(numbers.columns, shape, targets)
            needs_class = targets is not None and targets.takes_whole_numbers
            first = self._first_rows(plan, needs_class=needs_class)
            if not len(first):
                raise self._no_windows_error(plan.span)
            first = first[:: -(-len(first) // self._max_windows)]
            starts = block_starts(numbers.count, plan.span, self._shares)
            splits = splits_of_blocks(np.searchsorted(starts, first, side="right") - 1, self._shares)
            plan = self._plan_with_means(plan)
            arrays: list[Inputs] = []
            for split in SPLITS:
                rows = first[splits == split]
                x = numbers.windows(rows, plan.steps, plan.inputs)
                arrays += [x, self._labels(x, rows, plan, targets)]
            data = LocalData(*arrays, channels=plan.channels)
        except DataError as error:
            raise DataError(f"{self._path}: {error}") from error
        self._training_count = data.samples
        return data

    def _plan_with_means(self, plan: _WindowPlan) -> _WindowPlan:
        """The plan with missing numbers replaced by the means of the training rows, if the options say so."""
        if self._numbers.marks is None or self._options.missing != "mean":
            return plan
        statistics, columns = self._training_statistics(plan.span), self._numbers.columns
        numbers = len(columns.inputs) + len(columns.targets)
        if not statistics.counts[:numbers].all():
            empty = columns.all[int(np.argmin(statistics.counts[:numbers] > 0))] + 1
            raise DataError(
                f"column {empty}", expected="a number in the training rows", got="none, so that it has no mean"
            )
        means = statistics.mean.astype(np.float32)

        def after_filling(select: Callable[[Array], Array]) -> Callable[[Array], Array]:
            return lambda rows: select(np.where(np.isnan(rows), means, rows))

        targets = None if plan.targets is None else after_filling(plan.targets)
        return replace(plan, inputs=after_filling(plan.inputs), targets=targets)

    def _training_statistics(self, span: int) -> ColumnStatistics:
        """Of the numbers in the blocks that are for training, with windows of `span` rows."""
        statistics = ColumnStatistics(len(self._numbers.columns.all))
        starts = block_starts(self._numbers.count, span, self._shares)
        is_training = splits_of_blocks(np.arange(len(starts)), self._shares) == "train"
        ends = np.append(starts[1:], self._numbers.count)
        for begin, end in zip(starts[is_training].tolist(), ends[is_training].tolist(), strict=True):
            for first in range(begin, end, _STATISTICS_ROWS):
                statistics.add(self._numbers.rows(first, min(_STATISTICS_ROWS, end - first)))
        return statistics

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

    def _first_rows(self, plan: _WindowPlan, *, needs_class: bool) -> Rows:
        """The first rows of all windows: within a block, and without a jump in time or a number that is missing."""
        numbers, span, marks = self._numbers, plan.span, self._numbers.marks
        starts = block_starts(numbers.count, span, self._shares)
        is_bad = marks is not None and self._options.missing != "mean"
        bad_rows = np.flatnonzero(marks & NO_NUMBER) if marks is not None and is_bad else np.zeros(0, np.int64)
        edges = np.unique(np.concatenate([starts, numbers.starts, bad_rows, bad_rows + 1, [numbers.count]]))
        begins, lengths = edges[:-1], np.diff(edges)
        counts = np.maximum(0, np.where(np.isin(begins, bad_rows), 0, lengths - span + 1))
        ends = np.cumsum(counts)
        total = int(ends[-1]) if len(ends) else 0
        # Of many windows only those that may be chosen are listed.
        has_class = marks is not None and needs_class
        stride = 1 if has_class else max(1, -(-total // self._max_windows))
        chosen = np.arange(0, total, stride, dtype=np.int64)
        runs = np.searchsorted(ends, chosen, side="right")
        first: Rows = begins[runs] + chosen - (ends - counts)[runs]
        if marks is not None and needs_class:
            first = first[marks[first + plan.steps - 1] & NO_CLASS == 0]
        return first

    def _no_windows_error(self, span: int) -> DataError:
        count, jumps = self._numbers.count, len(self._numbers.starts)
        if count < span or not (jumps or self._numbers.marks is not None):
            return DataError("rows", expected=f"at least {span}, a window's", got=count)
        hint = "The board's log says where time jumps: sort the rows by time, or give the seconds between two (--step)."
        hint = hint if jumps else "Choose what is done about missing numbers: --missing hold or mean."
        return DataError(
            "rows in sequence", expected=f"at least {span}, a window's, without a gap", got="fewer", hint=hint,
        )  # fmt: skip

    def _file_stamp(self) -> tuple[int, int, int]:
        with storage_errors(f"can't read {self._path}"):
            status = self._path.stat()
        return status.st_ino, status.st_size, status.st_mtime_ns

    def _read(self) -> tuple[tuple[int, int, int], StoredTable]:
        stamp = self._file_stamp()
        table, notes = read_table(self._path, self._names, self._options, self._spool, self._max_bytes)
        self._notes.replace(notes, [_COUNTER_WARNING.format(index + 1) for index in table.counters])
        return stamp, table


def _plan_windows(columns: TableColumns, shape: Shape, targets: Targets | None) -> _WindowPlan:
    """Labels are none, the class of a window's last row, the inputs themselves, or the rows after the inputs."""
    channels = len(columns.inputs)
    steps, channels_first = steps_and_order(shape, channels, True)
    if not steps:
        expected = "a model of [channels, steps] or [steps, channels]"
        raise ColumnsError(
            f"windows of {quantity(channels, 'column')} (number {first_few([str(i + 1) for i in columns.inputs])})",
            columns.names[:channels], expected=expected, got=shape_text(*shape),
            hint="Choose the columns that the model takes: --columns A,B.",
        )  # fmt: skip
    inputs = column_layout(0, channels, channels_first, len(shape))
    names = columns.names[:channels]
    without_outputs = _WindowPlan(steps, 0, inputs, None, Channels(names, _axis(channels_first, len(shape))))
    if targets is None:
        return without_outputs
    if targets.takes_whole_numbers:
        if columns.classes and targets.shape:
            labels = shape_text("n", *targets.shape)
            raise DataError(f"labels for loss {targets.loss}", expected=labels, got=f"a column {CLASS!r}: [n]")
        return without_outputs
    if not columns.targets and tuple(targets.shape) == tuple(shape):
        return without_outputs
    begin, count = (channels, len(columns.targets)) if columns.targets else (0, channels)
    horizon, channels_first = steps_and_order(targets.shape, count, channels_first)
    if not horizon:
        raise DataError(
            f"labels for loss {targets.loss}", expected=shape_text(*targets.shape), got=f"{count} columns to predict",
            hint=f"Let the names of columns to predict begin with {TARGET!r}; without any, all inputs are predicted.",
        )  # fmt: skip
    outputs = columns.names[begin : begin + count], _axis(channels_first, len(targets.shape))
    described_channels = Channels(names, without_outputs.channels.input_axis, *outputs)
    predicted = column_layout(begin, count, channels_first, len(targets.shape))
    return _WindowPlan(steps, horizon, inputs, predicted, described_channels)


def _axis(channels_first: bool, rank: int) -> int:
    """The axis of columns in a sample of this many dimensions (`column_layout`)."""
    return 0 if channels_first or rank == 1 else 1


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


def block_starts(rows: int, span: int, shares: SplitShares) -> Rows:
    """The first rows [n], ascending, of the blocks of a table of so many rows, with windows of `span` rows.

    If all is for training, the table is one block.
    """
    if not shares.test and not shares.validation:
        return np.zeros(1, np.int64)
    starts, size = [0], _MIN_BLOCK_WINDOWS
    while size < MAX_BLOCK_WINDOWS:
        starts.append(starts[-1] + size)
        size = max(_MIN_BLOCK_WINDOWS, min(MAX_BLOCK_WINDOWS, starts[-1] // _BLOCK_GROWTH))
    short_blocks = np.array(starts[:-1], np.int64) * span
    long_blocks = np.arange(starts[-1] * span, max(rows, 1), MAX_BLOCK_WINDOWS * span, dtype=np.int64)
    return np.concatenate([short_blocks[short_blocks < max(rows, 1)], long_blocks])


def splits_of_blocks(blocks: Rows, shares: SplitShares) -> npt.NDArray[np.str_]:
    """The split of each of these blocks [n], by their numbers from 0."""
    # 1 minus the sequence: the first block then is for training, whatever the shares are.
    positions = 1 - (blocks * _GOLDEN_RATIO) % 1
    return np.array([shares.split_at(n) for n in positions], "U5")
