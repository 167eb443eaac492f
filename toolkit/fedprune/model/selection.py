"""Submodels as selections of channels: which channels of every group a device holds, in which order.

A `Selection` ranks each group's channels and keeps the first `width` of them. Tensors of a submodel are laid out in
rank order, so a narrower submodel of the same ranks is a prefix of a wider one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture, Axis

# Named tensors of a model or submodel.
Tensors = dict[str, npt.NDArray[np.float32]]

Indices = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

# The active elements of tensors, as arrays of their shapes; tensors without an entry are active as a whole.
ElementMask = Mapping[str, BoolArray]

# Every element of every tensor.
ALL_ACTIVE: ElementMask = {}


def check_mask(mask: ElementMask, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `BundleError` if a mask names a tensor that isn't among these, or has another shape."""
    for name, bits in mask.items():
        if shapes.get(name) != bits.shape:
            raise BundleError(f"mask of {name}", expected=shapes.get(name, "no such tensor"), got=bits.shape)


class _GatherPlan(NamedTuple):
    """The plan for gathering a tensor: slices for axes that hold a run of indices, index arrays for the others."""

    name: str
    full_shape: tuple[int, ...]
    shape: tuple[int, ...]
    slices: tuple[Any, ...]
    taken_indices: tuple[tuple[int, Indices], ...]


@dataclass(frozen=True, eq=False)
class Selection:
    """A rank of each group's channels, best first, and how many of them are kept."""

    architecture: Architecture
    ranks: tuple[Indices, ...]
    widths: tuple[int, ...]

    @classmethod
    def of(
        cls, architecture: Architecture, widths: Sequence[int], ranks: Sequence[npt.ArrayLike] | None = None
    ) -> Selection:
        """A checked selection; without ranks, channels keep the model's order. Raises `BundleError` if widths or ranks
        don't fit the architecture."""
        checked = architecture.check_widths(widths)
        if ranks is None:
            ranks = [np.arange(n) for n in architecture.sizes]
        if len(ranks) != len(architecture.groups):
            raise BundleError("ranks don't fit the architecture", expected=len(architecture.groups), got=len(ranks))
        orders = []
        for group, rank in zip(architecture.groups, ranks, strict=True):
            order = np.array(rank, dtype=np.int64)
            if order.shape != (group.size,) or not np.array_equal(np.sort(order), np.arange(group.size)):
                raise BundleError(f"rank of group {group.name}", expected=f"a permutation of {group.size} channels")
            order.setflags(write=False)  # digest and maps are computed once and must stay true
            orders.append(order)
        return cls(architecture, tuple(orders), checked)

    @classmethod
    def full(cls, architecture: Architecture) -> Selection:
        """The whole model in its own order."""
        return cls.of(architecture, architecture.sizes)

    def with_widths(self, widths: Sequence[int]) -> Selection:
        """The same ranks at other widths."""
        return Selection(self.architecture, self.ranks, self.architecture.check_widths(widths))

    @property
    def is_full(self) -> bool:
        """Whether every channel is kept (in whatever order)."""
        return self.widths == self.architecture.sizes

    def indices(self, axis: Axis) -> Indices:
        """The full-width indices of an axis that the submodel holds, in its order."""
        offset, runs = 0, []
        for segment in axis.segments:
            if segment.group == FIXED:
                runs.append(np.arange(offset, offset + segment.length, dtype=np.int64))
            else:
                channels = self.ranks[segment.group][: self.widths[segment.group]]
                channels = (
                    channels[(channels >= segment.start) & (channels < segment.start + segment.count)] - segment.start
                )
                inner = np.arange(segment.inner, dtype=np.int64)
                runs.append((offset + channels[:, None] * segment.inner + inner[None, :]).reshape(-1))
            offset += segment.length
        return np.concatenate(runs) if runs else np.zeros(0, np.int64)

    @cached_property
    def _maps(self) -> dict[str, tuple[Indices, ...]]:
        return {t.name: tuple(self.indices(a) for a in t.axes) for t in self.architecture.tensors}

    def maps(self, name: str) -> tuple[Indices, ...]:
        """The `indices` of each axis of tensor `name`."""
        return self._maps[name]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.architecture.shapes(self.widths)

    def gather(self, tensors: Mapping[str, npt.NDArray[np.float32]]) -> Tensors:
        """Extract the submodel's tensors from the full model's. Raises `BundleError` if a tensor is missing or has
        another shape than the architecture says."""
        plans = self._gather_plans
        full_tensors = [_checked_tensor(tensors, plan.name, plan.full_shape) for plan in plans]
        submodel: Tensors = {}
        for full, plan in zip(full_tensors, plans, strict=True):
            submodel_tensor = submodel[plan.name] = np.empty(plan.shape, np.float32)
            _take(full[plan.slices], plan.taken_indices, submodel_tensor)
        return submodel

    @cached_property
    def _gather_plans(self) -> tuple[_GatherPlan, ...]:
        """The plans for gathering every tensor, in the architecture's order."""
        plans, shapes = [], self.shapes()
        for spec in self.architecture.tensors:
            maps = self.maps(spec.name)
            runs = [_as_slice(m) for m in maps]
            slices = (*(slice(None) if r is None else r for r in runs), ...)
            taken_indices = tuple((axis, maps[axis]) for axis, r in enumerate(runs) if r is None)
            plans.append(_GatherPlan(spec.name, spec.shape, shapes[spec.name], slices, taken_indices))
        return tuple(plans)

    def scatter(
        self, submodel: Mapping[str, npt.NDArray[np.float32]], onto: Mapping[str, npt.NDArray[np.float32]]
    ) -> Tensors:
        """Write the submodel's tensors to their positions in a copy of `onto`. Raises `BundleError` if a tensor
        is missing or has another shape than this selection says."""
        shapes = self.shapes()
        tensors: Tensors = {}
        for spec in self.architecture.tensors:
            submodel_tensor = _checked_tensor(submodel, spec.name, shapes[spec.name])
            full_tensor = _checked_tensor(onto, spec.name, spec.shape).copy()
            full_tensor[mesh(self.maps(spec.name))] = submodel_tensor
            tensors[spec.name] = full_tensor
        return tensors

    def coverage_mask(self, name: str) -> npt.NDArray[np.bool_]:
        """A mask of the full tensor's elements that the submodel holds."""
        mask = np.zeros(self.architecture.by_name[name].shape, np.bool_)
        mask[mesh(self.maps(name))] = True
        return mask

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON, with the architecture's digest instead of the architecture."""
        body = {
            "format": "fedprune.selection/1",
            "architecture": self.architecture.digest,
            "widths": list(self.widths),
            "ranks": [r.tolist() for r in self.ranks],
        }
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str | bytes, architecture: Architecture) -> Selection:
        """Read and check a selection of `architecture`. Raises `BundleError` if it is not what `to_json` writes, or
        belongs to another architecture."""
        try:
            body = json.loads(text)
            if body["format"] != "fedprune.selection/1":
                raise BundleError("selection format", expected="fedprune.selection/1", got=repr(body["format"]))
            if body["architecture"] != architecture.digest:
                raise BundleError(
                    "selection belongs to another architecture",
                    expected=architecture.digest[:12],
                    got=str(body["architecture"])[:12],
                )
            widths, orders = list(body["widths"]), [list(r) for r in body["ranks"]]
            if any(type(n) is not int for row in (widths, *orders) for n in row):
                raise BundleError("selection: widths and ranks", expected="whole numbers")
            return cls.of(architecture, widths, orders)
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            raise BundleError(f"this is not a selection ({type(error).__name__}: {error})") from error


def mesh(axis_indices: Sequence[Indices]) -> tuple[Any, ...]:
    """An index for the outer product of index rows, one per axis. Trailing axes whose rows are runs become slices,
    which are copied as blocks: with index arrays every kernel position would be gathered by itself, in twenty times the
    time."""
    runs = [_as_slice(m) for m in axis_indices]
    last_irregular = max((i for i, r in enumerate(runs) if r is None), default=-1)
    arrays = np.ix_(*axis_indices[: last_irregular + 1]) if last_irregular >= 0 else ()
    return (*arrays, *(r for r in runs[last_irregular + 1 :] if r is not None), ...)


def _as_slice(row: Indices) -> slice | None:
    """The slice that a row of indices is, if it is one."""
    if not row.size:
        return slice(0, 0)
    start, stop = int(row[0]), int(row[-1]) + 1
    return slice(start, stop) if stop - start == row.size and bool((np.diff(row) == 1).all()) else None


def _take(source: npt.NDArray[np.float32], rows: Sequence[tuple[int, Indices]], out: npt.NDArray[np.float32]) -> None:
    """Write the outer product of index rows into `out`, taking one axis after the other."""
    if not rows:
        np.copyto(out, source)
        return
    for axis, row in rows[:-1]:
        source = source.take(row, axis=axis)
    axis, row = rows[-1]
    # No index is out of range; the default mode would write through a buffer.
    np.take(source, row, axis=axis, out=out, mode="clip")


def _checked_tensor(
    tensors: Mapping[str, npt.NDArray[np.float32]], name: str, shape: tuple[int, ...]
) -> npt.NDArray[np.float32]:
    value = tensors.get(name)
    if value is None:
        raise BundleError(f"tensor {name} is missing")
    if value.shape != shape:
        raise BundleError(f"shape of {name}", expected=shape, got=value.shape)
    return value
