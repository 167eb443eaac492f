"""Workload of a model's kernels at any widths: the work of a step or a prediction, by kind of layer.

Rows of the cost table become a few numbers each (calls, MACs, elements moved, weights touched) under the
name of a *kind* of kernel. What a board takes for one such unit is its `LatencyTable`'s to say
(`fedprune.planning.latency_model`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import Architecture, LayerRow
from fedprune.model.axis import Axis

Numbers = npt.NDArray[np.float64]

# The units of a kernel's work: calls, parts into which a call falls (samples × taps), MACs, elements that go in and
# out, and weights.
FEATURES = ("call", "part", "mac", "move", "weight")

# Kinds of kernels. In training convolutions differ by the size of their map (which decides their formulation); in
# inference by whether onnxruntime computes them with channels in blocks or, "plain", without.
KINDS = (
    "conv",
    "conv1x1",
    "conv-small",
    "conv1x1-small",
    "conv-tiny",
    "conv-plain",
    "conv1x1-plain",
    "conv-plain-small",
    "conv1x1-plain-small",
    "depthwise",
    "depthwise-small",
    "depthwise-plain",
    "grouped",
    "transposed",
    "linear",
    "product",
    "recurrent",
    "batch-norm",
    "norm",
    "cheap",
    "dear",  # all other operators, such as Exp
    "pool",
    "reduce",
    "copy",
    "run",  # the whole graph, once: what a run costs besides its layers
)

# Positions of a map from which, and up to which, a training graph's convolutions are formulated in their own way.
MIN_LARGE_MAP, MAX_TINY_MAP = 64, 4

# Channels that onnxruntime's blocked kernels want a multiple of; with others it falls back to plain ones.
ALIGNMENT = 4

# Channels of a block that processors use, as far as known (1: no blocks).
BLOCKS = (1, 4, 8, 16)

# Counts that a workload remembers; each is some hundred float64s.
_MAX_CACHED_COUNTS = 256

# Columns that a matrix product computes at once: a product of fewer columns takes as long.
TILE_COLUMNS = 32

# Operators of one pass over their input: arithmetic that costs no more than moving the numbers.
_CHEAP = frozenset(
    {"Relu", "Clip", "Add", "Sub", "Mul", "Neg", "Abs", "LeakyRelu", "Max", "Min", "Sum", "Mean", "PRelu", "Where"}
)
# Normalisations by statistics of each sample; batch norm has a kind of its own.
_NORMS = frozenset({"LayerNormalization", "GroupNormalization", "RMSNormalization", "InstanceNormalization"})
_POOLS = frozenset({"MaxPool", "AveragePool", "LpPool", "Resize"})
# Operators that move numbers without computing any.
_COPIES = frozenset({"Concat", "Transpose", "Slice", "Split", "Pad", "Gather", "Expand", "DepthToSpace", "Tile"})
# Activations that onnxruntime lets a convolution do as it writes.
_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Tanh", "HardSigmoid"})

_KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}


class Workload:
    """An architecture's kernels, ready to be counted for many widths at once.

    The latest counts are remembered: boards of one fleet train at few widths, in batches of few sizes, and each has
    times of its own.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._cached_count = lru_cache(maxsize=_MAX_CACHED_COUNTS)(self._count)
        # Each axis of the model has an index. That of length 1 is 0, which fills up the shorter rows of the tables
        # below.
        self._index_of_axis: dict[Axis, int] = {Axis.fixed(1): 0}
        shapes = {t.name: t.axes for t in architecture.tensors}
        # A product of two activations sums over `inner` what each of its outputs needs.
        self._layers = architecture.layers
        inputs, outputs, weights, out_channels, weight_inners, product_inners = [], [], [], [], [], []
        for layer in self._layers:
            inputs.append(self._axis_indices(layer.input_volume.axes))
            outputs.append(self._axis_indices(layer.output_volume.axes))
            axes = shapes.get(layer.weight, ())
            weights.append(self._axis_indices(axes))
            output_axes = axes[layer.output_axis : layer.output_axis + 1]
            out_channels.append(self._axis_indices(output_axes))
            other_axes = [a for i, a in enumerate(axes) if i != layer.output_axis]
            weight_inners.append(self._axis_indices(other_axes[:1]))
            product_inners.append(self._axis_indices((layer.inner,) if layer.inner.segments else ()))
        self._input_axes, self._output_axes, self._weight_axes = map(_axis_table, (inputs, outputs, weights))
        self._out_channel_axes, self._in_channel_axes, self._product_axes = map(
            _axis_table, (out_channels, weight_inners, product_inners)
        )
        self._tensor_axes = _axis_table([self._axis_indices(t.axes) for t in architecture.tensors])
        self._activation_axes = _axis_table([self._axis_indices((v.channels,)) for v in architecture.activations])
        # An axis's length is linear in the groups' widths, so that one product gives all lengths at many widths.
        self._slopes = np.zeros((len(architecture.groups), len(self._index_of_axis)))
        self._fixed_lengths = np.zeros(len(self._index_of_axis))
        for axis, index in self._index_of_axis.items():
            for s in axis.segments:
                if s.group < 0:
                    self._fixed_lengths[index] += s.length
                else:
                    self._slopes[s.group, index] += s.length / architecture.groups[s.group].size
        self._input_positions = np.array([n.input_volume.positions for n in self._layers], float)
        self._output_positions = np.array([n.output_volume.positions for n in self._layers], float)
        self._positions = np.array([n.positions for n in self._layers], float)
        self._value_positions = np.array([v.positions for v in architecture.activations], float)
        self._kernels = np.array([n.kernel for n in self._layers], float)
        self._strides = np.array([n.stride for n in self._layers], float)
        self._has_weight = np.array([bool(n.weight) for n in self._layers], bool)
        self._is_depthwise = np.array([_kind(n) == "depthwise" for n in self._layers], bool)
        # The first layer with weights reads the model's input.
        self._first_weighted = int(np.argmax(self._has_weight)) if self._has_weight.any() else -1
        self._training_kinds = np.array([_KIND_INDEX[_training_kind(n)] for n in self._layers], int)
        self._inference_kinds = np.array([_inference_kind(self._layers, i) for i in range(len(self._layers))], int)

    def _axis_indices(self, axes: Sequence[Axis]) -> list[int]:
        return [self._index_of_axis.setdefault(a, len(self._index_of_axis)) for a in axes]

    def sizes(self, widths: npt.ArrayLike) -> Numbers:
        """Lengths of all axes, [n, axes], at widths [n, groups]."""
        return np.rint(np.atleast_2d(np.asarray(widths, float)) @ self._slopes + self._fixed_lengths)

    def macs(self, widths: npt.ArrayLike) -> Numbers:
        """MACs of one sample's forward pass, per row: [n, rows]."""
        sizes = self.sizes(widths)
        return self._macs(sizes, *self._elements(sizes))

    def forward_macs(self, widths: npt.ArrayLike) -> Numbers:
        """MACs of one sample's forward pass, all layers: [n]."""
        return np.asarray(self.macs(widths).sum(1))

    def element_counts(self, widths: npt.ArrayLike) -> tuple[Numbers, Numbers]:
        """Elements of one sample's activations, and of all tensors: [n] each."""
        sizes = self.sizes(widths)
        activations = sizes[:, self._activation_axes].prod(-1) * self._value_positions
        return activations.sum(1), sizes[:, self._tensor_axes].prod(-1).sum(1)

    def _elements(self, sizes: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        """Elements of each row's input, output and weight: [n, rows] each."""
        inputs = sizes[:, self._input_axes].prod(-1) * self._input_positions
        outputs = sizes[:, self._output_axes].prod(-1) * self._output_positions
        return inputs, outputs, np.where(self._has_weight, sizes[:, self._weight_axes].prod(-1), 0)

    def _macs(self, sizes: Numbers, inputs: Numbers, outputs: Numbers, weights: Numbers) -> Numbers:
        products = np.where(
            self._training_kinds == _KIND_INDEX["product"], outputs * sizes[:, self._product_axes].prod(-1), 0
        )
        return np.asarray(np.where(self._has_weight, weights * self._positions, products))

    def training(self, widths: npt.ArrayLike, batch: int) -> Numbers:
        """The work of training steps per widths, kind and feature: [n, kinds × features]; `widths` are [n, groups]."""
        return self._cached_count(_hashable_widths(widths), batch, 0)

    def inference(self, widths: npt.ArrayLike, batch: int, block: int) -> Numbers:
        """The work of predictions, as `training` gives it; a blocked kernel computes `block` channels at once."""
        return self._cached_count(_hashable_widths(widths), batch, block)

    def _count(self, widths: tuple[tuple[float, ...], ...], batch: int, block: int) -> Numbers:
        """The work of predictions, or of training steps where `block` is 0."""
        work = self._inference_work(widths, batch, block) if block else self._training_work(widths, batch)
        work.setflags(write=False)
        return work

    def _training_work(self, widths: npt.ArrayLike, batch: int) -> Numbers:
        sizes = self.sizes(widths)
        inputs, outputs, weights = self._elements(sizes)
        macs = self._macs(sizes, inputs, outputs, weights)
        if self._first_weighted >= 0:
            macs[:, self._first_weighted] *= 2 / 3  # the gradient of the model's input isn't needed
        # Every output reads a window of its input: an element goes in once per tap, and less often by the stride.
        taps = np.where((self._kernels > 1) & self._has_weight, self._kernels / self._strides, 1.0)
        # A depthwise layer's input gradient is as large as its input, whatever the stride.
        taps = np.where(self._is_depthwise, self._kernels, taps)
        large_maps = self._positions >= MIN_LARGE_MAP
        # A call falls into a part per sample and, on large maps, per tap.
        parts = np.where(self._has_weight, batch * np.where(large_maps, self._kernels, 1.0), 0.0)
        parts = np.broadcast_to(parts, macs.shape)
        ones = np.ones_like(macs)
        rows = np.stack([ones, parts, macs * batch, (inputs * taps + outputs) * batch, weights], -1)
        return self._sum_by_kind(rows, np.broadcast_to(self._training_kinds, macs.shape))

    def _inference_work(self, widths: npt.ArrayLike, batch: int, block: int) -> Numbers:
        sizes = self.sizes(widths)
        inputs, outputs, weights = self._elements(sizes)
        macs = self._macs(sizes, inputs, outputs, weights) * batch
        out, inner = sizes[:, self._out_channel_axes].prod(-1), sizes[:, self._in_channel_axes].prod(-1)
        kinds = np.broadcast_to(self._inference_kinds, macs.shape).copy()
        plain = self._uses_plain(kinds, inner, out, block)
        padding = _block_padding(out, block) * np.where(inner >= block, _block_padding(inner, block), 1.0)
        convolutions = np.isin(self._inference_kinds, _CONVOLUTION_KINDS)
        # A blocked kernel computes whole blocks, also of channels that aren't there.
        padding_factor = np.where(plain, 1.0, np.where(convolutions, padding, _block_padding(out, block)))
        positions = np.maximum(self._positions, 1)
        tile_factor = np.where(plain, np.ceil(positions / TILE_COLUMNS) * TILE_COLUMNS / positions, 1.0)
        macs = np.where(
            convolutions, macs * padding_factor * tile_factor, np.where(self._is_depthwise, macs * padding_factor, macs)
        )
        # Plain kernels lay out every window of their input first.
        taps = np.where(
            plain & (self._kernels > 1) & (kinds == _KIND_INDEX["conv"]), self._kernels / self._strides, 1.0
        )
        small = self._positions < MIN_LARGE_MAP
        for blocked, plain_kind in _PLAIN_KIND_OF.items():
            is_plain_kind = plain & (kinds == _KIND_INDEX[blocked])
            kinds[is_plain_kind & ~small] = _KIND_INDEX[plain_kind]
            kinds[is_plain_kind & small] = _KIND_INDEX.get(f"{plain_kind}-small", _KIND_INDEX[plain_kind])
        moved_elements = (inputs * taps + outputs) * batch
        rows = np.stack([np.ones_like(macs), np.zeros_like(macs), macs, moved_elements, weights], -1)
        return self._sum_by_kind(np.where((kinds >= 0)[..., None], rows, 0.0), np.maximum(kinds, 0))

    @staticmethod
    def _uses_plain(kinds: npt.NDArray[np.int64], inner: Numbers, out: Numbers, block: int) -> npt.NDArray[np.bool_]:
        """Whether onnxruntime can't use its blocked kernels, per widths and layer."""
        dense_kinds = np.isin(kinds, [_KIND_INDEX["conv"], _KIND_INDEX["conv1x1"]])
        # Less than a block of input channels (an image's) has a kernel of its own.
        misaligned = (inner >= block) & (inner % ALIGNMENT > 0)
        misaligned_depthwise = (kinds == _KIND_INDEX["depthwise"]) & (out % ALIGNMENT > 0)
        return np.asarray((dense_kinds & misaligned) | misaligned_depthwise)

    def _sum_by_kind(self, rows: Numbers, kinds: npt.NDArray[np.int64]) -> Numbers:
        """Sums of rows by kind, with one "run" for the whole graph."""
        sums = np.zeros((len(rows), len(KINDS), len(FEATURES)))
        for k in range(len(KINDS) - 1):
            mask = kinds == k
            if mask.any():
                sums[:, k] = np.where(mask[..., None], rows, 0.0).sum(1)
        sums[:, -1, 0] = 1
        return sums.reshape(len(sums), -1)


_CONVOLUTION_KINDS = [_KIND_INDEX["conv"], _KIND_INDEX["conv1x1"]]
_PLAIN_KIND_OF = {"conv": "conv-plain", "conv1x1": "conv1x1-plain", "depthwise": "depthwise-plain"}


def _block_padding(channels: Numbers, block: int) -> Numbers:
    """The factor by which channels grow when they fill whole blocks."""
    return np.asarray(np.ceil(channels / block) * block / np.maximum(channels, 1))


def workload(architecture: Architecture) -> Workload:
    """The workload of an architecture; the last few are remembered."""
    return _cached_workload(ArchitectureKey(architecture))


class ArchitectureKey:
    """An architecture, compared by its digest."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def __hash__(self) -> int:
        return hash(self.architecture.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArchitectureKey) and other.architecture.digest == self.architecture.digest


@lru_cache(maxsize=8)
def _cached_workload(key: ArchitectureKey) -> Workload:
    return Workload(key.architecture)


def _hashable_widths(widths: npt.ArrayLike) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, np.atleast_2d(np.asarray(widths, float)).tolist()))


def _axis_table(rows: list[list[int]]) -> npt.NDArray[np.int64]:
    """Rows of axis numbers, filled up with axis 0, which is 1 long."""
    width = max((len(r) for r in rows), default=0) or 1
    return np.array([r + [0] * (width - len(r)) for r in rows], np.int64).reshape(len(rows), width)


def _training_kind(layer: LayerRow) -> str:
    kind = _kind(layer)
    if kind == "conv":
        if layer.positions <= MAX_TINY_MAP and layer.kernel > 1:
            return "conv-tiny"
        kind = "conv" if layer.kernel > 1 else "conv1x1"
    if kind in ("conv", "conv1x1", "depthwise"):
        return kind if layer.positions >= MIN_LARGE_MAP else f"{kind}-small"
    return kind


def _inference_kind(layers: Sequence[LayerRow], index: int) -> int:
    """The kind's index in `KINDS`; -1 for a layer that onnxruntime fuses into the convolution before it."""
    layer = layers[index]
    kind = _kind(layer)
    if kind == "conv" and layer.kernel == 1:
        kind = "conv1x1"
    former_layer = layers[index - 1] if index else None
    if layer.op == "BatchNormalization" and former_layer is not None and former_layer.op == "Conv":
        return -1
    if layer.op in _FUSED and former_layer is not None:
        if former_layer.op == "BatchNormalization" and index > 1:
            former_layer = layers[index - 2]
        if former_layer.op in ("Conv", "Gemm") and former_layer.output_volume == layer.output_volume:
            return -1
    return _KIND_INDEX[kind]


def _kind(layer: LayerRow) -> str:
    op = layer.op
    if op == "Conv":
        if layer.groups == 1:
            return "conv"
        return "depthwise" if prod([a.length for a in layer.output_volume.axes]) == layer.groups else "grouped"
    if op == "ConvTranspose":
        return "transposed"
    if op in ("LSTM", "GRU", "RNN"):
        return "recurrent"
    if layer.weight:
        return "linear"
    if op in ("MatMul", "Einsum"):
        return "product"
    if op == "BatchNormalization":
        return "batch-norm"
    if op in _NORMS:
        return "norm"
    if op in _POOLS:
        return "pool"
    if op.startswith(("Reduce", "Global")):
        return "reduce"
    if op in _COPIES:
        return "copy"
    return "cheap" if op in _CHEAP else "dear"
