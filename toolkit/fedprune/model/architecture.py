"""Architectures: the tensors, channel groups and layers of a model, as planners, boards and aggregators need them.

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

from fedprune.core.errors import BundleError, value_text
from fedprune.model.axis import FIXED, MAX_SIZE, Axis, Segment, json_int
from fedprune.model.cost_table import Activation, LayerRow, Volume

__all__ = [
    "FIXED",
    "Activation",
    "Architecture",
    "Axis",
    "ChannelGroup",
    "LayerRow",
    "Segment",
    "TensorKind",
    "TensorSpec",
    "Volume",
    "kept_share",
    "widths_at",
    "widths_at_least",
]

FORMAT = "fedprune.architecture/3"

# Axes of a tensor; weights have five at most. The file comes from other machines.
_MAX_RANK = 8


class TensorKind(str, Enum):
    """The role of a tensor, which decides whether it is trained, regularised and masked, and how it is aggregated."""

    WEIGHT = "weight"
    BIAS = "bias"
    NORM_SCALE = "norm_scale"
    NORM_BIAS = "norm_bias"
    STAT_MEAN = "stat_mean"
    STAT_VAR = "stat_var"

    @property
    def is_trainable(self) -> bool:
        """Whether an optimiser changes it; batch-norm statistics are pooled by counts instead."""
        return self not in (TensorKind.STAT_MEAN, TensorKind.STAT_VAR)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be kept or cut together, in all tensors that they occur in."""

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
    """An array in the file of the frozen base, which is no tensor of the model: its name there, type and shape."""

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
        layers: The cost table, in the order of the graph: operators with weights, and others that take time.
        activations: The values whose memory a step needs.
        input_shape: One sample's shape, without the batch.
        output_shape: One sample's output, without the batch. A classifier has its classes on the first axis, as
            torch's losses take them: [K], or [K, height, width] for one class per pixel.
        base: Arrays of frozen weights in low precision, in the order of their file; empty without one.
    """

    name: str
    groups: tuple[ChannelGroup, ...]
    tensors: tuple[TensorSpec, ...]
    layers: tuple[LayerRow, ...]
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
        return tuple(t for t in self.tensors if t.kind.is_trainable)

    @cached_property
    def statistics(self) -> tuple[TensorSpec, ...]:
        return tuple(t for t in self.tensors if not t.kind.is_trainable)

    def shape(self, name: str, widths: Sequence[int]) -> tuple[int, ...]:
        return tuple(a.size(widths, self.sizes) for a in self.by_name[name].axes)

    def shapes(self, widths: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {t.name: self.shape(t.name, widths) for t in self.tensors}

    def check_widths(self, widths: Sequence[int]) -> tuple[int, ...]:
        """The widths as a tuple of ints. Raises `BundleError` if their number is not that of the groups, or one is
        below 1 or above its group's size."""
        checked = tuple(int(w) for w in widths)
        if len(checked) != len(self.groups):
            raise BundleError(
                "widths don't fit the architecture", expected=f"{len(self.groups)} numbers", got=len(checked)
            )
        for group, width in zip(self.groups, checked, strict=True):
            if not 1 <= width <= group.size:
                raise BundleError(f"width of group {group.name}", expected=f"1 to {group.size} channels", got=width)
        return checked

    def output_axes(self, name: str) -> tuple[int, ...]:
        """The axes of a tensor whose index is the channel that it produces, rather than the one that it reads. For a
        layer's weight that is the layer's output axis. Any other tensor (a bias, a norm's vector, an embedding) acts on
        the channels that it is indexed by, so that all its axes count."""
        axes = {n.output_axis for n in self.layers if name and n.weight == name}
        return tuple(sorted(axes)) if axes else tuple(range(len(self.by_name[name].axes)))

    @cached_property
    def _group_axes(self) -> tuple[tuple[tuple[TensorSpec, int], ...], ...]:
        """By group, the tensors and axes that its channels are on."""
        # An index: a page about a model of a thousand layers asks for each group, and each has few tensors.
        axes: list[list[tuple[TensorSpec, int]]] = [[] for _ in self.groups]
        for spec in self.tensors:
            for i, axis in enumerate(spec.axes):
                for group in axis.groups:
                    axes[group].append((spec, i))
        return tuple(map(tuple, axes))

    @cached_property
    def _families(self) -> dict[str, list[TensorSpec]]:
        """Tensors by their names up to the last dot."""
        families: dict[str, list[TensorSpec]] = {}
        for spec in self.tensors:
            families.setdefault(spec.name.rpartition(".")[0], []).append(spec)
        return families

    def members(self, group: int) -> tuple[str, ...]:
        """The axes that a group's channels are on, as text such as `conv3.weight[0]`."""
        return tuple(f"{spec.name}[{axis}]" for spec, axis in self._group_axes[group])

    def summary(self, group: int) -> tuple[str, ...]:
        """The same as `members`, in short: `bn3.*` if all tensors `bn3.…` are vectors along the group."""
        members: dict[str, None] = {}
        for spec, axis in self._group_axes[group]:
            prefix = spec.name.rpartition(".")[0]
            family = self._families[prefix] if prefix else []
            vectors = len(family) > 1 and all(len(t.axes) == 1 and group in t.axes[0].groups for t in family)
            members[f"{prefix}.*" if vectors else f"{spec.name}[{axis}]"] = None
        return tuple(members)

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: the same architecture always gives the same text, whose sha256 is its digest."""
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
        # Left out if it is empty, so that the digest of a model without a base doesn't depend on it.
        if self.base:
            body["base"] = [[b.name, b.code, list(b.shape)] for b in self.base]
        return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Architecture:
        """Read and check what `to_json` writes. Raises `BundleError` if it is something else, or contradicts itself."""
        try:
            body = json.loads(text)
            if body["format"] != FORMAT:
                raise BundleError(
                    "architecture format",
                    expected=FORMAT,
                    got=value_text(body["format"]),
                    hint="Export the model again.",
                )
            architecture = cls(
                name=str(body["name"]),
                groups=tuple(ChannelGroup(str(n), json_int(s)) for n, s in body["groups"]),
                tensors=tuple(
                    TensorSpec(str(t["name"]), TensorKind(t["kind"]), tuple(map(Axis.from_rows, t["axes"])))
                    for t in body["tensors"]
                ),
                layers=tuple(map(LayerRow.from_row, body["layers"])),
                activations=tuple(map(Activation.from_row, body["activations"])),
                input_shape=tuple(json_int(d) for d in body["input_shape"]),
                output_shape=tuple(json_int(d) for d in body["output_shape"]),
                base=tuple(BaseSpec(str(n), str(c), tuple(map(json_int, s))) for n, c, s in body.get("base", [])),
            )
        except BundleError:
            raise
        # A file of another machine may hold anything: these are what reading the wrong JSON values raises.
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise BundleError(
                f"this is not an architecture ({type(error).__name__}: {error})", hint="Export the model again."
            ) from error
        architecture.validate()
        return architecture

    def validate(self) -> None:
        """Check that the parts agree with each other. Raises `BundleError` if a size is out of range, a name comes
        twice, or a segment reaches outside its group."""
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

    def _check_layer(self, layer: LayerRow) -> None:
        axes = 0
        if layer.weight:
            if layer.weight not in self.by_name:
                raise BundleError(
                    f"architecture: layer {layer.name} refers to a tensor that isn't there", got=layer.weight
                )
            axes = len(self.by_name[layer.weight].axes)
        if not 0 <= layer.output_axis < max(1, axes):
            raise BundleError(f"architecture: output axis of layer {layer.name}", got=layer.output_axis)
        numbers = (layer.positions, layer.input_volume.positions, layer.output_volume.positions)
        if min(numbers) < 0 or min(layer.kernel, layer.stride, layer.groups) < 1:
            raise BundleError(f"architecture: a number of layer {layer.name} is out of range", got=layer.name)
        for volume in (layer.input_volume, layer.output_volume):
            if len(volume.axes) > _MAX_RANK:
                raise BundleError(f"architecture: axes of layer {layer.name}", expected=f"up to {_MAX_RANK}")
            for axis in volume.axes:
                self._check_axis(layer.name, axis)
        self._check_axis(layer.name, layer.inner)

    def _check_axis(self, name: str, axis: Axis) -> None:
        # Per group, the channels at which the number of indices changes, and by how much.
        changes_by_group: dict[int, dict[int, int]] = {}
        for segment in axis.segments:
            if segment.count < 0 or segment.start < 0 or segment.inner < 1 or segment.length > MAX_SIZE:
                raise BundleError(f"architecture: a segment of {name} is out of range", got=segment)
            if segment.group == FIXED:  # no channels: a cut leaves it as it is
                continue
            end = segment.start + segment.count
            if not 0 <= segment.group < len(self.groups) or end > self.groups[segment.group].size:
                raise BundleError(f"architecture: a segment of {name} reaches outside its group", got=segment)
            # Only the ends of segments are visited: a file may claim two thousand million channels.
            changes = changes_by_group.setdefault(segment.group, {})
            inner = segment.inner if segment.count else 0
            changes[segment.start] = changes.get(segment.start, 0) + inner
            changes[end] = changes.get(end, 0) - inner
        for group, changes in changes_by_group.items():
            size = self.groups[group].size
            if not changes.get(0) or any(change and channel not in (0, size) for channel, change in changes.items()):
                raise BundleError(f"architecture: channels of group {self.groups[group].name} are uneven on {name}")


def widths_at(architecture: Architecture, density: float) -> tuple[int, ...]:
    """Widths that keep `density` of every group, at least one channel: ceil(density × size) (CA-HFP, Sec. III).
    Raises `BundleError` if the density is not above 0 and at most 1."""
    if not 0 < density <= 1:
        raise BundleError("density", expected="above 0 and at most 1", got=density)
    # The product may be rounded to just above a whole number (0.7 × 10), which must not add a channel.
    widths = [max(1, min(g.size, math.ceil(density * g.size - 1e-9))) for g in architecture.groups]
    return architecture.check_widths(widths)


def widths_at_least(architecture: Architecture, widths: Sequence[int], min_width: int) -> tuple[int, ...]:
    """Widths with at least `min_width` channels of every group, or all channels of a group that has fewer."""
    return tuple(max(width, min(size, min_width)) for width, size in zip(widths, architecture.sizes, strict=True))


def kept_share(architecture: Architecture, widths: Sequence[int]) -> float:
    """The share of the channels of all groups that these widths keep: 1 at full width. If all groups keep equal shares,
    it is the `density` of `widths_at`, except for rounding. Otherwise it is the mean of the groups' shares, weighted by
    their sizes."""
    all_channels = sum(architecture.sizes)
    return sum(widths) / all_channels if all_channels else 1.0
