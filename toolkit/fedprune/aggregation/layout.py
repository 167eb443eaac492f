"""The memory layout of a fold (the sums of a round's updates), and where the numbers of a submodel belong in it.

Sums are laid out by the ranks of the first update: along every axis, segment by segment, the most important channel
first. A submodel of the same ranks is a prefix of each segment, so that slices suffice; others need index arrays.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import Index
from fedprune.model.architecture import FIXED, Axis, TensorSpec
from fedprune.model.selection import Indices, Selection, mesh

# Numbers of a run of rows: 512 KiB of int64 sums stay in a core's cache while they are worked on.
_MAX_BLOCK_NUMBERS = 65_536


def index_pairs(layout: Selection, spec: TensorSpec, selection: Selection) -> Iterator[tuple[Index, Index]]:
    """Pairs of an index into the sums of a tensor and an index into a submodel's tensor.

    A submodel of the layout's ranks is a prefix of each segment, so that its pairs are slices, and views of the sums.
    Others get one open mesh of index arrays, which copies.
    """
    groups = {g for axis in spec.axes for g in axis.groups}
    ranks = ((layout.ranks[g], selection.ranks[g]) for g in groups)
    if all(a is b or np.array_equal(a, b) for a, b in ranks):
        if all(selection.widths[g] == layout.widths[g] for g in groups):
            yield (...,), (...,)
            return
        for pairs in itertools.product(*(_axis_runs(axis, selection) for axis in spec.axes)):
            yield tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        return
    sum_indices = [
        np.argsort(order)[own_order]
        for order, own_order in zip(layout.maps(spec.name), selection.maps(spec.name), strict=True)
    ]
    yield mesh(sum_indices), (...,)


class RowColumnMap(NamedTuple):
    """Coordinates of one tensor's numbers in another, if only the first two axes are permuted.

    Compiled kernels take these alone: in convolutions and dense layers channels are on the first two axes.

    `rows` and `columns` give, by index of the first and second axis, the other's; `inner` is the product of all further
    axes, whose numbers are contiguous in both.
    """

    rows: Indices
    columns: Indices
    inner: int


def map_into_sums(layout: Selection, spec: TensorSpec, selection: Selection) -> RowColumnMap | None:
    """Coordinates of a submodel's tensor in the sums; None where further axes are permuted or cut."""
    orders, selected = layout.maps(spec.name), selection.maps(spec.name)
    if not _are_identities(orders[2:]) or not _are_identities(selected[2:]) or not orders:
        return None
    if any(a.size != b.size for a, b in zip(orders[2:], selected[2:], strict=True)):
        return None
    return _row_column_map(
        spec, [np.argsort(order)[own_order] for order, own_order in zip(orders[:2], selected[:2], strict=True)]
    )


def map_into_model(layout: Selection, spec: TensorSpec) -> RowColumnMap | None:
    """Coordinates of a tensor of the sums in the global model's; None where further axes are permuted."""
    orders = layout.maps(spec.name)
    return _row_column_map(spec, orders) if orders and _are_identities(orders[2:]) else None


def _are_identities(orders: Sequence[Indices]) -> bool:
    return all(_is_identity(order) for order in orders)


def _row_column_map(spec: TensorSpec, orders: Sequence[Indices]) -> RowColumnMap:
    columns = orders[1] if len(orders) > 1 else np.zeros(1, np.int64)
    return RowColumnMap(orders[0], columns, math.prod(spec.shape[2:]))


def has_layout_ranks(layout: Selection, selection: Selection) -> bool:
    """Whether a submodel's channels are the first ones of the layout, so that slices are enough."""
    return layout.ranks is selection.ranks or all(
        a is b or np.array_equal(a, b) for a, b in zip(layout.ranks, selection.ranks, strict=True)
    )


class Expansion:
    """A submodel's tensor as a whole one, in a layout.

    Rows are made when they are asked for: whole tensors of all updates that are added together would not fit a cache,
    and those of a large round no memory.
    """

    def __init__(
        self,
        layout: Selection,
        spec: TensorSpec,
        selection: Selection,
        value: npt.NDArray[Any],
        absent_value: float = 0.0,
    ) -> None:
        source_indices = []
        last_permuted = 0  # after the last permuted axis, numbers are contiguous and copied together
        for i, (axis, order) in enumerate(zip(spec.axes, layout.maps(spec.name), strict=True)):
            positions = np.arange(order.size)
            if not axis.groups:
                source_indices.append(positions)
                continue
            indices, selected = np.full(order.size, -1), selection.maps(spec.name)[i]
            # -1 marks channels that the submodel doesn't hold.
            indices[selected] = positions[: selected.size]
            indices = indices[order]
            source_indices.append(indices)
            last_permuted = last_permuted if np.array_equal(indices, positions) else i
        self._source_rows = source_indices[0]
        self._offsets_in_row: npt.NDArray[np.int64] | None = None
        if last_permuted:
            flat, missing = np.zeros((), np.int64), np.zeros((), np.bool_)
            for i, indices in enumerate(source_indices[1 : last_permuted + 1], start=1):
                flat = flat[..., None] + indices * math.prod(value.shape[i + 1 : last_permuted + 1])
                missing = missing[..., None] | (indices < 0)
            self._offsets_in_row = np.where(missing, -1, flat).reshape(-1)
        self._value = np.ascontiguousarray(value)
        self._shape = spec.shape
        self._absent = absent_value
        self._run_length = math.prod(value.shape[last_permuted + 1 :])
        self._row_buffer: npt.NDArray[Any] = np.empty(0, value.dtype)
        self._sources: npt.NDArray[np.int64] = np.empty((0, 0), np.int64)

    def rows(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Rows from `start` to before `stop` of the whole tensor; `out` is where they may be put, C-contiguous [stop −
        start, ...]."""
        source_rows, shape = self._source_rows[start:stop], (stop - start, *self._shape[1:])
        if (
            self._offsets_in_row is None
            and source_rows.size
            and _is_identity(source_rows - source_rows[0])
            and source_rows[0] >= 0
        ):
            return self._value[source_rows[0] : source_rows[0] + source_rows.size].reshape(shape)
        out = np.empty(shape, self._value.dtype) if out is None else out
        if not self._value.size:
            out[...] = self._absent
            return out
        flat = self._value.reshape(len(self._value), -1)
        if self._offsets_in_row is None:
            flat.take(source_rows, axis=0, mode="clip", out=out.reshape(len(source_rows), -1))
        else:
            self._take_runs(flat, source_rows, out)
        missing = np.flatnonzero(source_rows < 0)
        if missing.size:
            out[missing] = self._absent
        return out

    def _take_runs(self, flat: npt.NDArray[Any], source_rows: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Take whole rows first, then the numbers within them, whole runs of neighbours at a time.

        Absent numbers are taken from a run of the absent value that lies before the rows.
        """
        offsets, run = self._offsets_in_row, self._run_length
        if offsets is None:
            return
        if len(source_rows) > len(self._sources):
            self._row_buffer = np.full(run + len(source_rows) * flat.shape[1], self._absent, flat.dtype)
            row_starts = 1 + np.arange(len(source_rows)) * (flat.shape[1] // run)
            self._sources = np.where(offsets < 0, 0, row_starts[:, None] + offsets)
        rows = self._row_buffer[run : run + len(source_rows) * flat.shape[1]].reshape(len(source_rows), -1)
        flat.take(source_rows, axis=0, mode="clip", out=rows)
        sources = self._sources[: len(source_rows)].reshape(-1)
        self._row_buffer.reshape(-1, run).take(sources, axis=0, mode="clip", out=out.reshape(-1, run))


def to_layout(value: npt.NDArray[Any], spec: TensorSpec, layout: Selection) -> npt.NDArray[Any]:
    """A tensor of the global model, in the layout."""
    for axis, order in enumerate(layout.maps(spec.name)):
        if not _is_identity(order):
            value = value.take(order, axis=axis)
    return value


def to_global(value: npt.NDArray[Any], spec: TensorSpec, layout: Selection) -> npt.NDArray[Any]:
    """The result of `to_layout`, back in the model's order."""
    for axis, order in enumerate(layout.maps(spec.name)):
        if not _is_identity(order):
            value = value.take(np.argsort(order), axis=axis)
    return value


def row_blocks(shape: tuple[int, ...]) -> Iterator[Index]:
    """Runs of rows small enough to work on in the cache."""
    if not shape:
        yield (...,)
        return
    rows = max(1, _MAX_BLOCK_NUMBERS // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(shape[0], start + rows)),)


def _axis_runs(axis: Axis, selection: Selection) -> list[tuple[slice, slice]]:
    """Runs of a submodel's axis: slices of the whole axis in rank order and of its own.

    Neighbouring runs are joined: the fewer slices, the larger the blocks that are added at once.
    """
    runs: list[tuple[int, int, int]] = []
    whole_start = submodel_start = 0
    for s in axis.segments:
        length = s.length
        if s.group != FIXED:
            kept_channels = selection.ranks[s.group][: selection.widths[s.group]]
            covers_group = s.count == selection.ranks[s.group].size
            length = (
                kept_channels.size * s.inner
                if covers_group
                else int(((kept_channels >= s.start) & (kept_channels < s.start + s.count)).sum()) * s.inner
            )
        if runs and runs[-1][0] + runs[-1][2] == whole_start and runs[-1][1] + runs[-1][2] == submodel_start:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + length)
        elif length:
            runs.append((whole_start, submodel_start, length))
        whole_start += s.length
        submodel_start += length
    return [(slice(a, a + n), slice(b, b + n)) for a, b, n in runs]


def _is_identity(order: npt.NDArray[np.int64]) -> bool:
    return bool(np.array_equal(order, np.arange(order.size)))
