"""Sorts a model's operators into kinds of kernels, each of which has times of its own on a board."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from fedprune.model.architecture import LayerRow

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

KIND_INDEX = {kind: i for i, kind in enumerate(KINDS)}

CONVOLUTION_KINDS = [KIND_INDEX["conv"], KIND_INDEX["conv1x1"]]
PLAIN_KIND_OF = {"conv": "conv-plain", "conv1x1": "conv1x1-plain", "depthwise": "depthwise-plain"}


def training_kind(layer: LayerRow) -> str:
    """The kind of a training step's kernel: convolutions differ by the size of their maps."""
    kind = kind_of(layer)
    if kind == "conv":
        if layer.positions <= MAX_TINY_MAP and layer.kernel > 1:
            return "conv-tiny"
        kind = "conv" if layer.kernel > 1 else "conv1x1"
    if kind in ("conv", "conv1x1", "depthwise"):
        return kind if layer.positions >= MIN_LARGE_MAP else f"{kind}-small"
    return kind


def inference_kind(layers: Sequence[LayerRow], index: int) -> int:
    """The index in `KINDS` of a prediction's kernel; -1 for a layer that onnxruntime fuses into the one before it."""
    layer = layers[index]
    kind = kind_of(layer)
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
    return KIND_INDEX[kind]


def kind_of(layer: LayerRow) -> str:
    """The kind by the layer's operator only."""
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
