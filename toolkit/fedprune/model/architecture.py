"""The parts of a model: tensors, channel groups, layers. All that a planner, a board or an aggregator needs.

An axis of a tensor is a row of *segments*. A segment is a run of channels of one group, each taking `inner`
neighbouring indices (a flattened 4×4 map has `inner` 16), or a run of fixed indices that no cut may touch.
Every channel of a group appears equally often on an axis, so that sizes follow from widths alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np

from fedprune.core.errors import BundleError, shown
from fedprune.model.axis import FIXED, MAX_SIZE, Activation, Axis, Layer, Segment, Volume, whole

__all__ = [
    "FIXED",
    "Activation",
    "Architecture",
    "Axis",
    "ChannelGroup",
    "Layer",
    "Segment",
    "TensorKind",
    "TensorSpec",
    "Volume",
    "kept_share",
    "widths_at",
    "widths_with_least",
]

FORMAT = "fedprune.architecture/3"

_MAX_RANK = 8


class TensorKind(str, Enum):
    """The role of a tensor, which decides how the tensor is trained, pulled, masked and aggregated."""

    WEIGHT = "weight"
    BIAS = "bias"
    NORM_SCALE = "norm_scale"
    NORM_BIAS = "norm_bias"
    STAT_MEAN = "stat_mean"
    STAT_VAR = "stat_var"

    @property
    def trainable(self) -> bool:
        """Whether an optimiser moves it; batch-norm statistics are pooled by counts instead."""
        return self not in (TensorKind.STAT_MEAN, TensorKind.STAT_VAR)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be kept or cut together, over all the tensors that they touch."""

    name: str
    size: int


@dataclass(frozen=True)
class TensorSpec:
    """A named tensor of the model at full width."""

    name: str
    kind: TensorKind
    axes: tuple[Axis, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(a.length for a in self.axes)


_BASE_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
}


@dataclass(frozen=True)
class BaseSpec:
    """An array of the frozen base, which is a file of its own and no tensor: its name there, type and shape."""

    name: str
    code: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return _BASE_TYPES[self.code]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Architecture:
    """A model's tensors, channel groups, layers and activations, without weights.

    Attributes:
        groups: The channel groups; segments refer to them by position.
        tensors: All weights and statistics, in the model's order.
        layers: The cost table, in the order of the graph: what multiplies by weights, and whatever else takes time.
        activations: The values whose memory a step needs.
        input_shape: One sample's shape, without the batch.
        output_shape: One sample's output, without the batch. A model that tells classes apart has them on its first
            axis, as torch's losses take them: [K], or [K, height, width] for one class per pixel.
        base: Arrays of frozen weights in low precision, in the order of their file; empty without one.
    """

    name: str
    groups: tuple[ChannelGroup, ...]
    tensors: tuple[TensorSpec, ...]
    layers: tuple[Layer, ...]
    activations: tuple[Activation, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    base: tuple[BaseSpec, ...] = ()

    @property
    def base_bytes(self) -> int:
        """Bytes of the frozen base as it is stored."""
        return sum(b.bytes for b in self.base)

    @property
    def classes(self) -> int:
        """Entries of the output's first axis."""
        return self.output_shape[0] if self.output_shape else 1

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Channels of every group at full width."""
        return tuple(g.size for g in self.groups)

    @cached_property
    def by_name(self) -> dict[str, TensorSpec]:
        return {t.name: t for t in self.tensors}

    @cached_property
    def trainable(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if t.kind.trainable)

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if not t.kind.trainable)

    def shape(self, name: str, widths: Sequence[int]) -> tuple[int, ...]:
        return tuple(a.size(widths, self.sizes) for a in self.by_name[name].axes)

    def shapes(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {t.name: self.shape(t.name, widths) for t in self.tensors}

    def check_widths(self, widths: Sequence[int]) -> tuple[int, ...]:
        """The widths as a tuple of ints. Raises `BundleError` if their number is not that of the groups, or one is
        below 1 or above its group's size."""
        got = tuple(int(w) for w in widths)
        if len(got) != len(self.groups):
            raise BundleError("widths don't fit the architecture", expected=f"{len(self.groups)} numbers", got=len(got))
        for group, width in zip(self.groups, got, strict=True):
            if not 1 <= width <= group.size:
                raise BundleError(f"width of group {group.name}", expected=f"1 to {group.size} channels", got=width)
        return got

    def output_axes(self, name: str) -> tuple[int, ...]:
        """Axes of a tensor whose index is the channel that it makes, rather than the one that it reads.

        For a layer's weight that is the layer's output axis. Any other tensor (a bias, a norm's vector, an embedding)
        acts on the channels that it is indexed by, so that all its axes count.
        """
        made = {n.output_axis for n in self.layers if name and n.weight == name}
        return tuple(sorted(made)) if made else tuple(range(len(self.by_name[name].axes)))

    def members(self, group: int) -> tuple[str, ...]:
        """Where a group's channels live, as text such as `conv3.weight[0]`."""
        return tuple(f"{t.name}[{i}]" for t in self.tensors for i, a in enumerate(t.axes) if group in a.groups)

    def summary(self, group: int) -> tuple[str, ...]:
        """Where a group's channels live, in short: `bn3.*` where all tensors `bn3.…` are vectors along them."""
        families: dict[str, list[TensorSpec]] = {}
        for t in self.tensors:
            families.setdefault(t.name.rpartition(".")[0], []).append(t)
        out: list[str] = []
        for t in self.tensors:
            prefix = t.name.rpartition(".")[0]
            family = families[prefix]
            if prefix and len(family) > 1 and all(len(f.axes) == 1 and group in f.axes[0].groups for f in family):
                out += [f"{prefix}.*"] if t is family[0] else []
            else:
                out += [f"{t.name}[{i}]" for i, a in enumerate(t.axes) if group in a.groups]
        return tuple(out)

    def describe(self) -> str:
        return "\n".join(
            f"{g.name}: {g.size} channels: {', '.join(self.summary(i))}" for i, g in enumerate(self.groups)
        )

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: the same architecture always gives the same text."""
        body = {
            "format": FORMAT,
            "name": self.name,
            "groups": [[g.name, g.size] for g in self.groups],
            "tensors": [
                {"name": t.name, "kind": t.kind.value, "axes": [a.to_rows() for a in t.axes]} for t in self.tensors
            ],
            "layers": [n.to_row() for n in self.layers],
            "activations": [v.to_row() for v in self.activations],
            "input_shape": list(self.input_shape),
            "output_shape": list(self.output_shape),
        }
        if self.base:
            body["base"] = [[b.name, b.code, list(b.shape)] for b in self.base]
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Architecture:
        """Read and check an architecture. Raises `BundleError` if it is not what `to_json` writes, or contradicts
        itself."""
        try:
            body = json.loads(text)
            if body["format"] != FORMAT:
                raise BundleError(
                    "architecture format", expected=FORMAT, got=shown(body["format"]), hint="Export the model again."
                )
            arch = cls(
                name=str(body["name"]),
                groups=tuple(ChannelGroup(str(n), whole(s)) for n, s in body["groups"]),
                tensors=tuple(
                    TensorSpec(str(t["name"]), TensorKind(t["kind"]), tuple(map(Axis.from_rows, t["axes"])))
                    for t in body["tensors"]
                ),
                layers=tuple(map(Layer.from_row, body["layers"])),
                activations=tuple(map(Activation.from_row, body["activations"])),
                input_shape=tuple(whole(d) for d in body["input_shape"]),
                output_shape=tuple(whole(d) for d in body["output_shape"]),
                base=tuple(BaseSpec(str(n), str(c), tuple(map(whole, s))) for n, c, s in body.get("base", [])),
            )
        except BundleError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BundleError(
                f"this is not an architecture ({type(error).__name__}: {error})",
                hint="Export the model again.",
            ) from error
        arch.validate()
        return arch

    def validate(self) -> None:
        """Check that the parts fit each other. Raises `BundleError` if a size is out of range, a name comes twice,
        or a segment reaches outside its group."""
        names = [t.name for t in self.tensors] + [b.name for b in self.base]
        for array in self.base:
            if array.code not in _BASE_TYPES or len(array.shape) > _MAX_RANK or math.prod(array.shape) > MAX_SIZE**2:
                raise BundleError(f"architecture: {array.name} of the base", got=(array.code, array.shape))
        if len(set(names)) != len(names):
            raise BundleError("architecture: a tensor name comes twice")
        for what, shape in (("input", self.input_shape), ("output", self.output_shape)):
            if any(d < 1 for d in shape):
                raise BundleError(f"architecture: {what} shape", expected="sizes", got=shape)
        for group in self.groups:
            if not 1 <= group.size <= MAX_SIZE:
                raise BundleError(f"architecture: size of group {group.name}", expected="1 or more", got=group.size)
        for spec in self.tensors:
            if len(spec.axes) > _MAX_RANK:
                raise BundleError(
                    f"architecture: axes of {spec.name}", expected=f"up to {_MAX_RANK}", got=len(spec.axes)
                )
            for axis in spec.axes:
                self._check_axis(spec.name, axis)
        for value in self.activations:
            self._check_axis(value.name, value.channels)
            if value.positions < 0:
                raise BundleError(f"architecture: positions of {value.name}", expected="0 or more", got=value.positions)
        for layer in self.layers:
            self._check_layer(layer)

    def _check_layer(self, layer: Layer) -> None:
        axes = 0
        if layer.weight:
            if layer.weight not in self.by_name:
                raise BundleError(
                    f"architecture: layer {layer.name} refers to a tensor that isn't there", got=layer.weight
                )
            axes = len(self.by_name[layer.weight].axes)
        if not 0 <= layer.output_axis < max(1, axes):
            raise BundleError(f"architecture: output axis of layer {layer.name}", got=layer.output_axis)
        numbers = (layer.positions, layer.reads.positions, layer.makes.positions)
        if min(numbers) < 0 or min(layer.kernel, layer.stride, layer.groups) < 1:
            raise BundleError(f"architecture: a number of layer {layer.name} is out of range", got=layer.name)
        for volume in (layer.reads, layer.makes):
            if len(volume.axes) > _MAX_RANK:
                raise BundleError(f"architecture: axes of layer {layer.name}", expected=f"up to {_MAX_RANK}")
            for axis in volume.axes:
                self._check_axis(layer.name, axis)
        self._check_axis(layer.name, layer.inner)

    def _check_axis(self, name: str, axis: Axis) -> None:
        seen: dict[int, dict[int, int]] = {}  # per group, where the number of indices per channel changes
        for s in axis.segments:
            if s.count < 0 or s.start < 0 or s.inner < 1 or s.length > MAX_SIZE:
                raise BundleError(f"architecture: a segment of {name} is out of range", got=s)
            if s.group == FIXED:
                continue
            if not 0 <= s.group < len(self.groups) or s.start + s.count > self.groups[s.group].size:
                raise BundleError(f"architecture: a segment of {name} reaches outside its group", got=s)
            # Only the ends of segments are looked at: a file may claim two thousand million channels.
            steps = seen.setdefault(s.group, {})
            steps[s.start] = steps.get(s.start, 0) + s.inner * (s.count > 0)
            steps[s.start + s.count] = steps.get(s.start + s.count, 0) - s.inner * (s.count > 0)
        for g, steps in seen.items():
            size = self.groups[g].size
            if not steps.get(0) or any(n and c not in (0, size) for c, n in steps.items()):
                raise BundleError(f"architecture: channels of group {self.groups[g].name} are uneven on {name}")


def widths_at(architecture: Architecture, density: float) -> tuple[int, ...]:
    """Widths that keep `density` of every group, at least one channel: ceil(density × size) (CA-HFP, Sec. III).
    Raises `BundleError` if the density is not above 0 and at most 1."""
    if not 0 < density <= 1:
        raise BundleError("density", expected="above 0 and at most 1", got=density)
    # The product may land a hair above a whole number (0.7 × 10): that hair is not a channel.
    widths = [max(1, min(g.size, -int(-(density * g.size - 1e-9) // 1))) for g in architecture.groups]
    return architecture.check_widths(widths)


def widths_with_least(architecture: Architecture, widths: Sequence[int], least: int) -> tuple[int, ...]:
    """Widths with at least so many channels of every group, or all of its channels where it has less."""
    return tuple(max(width, min(size, least)) for width, size in zip(widths, architecture.sizes, strict=True))


def kept_share(architecture: Architecture, widths: Sequence[int]) -> float:
    """The share of all channels that these widths keep, all groups together: 1 at full width.

    At equal shares of all groups it is the `density` of `widths_at`, except for rounding; where a planner keeps more of
    one group than of another it is their mean, a group counting by its channels.
    """
    whole = sum(architecture.sizes)
    return sum(widths) / whole if whole else 1.0
