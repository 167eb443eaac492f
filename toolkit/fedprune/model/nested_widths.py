"""Narrower training steps within one device's model: ordered dropout (FjORD, arXiv:2102.13451).

Tensors of a submodel have the most important channels first, so that a narrower submodel is a prefix of every run of
channels (channels that lie one after the other on an axis). If each of 6 channels has 9 numbers on an axis of 54, four
channels are its indices 0 to 35. A step at narrower widths trains these prefixes, and changes nothing else of weights
and optimiser state. `TensorAxes` says which part of each tensor the prefix is. It travels as text in the training
graph's metadata, because a board has no `Architecture`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture, Axis
from fedprune.model.axis import json_int
from fedprune.model.selection import Indices, mesh

Array = npt.NDArray[Any]

_FORMAT = "fedprune.axes/1"


@dataclass(frozen=True)
class TensorAxes:
    """The full size of every channel group of a model, and the axes of its tensors, which are lists of runs (segments).
    A segment of group `FIXED` belongs to no channel group, and is never cut."""

    sizes: tuple[int, ...]
    axes: Mapping[str, tuple[Axis, ...]]

    @classmethod
    def from_json(cls, text: str) -> TensorAxes:
        """Read what `axes_json` wrote. Raises `BundleError` if it is something else."""
        try:
            body = json.loads(text)
            if body["format"] != _FORMAT:
                raise BundleError("axes of a training graph", expected=_FORMAT, got=repr(body["format"])[:80])
            sizes = tuple(json_int(n) for n in body["sizes"])
            axes = {str(name): tuple(map(Axis.from_rows, rows)) for name, rows in body["axes"].items()}
            segments = [s for tensor_axes in axes.values() for a in tensor_axes for s in a.segments]
            if any(n < 1 for n in sizes) or any(
                not FIXED <= s.group < len(sizes) or min(s.start, s.count) < 0 or s.inner < 1 for s in segments
            ):
                raise BundleError("axes of a training graph name a group or channels that aren't there")
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"axes of a training graph can't be read ({type(error).__name__}: {error})") from error
        return cls(sizes, axes)

    @cached_property
    def narrowable_groups(self) -> frozenset[int]:
        """The groups that can be narrowed, because their first channels are a prefix of each of their runs. If a group
        is split over several runs (as shuffled channels are), only ranks would tell how many of each run are left."""
        groups = set(range(len(self.sizes)))
        for axis in (a for of_tensor in self.axes.values() for a in of_tensor):
            if any(s.group != FIXED and (s.start, s.count) != (0, self.sizes[s.group]) for s in axis.segments):
                groups -= set(axis.groups)
        return frozenset(groups)

    def step_widths(self, widths: Sequence[int], densities: Sequence[float]) -> list[tuple[int, ...]]:
        """The widths at which a device's steps train: its own first, then those of the densities, none wider. A density
        is a share of the whole model; groups that can't be narrowed stay at the device's width. Raises `BundleError` if
        the widths don't fit."""
        self._check_widths(widths)
        plans = [tuple(widths)]
        for density in densities:
            # As in `widths_at`: rounding to just above a whole number must not add a channel.
            density_widths = [max(1, math.ceil(density * n - 1e-9)) for n in self.sizes]
            plan = tuple(
                min(density_width, own_width) if group in self.narrowable_groups else own_width
                for group, (density_width, own_width) in enumerate(zip(density_widths, widths, strict=True))
            )
            if plan not in plans:  # equal widths would be trained twice as often as others
                plans.append(plan)
        return plans

    def shapes(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors at some widths. Raises `BundleError` if the widths don't fit."""
        self._check_widths(widths)
        return {n: tuple(a.size(widths, self.sizes) for a in axes) for n, axes in self.axes.items()}

    def _check_widths(self, widths: Sequence[int]) -> None:
        if len(widths) != len(self.sizes) or any(not 1 <= w <= n for w, n in zip(widths, self.sizes, strict=True)):
            raise BundleError("widths don't fit the training graph", expected=f"up to {self.sizes}", got=tuple(widths))

    def check(self, tensors: Mapping[str, Array], widths: Sequence[int]) -> None:
        """Make sure that tensors have these widths. Raises `BundleError` if one is unknown or has another shape."""
        for name, value in tensors.items():
            shape = tuple(a.size(widths, self.sizes) for a in self.axes[name]) if name in self.axes else None
            if shape != value.shape:
                raise BundleError(
                    f"shape of {name} at these widths", expected=shape or "no such tensor", got=value.shape
                )

    def narrow(self, arrays: Mapping[str, Array], widths: Sequence[int], narrower: Sequence[int]) -> dict[str, Array]:
        """The arrays of a submodel, which are prefixes and may be views. Arrays of a tensor's shape that belong to it
        (`name::momentum`) are cut as it is. Numbers, and arrays that belong to no tensor, are returned unchanged."""
        narrow_arrays = dict(arrays)
        for name, value in arrays.items():
            axes = self.axes.get(name.partition("::")[0])
            if axes is not None and len(axes) == value.ndim:
                narrow_arrays[name] = np.asarray(value[self._prefix(axes, widths, narrower)], order="C")
        return narrow_arrays

    def write_back(
        self,
        onto: Mapping[str, Array],
        narrow_arrays: Mapping[str, Array],
        widths: Sequence[int],
        narrower: Sequence[int],
    ) -> None:
        """Write a submodel's arrays to their positions in `onto`; the rest of it stays as it is."""
        for name, value in narrow_arrays.items():
            onto[name][self._prefix(self.axes[name.partition("::")[0]], widths, narrower)] = value

    def _prefix(self, axes: Sequence[Axis], widths: Sequence[int], narrower: Sequence[int]) -> tuple[Any, ...]:
        return mesh([self._prefix_indices(axis, widths, narrower) for axis in axes])

    def _prefix_indices(self, axis: Axis, widths: Sequence[int], narrower: Sequence[int]) -> Indices:
        """The indices of an axis at `widths` that remain at narrower widths: a prefix of each run."""
        if all(widths[g] == narrower[g] for g in axis.groups):
            return np.arange(axis.size(widths, self.sizes), dtype=np.int64)
        runs, start = [], 0
        for s in axis.segments:
            kept_length = s.length if s.group == FIXED else s.inner * narrower[s.group]
            runs.append(np.arange(start, start + kept_length, dtype=np.int64))
            start += s.length if s.group == FIXED else s.inner * widths[s.group]
        return np.concatenate(runs)


def axes_json(architecture: Architecture) -> str:
    """The channels on the axes of an architecture's tensors, as text for a training graph's metadata."""
    axes = {t.name: [a.to_rows() for a in t.axes] for t in architecture.tensors}
    return json.dumps({"format": _FORMAT, "sizes": architecture.sizes, "axes": axes}, separators=(",", ":"))
