"""Ordered dropout inside a device (FjORD, Horvath et al., arXiv:2102.13451): narrower steps of the same model.

Tensors of a submodel are in rank order, so that a narrower submodel is a prefix of every run of channels. A step at
narrower widths trains that prefix; the rest of weights and optimiser state stays as it is for that step.

`nested` makes a wide model that answers as the narrow ones within it. The channels of a model that was just made
answer by chance, those that no device has trained yet among them. Where trained channels listen to these, the wide
model is the narrow one with noise on top.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture, Axis, Segment, TensorKind, TensorSpec
from fedprune.model.selection import Indices, Selection, mesh

Array = npt.NDArray[Any]

_FORMAT = "fedprune.axes/1"
_MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class TensorAxes:
    """How channels are on the axes of a model's tensors: sizes of every group in the whole model, and per tensor its
    axes."""

    sizes: tuple[int, ...]
    axes: Mapping[str, tuple[Axis, ...]]

    @classmethod
    def from_json(cls, text: str) -> TensorAxes:
        """Read what `axes_json` wrote. Raises `BundleError` if it is something else."""
        try:
            body = json.loads(text)
            if body["format"] != _FORMAT:
                raise BundleError("axes of a training graph", expected=_FORMAT, got=repr(body["format"])[:80])
            sizes = tuple(_whole(n, 1) for n in body["sizes"])
            axes = {
                str(name): tuple(
                    Axis(tuple(Segment(_whole(g, FIXED), _whole(s), _whole(c), _whole(i, 1)) for g, s, c, i in rows))
                    for rows in of_tensor
                )
                for name, of_tensor in body["axes"].items()
            }
            if any(s.group >= len(sizes) for of in axes.values() for a in of for s in a.segments):
                raise BundleError("axes of a training graph name a group that isn't there")
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"axes of a training graph can't be read ({type(error).__name__}: {error})") from error
        return cls(sizes, axes)

    @cached_property
    def prefixed(self) -> frozenset[int]:
        """Groups of which fewer channels are a prefix of every run of theirs, so that they can be narrowed.

        Where a part of a group's channels is apart (shuffled or split channels), only the ranks would tell how
        many of them are left, and where on that axis anything else begins.
        """
        out = set(range(len(self.sizes)))
        for axis in (a for of_tensor in self.axes.values() for a in of_tensor):
            if any(s.group != FIXED and (s.start, s.count) != (0, self.sizes[s.group]) for s in axis.segments):
                out.difference_update(axis.groups)
        return frozenset(out)

    def plans(self, widths: Sequence[int], densities: Sequence[float]) -> list[tuple[int, ...]]:
        """The widths at which a device's steps train: its own first, then those of the densities, none wider.

        A density is a share of the whole model; groups that can't be narrowed stay at the device's width. Raises
        `BundleError` if the widths don't fit.
        """
        self._fit(widths)
        plans = [tuple(widths)]
        for density in densities:
            # A hair above a whole number (0.7 × 10) is not a channel.
            wanted = [max(1, -int(-(density * n - 1e-9) // 1)) for n in self.sizes]
            plan = tuple(
                min(new, own) if group in self.prefixed else own
                for group, (new, own) in enumerate(zip(wanted, widths, strict=True))
            )
            if plan not in plans:
                plans.append(plan)
        return plans

    def shapes(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors at some widths. Raises `BundleError` if the widths don't fit."""
        self._fit(widths)
        return {n: tuple(a.size(widths, self.sizes) for a in axes) for n, axes in self.axes.items()}

    def _fit(self, widths: Sequence[int]) -> None:
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

    def narrowed(self, arrays: Mapping[str, Array], widths: Sequence[int], narrower: Sequence[int]) -> dict[str, Array]:
        """The arrays of a submodel: prefixes, which may be views.

        Besides tensors there may be arrays of their shape that belong to them (`name::momentum`); what belongs to no
        tensor, and numbers, are passed on.
        """
        out = dict(arrays)
        for name, value in arrays.items():
            axes = self.axes.get(name.partition("::")[0])
            if axes is not None and len(axes) == value.ndim:
                out[name] = np.asarray(value[self._prefix(axes, widths, narrower)], order="C")
        return out

    def write_back(
        self, onto: Mapping[str, Array], moved: Mapping[str, Array], widths: Sequence[int], narrower: Sequence[int]
    ) -> None:
        """Write a submodel's arrays to their places in `onto`; the rest of it stays as it is."""
        for name, value in moved.items():
            onto[name][self._prefix(self.axes[name.partition("::")[0]], widths, narrower)] = value

    def _prefix(self, axes: Sequence[Axis], widths: Sequence[int], narrower: Sequence[int]) -> tuple[Any, ...]:
        return mesh([self._kept(axis, widths, narrower) for axis in axes])

    def _kept(self, axis: Axis, widths: Sequence[int], narrower: Sequence[int]) -> Indices:
        """Indices of an axis at `widths` that are left at narrower ones."""
        if all(widths[g] == narrower[g] for g in axis.groups):
            return np.arange(axis.size(widths, self.sizes), dtype=np.int64)
        parts, at = [], 0
        for s in axis.segments:
            length, kept = s.length, s.length
            if s.group != FIXED:
                length, kept = s.inner * widths[s.group], s.inner * narrower[s.group]
            parts.append(np.arange(at, at + kept, dtype=np.int64))
            at += length
        return np.concatenate(parts)


def axes_json(architecture: Architecture) -> str:
    """The channels on the axes of an architecture's tensors, as text for a training graph's metadata."""
    axes = {
        t.name: [[[s.group, s.start, s.count, s.inner] for s in a.segments] for a in t.axes]
        for t in architecture.tensors
    }
    return json.dumps({"format": _FORMAT, "sizes": architecture.sizes, "axes": axes}, separators=(",", ":"))


def _whole(value: object, low: int = 0) -> int:
    if type(value) is not int or not low <= value <= _MAX_SIZE:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number from {low} to {_MAX_SIZE}")
    return value


# The initial values of all frameworks; scales are 0 in a block that starts as the identity.
_AS_MADE = {
    TensorKind.NORM_SCALE: (1.0, 0.0),
    TensorKind.NORM_BIAS: (0.0,),
    TensorKind.STAT_MEAN: (0.0,),
    TensorKind.STAT_VAR: (1.0,),
}


_DRAWN = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})

# Of fewer weights the largest needn't come near the bound that they were drawn within.
_FEW = 256


def just_made(architecture: Architecture, model: Mapping[str, Array]) -> bool:
    """Whether a model has never been trained.

    Its normalisations tell, whose numbers training moves, every one. In a model without any the layers' weights tell
    if they are as torch makes them: 0, or drawn from ±1 / √(inputs), a bound that training carries some across. Other
    models without normalisations don't tell, and don't count as just made: nothing of a trained model may be lost.
    """
    told = [s for s in architecture.tensors if s.kind in _AS_MADE]
    if told:
        return all(np.isin(model[s.name], _AS_MADE[s.kind]).all() for s in told)
    layers = [layer for layer in architecture.layers if layer.weight in model and layer.op in _DRAWN]
    return any(model[n.weight].size >= _FEW for n in layers) and all(
        _as_drawn(model[n.weight], 0 if n.op == "ConvTranspose" else n.output_axis) for n in layers
    )


def _as_drawn(weights: Array, output_axis: int) -> bool:
    largest = float(np.abs(weights).max(initial=0.0))
    reached = largest * math.sqrt(weights.size / weights.shape[output_axis])
    return largest == 0 or (reached <= 1 + 1e-6 and (reached > 0.98 or weights.size < _FEW))


def nested(architecture: Architecture, model: Mapping[str, Array], held: Iterable[Sequence[int]]) -> dict[str, Array]:
    """The model, in which no channel listens to one that only wider models have: those weights are 0.

    So the whole model, and its first channels at any of the widths in `held`, answer alike, as long as nothing but
    weights mixes channels (a softmax or a norm over channels does, too). Silent weights are trained as all others are,
    wherever both of their channels are there. Raises `BundleError` if widths don't fit.
    """
    own = [np.arange(n) for n in architecture.sizes]
    narrow = [Selection.of(architecture, widths, own) for widths in held]
    out = dict(model)
    for spec in architecture.trainable:
        axes = _into_and_from(architecture, spec)
        if axes is None:
            continue
        out[spec.name] = np.array(model[spec.name])
        weights = np.moveaxis(out[spec.name], axes, (0, 1))
        for selection in narrow:
            into, heard = (selection.maps(spec.name)[axis] for axis in axes)
            weights[np.ix_(into, np.setdiff1d(np.arange(weights.shape[1]), heard))] = 0
    return out


def _into_and_from(architecture: Architecture, spec: TensorSpec) -> tuple[int, int] | None:
    """The axis of the channels that a weight makes and that of those over which it sums; None where that isn't sure.

    A tensor that several layers read in different ways, heads' weights in one tensor and grouped transposed
    convolutions, whose first axis is of inputs and outputs at once, are left as they are.
    """
    found = set()
    for layer in architecture.layers:
        if layer.weight != spec.name or spec.kind is not TensorKind.WEIGHT:
            continue
        if layer.op == "Conv":
            summed = 1
        elif layer.op == "ConvTranspose":
            summed = 0 if layer.groups == 1 else layer.output_axis
        else:
            summed = 1 - layer.output_axis if len(spec.axes) == 2 else layer.output_axis
        found.add((layer.output_axis, summed))
    into, summed = found.pop() if len(found) == 1 else (0, 0)
    return None if into == summed else (into, summed)
