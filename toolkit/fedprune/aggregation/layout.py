"""The memory layout of a fold's sums, and the coordinates of submodels in them.

Sums are laid out by the ranks of the first update: along every axis, segment by segment, the most important channel
first. A submodel of the same ranks is a prefix of each segment, so that slices do; others need index arrays.

`Coverage` is the weight behind every coordinate. Where updates hold whole channels, their selections suffice, and
nothing is counted per coordinate until a round closes. Where an update's mask is made of single elements, its tensor
gets an array of counts of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fixed_point import Index
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.model.architecture import FIXED, Architecture, Axis, TensorSpec
from fedprune.model.selection import Active, Indices, Selection, mesh

_CHUNK = 65_536


def places(layout: Selection, spec: TensorSpec, selection: Selection) -> Iterator[tuple[Index, Index]]:
    """Pairs of an index into the sums of a tensor and an index into a submodel's tensor."""
    if all(_same_ranks(layout, selection, axis) for axis in spec.axes):
        if all(selection.widths[g] == layout.widths[g] for axis in spec.axes for g in axis.groups):
            yield (...,), (...,)
            return
        for pairs in itertools.product(*(_pieces(axis, selection) for axis in spec.axes)):
            yield tuple(p[0] for p in pairs), tuple(p[1] for p in pairs)
        return
    into = [
        np.argsort(order)[own] for order, own in zip(layout.maps(spec.name), selection.maps(spec.name), strict=True)
    ]
    yield mesh(into), (...,)


class Grid(NamedTuple):
    """Coordinates of one tensor's numbers in another, if only the first two axes are permuted.

    `rows` and `columns` give, by index of the first and second axis, the other's; `inner` is the product of all further
    axes, whose numbers are contiguous in both.
    """

    rows: Indices
    columns: Indices
    inner: int


def into_sums(layout: Selection, spec: TensorSpec, selection: Selection) -> Grid | None:
    """Coordinates of a submodel's tensor in the sums."""
    orders, held = layout.maps(spec.name), selection.maps(spec.name)
    if not _as_they_are(orders[2:]) or not _as_they_are(held[2:]) or not orders:
        return None
    if any(a.size != b.size for a, b in zip(orders[2:], held[2:], strict=True)):
        return None
    return _grid(spec, [np.argsort(order)[own] for order, own in zip(orders[:2], held[:2], strict=True)])


def into_model(layout: Selection, spec: TensorSpec) -> Grid | None:
    """Coordinates of a tensor of the sums in the global model's."""
    orders = layout.maps(spec.name)
    return _grid(spec, orders) if orders and _as_they_are(orders[2:]) else None


def _as_they_are(orders: Sequence[Indices]) -> bool:
    return all(_identity(order) for order in orders)


def _grid(spec: TensorSpec, places: Sequence[Indices]) -> Grid:
    columns = places[1] if len(places) > 1 else np.zeros(1, np.int64)
    return Grid(places[0], columns, math.prod(spec.shape[2:]))


def in_order(layout: Selection, selection: Selection) -> bool:
    """Whether a submodel's channels are the first ones of the layout, so that slices are enough."""
    return layout.ranks is selection.ranks or all(
        a is b or np.array_equal(a, b) for a, b in zip(layout.ranks, selection.ranks, strict=True)
    )


class Expansion:
    """A submodel's tensor as a whole one, in a layout; `absent` is the value of coordinates that it doesn't hold."""

    def __init__(
        self,
        layout: Selection,
        spec: TensorSpec,
        selection: Selection,
        value: npt.NDArray[Any],
        absent: float = 0.0,
    ) -> None:
        own = []
        last = 0  # after the last permuted axis, numbers are contiguous and copied together
        for i, (axis, order) in enumerate(zip(spec.axes, layout.maps(spec.name), strict=True)):
            numbers = np.arange(order.size)
            if not axis.groups:
                own.append(numbers)
                continue
            where, held = np.full(order.size, -1), selection.maps(spec.name)[i]
            where[held] = numbers[: held.size]
            where = where[order]
            own.append(where)
            last = last if np.array_equal(where, numbers) else i
        self._first = own[0]
        self._rest: npt.NDArray[np.int64] | None = None
        if last:
            flat, missing = np.zeros((), np.int64), np.zeros((), np.bool_)
            for i, where in enumerate(own[1 : last + 1], start=1):
                flat = flat[..., None] + where * math.prod(value.shape[i + 1 : last + 1])
                missing = missing[..., None] | (where < 0)
            self._rest = np.where(missing, -1, flat).reshape(-1)
        self._value = np.ascontiguousarray(value)
        self._shape = spec.shape
        self._absent = absent
        self._side_by_side = math.prod(value.shape[last + 1 :])
        self._row: npt.NDArray[Any] = np.empty(0, value.dtype)
        self._places: npt.NDArray[np.int64] = np.empty((0, 0), np.int64)

    def rows(self, start: int, stop: int, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Rows from `start` to before `stop` of the whole tensor; `out` is where they may be put, C-contiguous [stop −
        start, ...]."""
        first, shape = self._first[start:stop], (stop - start, *self._shape[1:])
        if self._rest is None and first.size and _identity(first - first[0]) and first[0] >= 0:
            return self._value[first[0] : first[0] + first.size].reshape(shape)
        out = np.empty(shape, self._value.dtype) if out is None else out
        if not self._value.size:
            out[...] = self._absent
            return out
        flat = self._value.reshape(len(self._value), -1)
        if self._rest is None:
            flat.take(first, axis=0, mode="clip", out=out.reshape(len(first), -1))
        else:
            self._spread(flat, first, out)
        missing = np.flatnonzero(first < 0)
        if missing.size:
            out[missing] = self._absent
        return out

    def _spread(self, flat: npt.NDArray[Any], first: npt.NDArray[np.int64], out: npt.NDArray[Any]) -> None:
        """Whole rows first, then what belongs together within them: what is absent comes from one place before them."""
        rest, beside = self._rest, self._side_by_side
        if rest is None:
            return
        if len(first) > len(self._places):
            self._row = np.full(beside + len(first) * flat.shape[1], self._absent, flat.dtype)
            begin = 1 + np.arange(len(first)) * (flat.shape[1] // beside)
            self._places = np.where(rest < 0, 0, begin[:, None] + rest)
        taken = self._row[beside : beside + len(first) * flat.shape[1]].reshape(len(first), -1)
        flat.take(first, axis=0, mode="clip", out=taken)
        places = self._places[: len(first)].reshape(-1)
        self._row.reshape(-1, beside).take(places, axis=0, mode="clip", out=out.reshape(-1, beside))


def mass_in(
    layout: Selection, spec: TensorSpec, shares: Collection[tuple[Selection, int]]
) -> npt.NDArray[np.int64] | None:
    """Per coordinate of a tensor, in the layout, the weight of the updates (`shares`: by selection) that hold it.

    Axes that every update holds as a whole have length 1; None where every update holds the whole tensor.
    """
    if all(selection.whole for selection, _ in shares):
        return None
    weights = np.array([n for _, n in shares], np.float64)  # sums of at most 2^24 are exact
    shape, letters, memberships = [1] * len(spec.axes), "", []
    for axis, order in enumerate(layout.maps(spec.name)):
        held = np.zeros((len(shares), order.size))
        for row, (selection, _) in zip(held, shares, strict=True):
            row[selection.maps(spec.name)[axis]] = 1.0
        if not held.all():
            memberships.append(held[:, order])
            letters += "abcdefgh"[axis]
            shape[axis] = order.size
    if not memberships:
        return None
    first, *rest = memberships
    heavy = first.T * weights
    if not rest:
        mass = heavy.sum(axis=1)
    elif len(rest) == 1:
        mass = heavy @ rest[0]
    else:
        others = ",".join(f"k{letter}" for letter in letters[1:])
        mass = np.einsum(f"{letters[0]}k,{others}->{letters}", heavy, *rest, optimize=True)
    return np.asarray(mass, np.int64).reshape(shape)


def to_layout(value: npt.NDArray[Any], spec: TensorSpec, layout: Selection) -> npt.NDArray[Any]:
    """A tensor of the global model, in the layout."""
    for axis, order in enumerate(layout.maps(spec.name)):
        if not _identity(order):
            value = value.take(order, axis=axis)
    return value


def to_global(value: npt.NDArray[Any], spec: TensorSpec, layout: Selection) -> npt.NDArray[Any]:
    """The result of `to_layout`, back in the model's order."""
    for axis, order in enumerate(layout.maps(spec.name)):
        if not _identity(order):
            value = value.take(np.argsort(order), axis=axis)
    return value


def row_blocks(shape: tuple[int, ...]) -> Iterator[Index]:
    """Runs of rows small enough to work on in the cache."""
    if not shape:
        yield (...,)
        return
    rows = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, shape[0], rows):
        yield (slice(start, min(shape[0], start + rows)),)


def _same_ranks(one: Selection, other: Selection, axis: Axis) -> bool:
    return one.ranks is other.ranks or all(
        one.ranks[g] is other.ranks[g] or np.array_equal(one.ranks[g], other.ranks[g]) for g in axis.groups
    )


def _pieces(axis: Axis, selection: Selection) -> list[tuple[slice, slice]]:
    """Runs of a submodel's axis: slices of the whole axis in rank order and of its own, neighbours joined."""
    runs: list[tuple[int, int, int]] = []
    full = own = 0
    for s in axis.segments:
        length = s.length
        if s.group != FIXED:
            kept = selection.ranks[s.group][: selection.widths[s.group]]
            whole = s.count == selection.ranks[s.group].size
            length = (
                kept.size * s.inner if whole else int(((kept >= s.start) & (kept < s.start + s.count)).sum()) * s.inner
            )
        if runs and runs[-1][0] + runs[-1][2] == full and runs[-1][1] + runs[-1][2] == own:
            runs[-1] = (runs[-1][0], runs[-1][1], runs[-1][2] + length)
        elif length:
            runs.append((full, own, length))
        full += s.length
        own += length
    return [(slice(a, a + n), slice(b, b + n)) for a, b, n in runs]


def _identity(order: npt.NDArray[np.int64]) -> bool:
    return bool(np.array_equal(order, np.arange(order.size)))


Mass = npt.NDArray[np.int64]


class Coverage:
    """Which updates hold what, in the layout of the first one's ranks."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.layout: Selection | None = None
        self.weight = 0
        self._known: dict[str, Selection] = {}
        self._shares: dict[tuple[str, frozenset[str]], tuple[Selection, int]] = {}
        self._single: dict[str, Mass] = {}

    @property
    def expect_layout(self) -> Selection:
        """The layout. Raises `BundleError` if nothing was added yet."""
        if self.layout is None:
            raise BundleError("the fold is empty")
        return self.layout

    def settle(self, selection: Selection) -> Selection:
        """The layout; the first selection decides it."""
        if self.layout is None:
            self.layout = selection.narrowed(self.architecture.sizes)
        return self.layout

    def known(self, selection: Selection) -> Selection:
        """The selection, or an equal one that was here before: of its ranks it is known that they are the layout's."""
        layout, found = self.settle(selection), self._known.get(selection.digest)
        if found is None:
            found = selection
            if in_order(layout, selection):
                found = layout if selection.widths == layout.widths else layout.narrowed(selection.widths)
            self._known[selection.digest] = found
        return found

    def add(self, selection: Selection, weight: int, active: Active) -> None:
        """Count an update of this weight; `active` is, per tensor that it holds only in part, which elements."""
        layout = self.settle(selection)
        for name, mask in active.items():
            spec = self.architecture.by_name[name]
            if name not in self._single:
                self._single[name] = np.zeros(spec.shape, np.int64)
            for at, part in places(layout, spec, selection):
                self._single[name][at] += weight * mask[part]
        key = (selection.digest, frozenset(active))
        _, before = self._shares.get(key, (selection, 0))
        self._shares[key] = (selection, before + weight)
        self.weight += weight

    def mass(self, spec: TensorSpec) -> Mass | None:
        """Weight per coordinate of a tensor, in the layout; None where every update holds the whole tensor. Axes that
        every update holds as a whole may be 1 long."""
        layout = self.expect_layout
        shares = [share for (_, single), share in self._shares.items() if spec.name not in single]
        whole = mass_in(layout, spec, shares) if shares else np.zeros(spec.shape, np.int64)
        if spec.name not in self._single:
            return whole
        return self._single[spec.name] + (sum(w for _, w in shares) if whole is None else whole)

    def shares(self) -> tuple[tuple[Selection, int], ...] | None:
        """Selections and the weight of all updates of each; None where masks of single elements were counted."""
        if self._single:
            return None
        return tuple((selection.narrowed(selection.widths), weight) for selection, weight in self._shares.values())


def partly_active(
    architecture: Architecture, selection: Selection, mask: Active, left_out: Collection[str] = ()
) -> Active:
    """The tensors of which a mask, in the submodel's coordinates, leaves something out; what it leaves whole goes the
    cheap way.

    Raises `ProtocolError` if a mask is of an unknown tensor, of batch-norm statistics, or of another shape or type.
    """
    out = {}
    for name, active in mask.items():
        spec = architecture.by_name.get(name)
        if spec is None or not spec.kind.trainable:
            raise ProtocolError(f"mask of {name}", expected="masks of tensors that are trained")
        shape = architecture.shape(name, selection.widths)
        if active.shape != shape or active.dtype != np.bool_:
            raise ProtocolError(f"mask of {name}", expected=f"bool {shape}", got=f"{active.dtype} {active.shape}")
        if name not in left_out and not active.all():
            out[name] = active
    return out
