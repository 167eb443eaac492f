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

from fedprune.model.architecture import Architecture, Layer
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
    "dear",
    "pool",
    "reduce",
    "copy",
    "run",
)

# Positions of a map from which, and up to which, a training graph's convolutions are formulated in their own way.
LARGE_MAP, TINY_MAP = 64, 4

# Channels that onnxruntime's blocked kernels want a multiple of; with others it falls back to plain ones.
ALIGNMENT = 4

# Channels of a block that processors use, as far as known (1: no blocks).
BLOCKS = (1, 4, 8, 16)

# Counts that a workload remembers; each is some hundred float64s.
_COUNTS = 256

# Columns that a matrix product computes at once: a product of fewer columns takes as long.
TILE = 32

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

_INDEX = {kind: i for i, kind in enumerate(KINDS)}


class Workload:
    """An architecture's kernels, ready to be counted for many widths at once.

    The latest counts are remembered: boards of one fleet train at few widths, in batches of few sizes, and each has
    times of its own.
    """

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture
        self._counted = lru_cache(maxsize=_COUNTS)(self._count)
        # Each axis of the model has an index. That of length 1 is 0, which fills up the shorter rows of the tables
        # below.
        self._places: dict[Axis, int] = {Axis.fixed(1): 0}
        shapes = {t.name: t.axes for t in architecture.tensors}
        # A product of two activations sums over `inner` what each of its outputs needs.
        self._layers = architecture.layers
        reads, makes, weights, outs, weight_inners, product_inners = [], [], [], [], [], []
        for layer in self._layers:
            reads.append(self._factors(layer.reads.axes))
            makes.append(self._factors(layer.makes.axes))
            axes = shapes.get(layer.weight, ())
            weights.append(self._factors(axes))
            output_axes = axes[layer.output_axis : layer.output_axis + 1]
            outs.append(self._factors(output_axes))
            other_axes = [a for i, a in enumerate(axes) if i != layer.output_axis]
            weight_inners.append(self._factors(other_axes[:1]))
            product_inners.append(self._factors((layer.inner,) if layer.inner.segments else ()))
        self._reads, self._makes, self._weights = map(_table, (reads, makes, weights))
        self._outs, self._inners, self._inner = map(_table, (outs, weight_inners, product_inners))
        self._tensors = _table([self._factors(t.axes) for t in architecture.tensors])
        self._values = _table([self._factors((v.channels,)) for v in architecture.activations])
        # An axis's length is linear in the groups' widths, so that one product gives all lengths at many widths.
        self._slopes = np.zeros((len(architecture.groups), len(self._places)))
        self._starts = np.zeros(len(self._places))
        for axis, index in self._places.items():
            for s in axis.segments:
                if s.group < 0:
                    self._starts[index] += s.length
                else:
                    self._slopes[s.group, index] += s.length / architecture.groups[s.group].size
        self._read_positions = np.array([n.reads.positions for n in self._layers], float)
        self._make_positions = np.array([n.makes.positions for n in self._layers], float)
        self._positions = np.array([n.positions for n in self._layers], float)
        self._value_positions = np.array([v.positions for v in architecture.activations], float)
        self._kernels = np.array([n.kernel for n in self._layers], float)
        self._strides = np.array([n.stride for n in self._layers], float)
        self._weighted = np.array([bool(n.weight) for n in self._layers], bool)
        self._depthwise = np.array([_kind(n) == "depthwise" for n in self._layers], bool)
        # The first layer with weights reads the model's input.
        self._first = int(np.argmax(self._weighted)) if self._weighted.any() else -1
        self._training = np.array([_INDEX[_training_kind(n)] for n in self._layers], int)
        self._inference = np.array([_inference_kind(self._layers, i) for i in range(len(self._layers))], int)

    def _factors(self, axes: Sequence[Axis]) -> list[int]:
        return [self._places.setdefault(a, len(self._places)) for a in axes]

    def sizes(self, widths: npt.ArrayLike) -> Numbers:
        """Lengths of all axes, [n, axes], at widths [n, groups]."""
        return np.rint(np.atleast_2d(np.asarray(widths, float)) @ self._slopes + self._starts)

    def macs(self, widths: npt.ArrayLike) -> Numbers:
        """MACs of one sample's forward pass, per row: [n, rows]."""
        sizes = self.sizes(widths)
        return self._macs(sizes, *self._elements(sizes))

    def forward_macs(self, widths: npt.ArrayLike) -> Numbers:
        """MACs of one sample's forward pass, all layers: [n]."""
        return np.asarray(self.macs(widths).sum(1))

    def contents(self, widths: npt.ArrayLike) -> tuple[Numbers, Numbers]:
        """Elements of one sample's activations, and of all tensors: [n] each."""
        sizes = self.sizes(widths)
        return (sizes[:, self._values].prod(-1) * self._value_positions).sum(1), sizes[:, self._tensors].prod(-1).sum(1)

    def _elements(self, sizes: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        reads = sizes[:, self._reads].prod(-1) * self._read_positions
        makes = sizes[:, self._makes].prod(-1) * self._make_positions
        return reads, makes, np.where(self._weighted, sizes[:, self._weights].prod(-1), 0)

    def _macs(self, sizes: Numbers, reads: Numbers, makes: Numbers, weights: Numbers) -> Numbers:
        products = np.where(self._training == _INDEX["product"], makes * sizes[:, self._inner].prod(-1), 0)
        return np.asarray(np.where(self._weighted, weights * self._positions, products))

    def training(self, widths: npt.ArrayLike, batch: int) -> Numbers:
        """The work of training steps per widths, kind and feature: [n, kinds × features]; `widths` are [n, groups]."""
        return self._counted(_frozen(widths), batch, 0)

    def inference(self, widths: npt.ArrayLike, batch: int, block: int) -> Numbers:
        """The work of predictions, as `training` gives it; a blocked kernel computes `block` channels at once."""
        return self._counted(_frozen(widths), batch, block)

    def _count(self, widths: tuple[tuple[float, ...], ...], batch: int, block: int) -> Numbers:
        """The work of predictions, or of training steps where `block` is 0."""
        work = self._inference_work(widths, batch, block) if block else self._training_work(widths, batch)
        work.setflags(write=False)
        return work

    def _training_work(self, widths: npt.ArrayLike, batch: int) -> Numbers:
        sizes = self.sizes(widths)
        reads, makes, weights = self._elements(sizes)
        macs = self._macs(sizes, reads, makes, weights)
        if self._first >= 0:
            macs[:, self._first] *= 2 / 3  # the gradient of the model's input isn't needed
        # Every output reads a window of its input: an element goes in once per tap, and less often by the stride.
        taps = np.where((self._kernels > 1) & self._weighted, self._kernels / self._strides, 1.0)
        # A depthwise layer's input gradient is as large as its input, whatever the stride.
        taps = np.where(self._depthwise, self._kernels, taps)
        large_maps = self._positions >= LARGE_MAP
        # A call falls into a part per sample and, on large maps, per tap.
        parts = np.where(self._weighted, batch * np.where(large_maps, self._kernels, 1.0), 0.0)
        parts = np.broadcast_to(parts, macs.shape)
        ones = np.ones_like(macs)
        rows = np.stack([ones, parts, macs * batch, (reads * taps + makes) * batch, weights], -1)
        return self._gather(rows, np.broadcast_to(self._training, macs.shape))

    def _inference_work(self, widths: npt.ArrayLike, batch: int, block: int) -> Numbers:
        sizes = self.sizes(widths)
        reads, makes, weights = self._elements(sizes)
        macs = self._macs(sizes, reads, makes, weights) * batch
        out, inner = sizes[:, self._outs].prod(-1), sizes[:, self._inners].prod(-1)
        kinds = np.broadcast_to(self._inference, macs.shape).copy()
        plain = self._plain(kinds, inner, out, block)
        padding = _filled(out, block) * np.where(inner >= block, _filled(inner, block), 1.0)
        convolutions = np.isin(self._inference, _CONVOLUTIONS)
        # A blocked kernel computes whole blocks, also of channels that aren't there.
        padding_factor = np.where(plain, 1.0, np.where(convolutions, padding, _filled(out, block)))
        positions = np.maximum(self._positions, 1)
        tile_factor = np.where(plain, np.ceil(positions / TILE) * TILE / positions, 1.0)
        macs = np.where(
            convolutions, macs * padding_factor * tile_factor, np.where(self._depthwise, macs * padding_factor, macs)
        )
        # Plain kernels lay out every window of their input first.
        taps = np.where(plain & (self._kernels > 1) & (kinds == _INDEX["conv"]), self._kernels / self._strides, 1.0)
        small = self._positions < LARGE_MAP
        for blocked, plain_kind in _PLAIN.items():
            is_plain_kind = plain & (kinds == _INDEX[blocked])
            kinds[is_plain_kind & ~small] = _INDEX[plain_kind]
            kinds[is_plain_kind & small] = _INDEX.get(f"{plain_kind}-small", _INDEX[plain_kind])
        moved_elements = (reads * taps + makes) * batch
        rows = np.stack([np.ones_like(macs), np.zeros_like(macs), macs, moved_elements, weights], -1)
        return self._gather(np.where((kinds >= 0)[..., None], rows, 0.0), np.maximum(kinds, 0))

    @staticmethod
    def _plain(kinds: npt.NDArray[np.int64], inner: Numbers, out: Numbers, block: int) -> npt.NDArray[np.bool_]:
        """Whether onnxruntime can't use its blocked kernels, per widths and layer."""
        dense_kinds = np.isin(kinds, [_INDEX["conv"], _INDEX["conv1x1"]])
        # Less than a block of input channels (an image's) has a kernel of its own.
        misaligned = (inner >= block) & (inner % ALIGNMENT > 0)
        misaligned_depthwise = (kinds == _INDEX["depthwise"]) & (out % ALIGNMENT > 0)
        return np.asarray((dense_kinds & misaligned) | misaligned_depthwise)

    def _gather(self, rows: Numbers, kinds: npt.NDArray[np.int64]) -> Numbers:
        """Sums of rows by kind, with one "run" for the whole graph."""
        sums = np.zeros((len(rows), len(KINDS), len(FEATURES)))
        for k in range(len(KINDS) - 1):
            mask = kinds == k
            if mask.any():
                sums[:, k] = np.where(mask[..., None], rows, 0.0).sum(1)
        sums[:, -1, 0] = 1
        return sums.reshape(len(sums), -1)


_CONVOLUTIONS = [_INDEX["conv"], _INDEX["conv1x1"]]
_PLAIN = {"conv": "conv-plain", "conv1x1": "conv1x1-plain", "depthwise": "depthwise-plain"}


def _filled(channels: Numbers, block: int) -> Numbers:
    """The factor by which channels grow when they fill whole blocks."""
    return np.asarray(np.ceil(channels / block) * block / np.maximum(channels, 1))


def workload(architecture: Architecture) -> Workload:
    """The workload of an architecture; the last few are remembered."""
    return _remembered(ArchitectureKey(architecture))


class ArchitectureKey:
    """An architecture, compared by its digest."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def __hash__(self) -> int:
        return hash(self.architecture.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ArchitectureKey) and other.architecture.digest == self.architecture.digest


@lru_cache(maxsize=8)
def _remembered(key: ArchitectureKey) -> Workload:
    return Workload(key.architecture)


def _frozen(widths: npt.ArrayLike) -> tuple[tuple[float, ...], ...]:
    return tuple(map(tuple, np.atleast_2d(np.asarray(widths, float)).tolist()))


def _table(rows: list[list[int]]) -> npt.NDArray[np.int64]:
    """Rows of axis numbers, filled up with axis 0, which is 1 long."""
    width = max((len(r) for r in rows), default=0) or 1
    return np.array([r + [0] * (width - len(r)) for r in rows], np.int64).reshape(len(rows), width)


def _training_kind(layer: Layer) -> str:
    kind = _kind(layer)
    if kind == "conv":
        if layer.positions <= TINY_MAP and layer.kernel > 1:
            return "conv-tiny"
        kind = "conv" if layer.kernel > 1 else "conv1x1"
    if kind in ("conv", "conv1x1", "depthwise"):
        return kind if layer.positions >= LARGE_MAP else f"{kind}-small"
    return kind


def _inference_kind(layers: Sequence[Layer], index: int) -> int:
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
        if former_layer.op in ("Conv", "Gemm") and former_layer.makes == layer.makes:
            return -1
    return _INDEX[kind]


def _kind(layer: Layer) -> str:
    op = layer.op
    if op == "Conv":
        if layer.groups == 1:
            return "conv"
        return "depthwise" if prod([a.length for a in layer.makes.axes]) == layer.groups else "grouped"
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
