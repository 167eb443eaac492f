"""Folding: batch norms become part of the weights of the layers before them.

At inference a batch norm is y = a · x + b per channel, with a = scale / √(var + ε) and b = bias − a · mean. After a
layer y = W x + c that is the layer with the weights a · W and the bias a · c + b.

The passes of this package edit a `LoweredPair`: the graph that a board runs, and the `prepare` graph that makes its
tensors from float32 weights after every round.
"""

from __future__ import annotations

from fedprune_export.ir.graph import Node
from fedprune_export.precision.lowered_pair import LoweredPair

# The axis of a weight that its output channels are on.
_CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}


def channel_axis(node: Node) -> int:
    """The axis of a layer's weight that its output channels are on."""
    return 0 if node.op == "Gemm" and node.attrs.get("transB", 0) else _CHANNEL_AXES[node.op]


def fold_norms(pair: LoweredPair) -> None:
    """Fold every batch norm that is the only reader of a layer with weights; others stay."""
    nodes: list[Node] = []
    producers, consumers = pair.graph.producers(), pair.graph.consumers()
    for node in pair.graph.nodes:
        layer = producers.get(node.inputs[0]) if node.inputs else None
        if layer is not None and len(consumers[node.inputs[0]]) == 1 and _is_foldable(pair, layer, node):
            _fold_norm(pair, layer, node)
        else:
            nodes.append(node)
    pair.graph.nodes = nodes


def _is_foldable(pair: LoweredPair, layer: Node, norm: Node) -> bool:
    """Whether a node is a norm that can be folded into the layer before it."""
    if norm.op != "BatchNormalization" or norm.domain or norm.attrs.get("training_mode", 0):
        return False
    # Another reader, or the model's output, needs the layer's values before the norm.
    if layer.domain or layer.op not in _CHANNEL_AXES or norm.inputs[0] in pair.output_names():
        return False
    if not pair.is_tensor(layer.inputs[1]) or (layer.op == "ConvTranspose" and layer.attrs.get("group", 1) != 1):
        return False
    shape = pair.shape(layer.inputs[1])
    if layer.op in ("Gemm", "MatMul"):
        is_unscaled = layer.attrs.get("alpha", 1.0) == layer.attrs.get("beta", 1.0) == 1.0
        output = pair.shape(norm.inputs[0])
        if not is_unscaled or output is None or shape is None or len(output) != 2 or len(shape) != 2:
            return False
    norm_inputs = [*norm.inputs[1:], *layer.inputs[2:3]]
    are_constant = all(pair.is_tensor(i) or i in pair.graph.initializers for i in norm_inputs if i)
    has_flat_bias = layer.op != "Gemm" or len(layer.inputs) < 3 or len(pair.shape(layer.inputs[2]) or ()) == 1
    return shape is not None and are_constant and has_flat_bias


def _fold_norm(pair: LoweredPair, layer: Node, norm: Node) -> None:
    """Give the layer folded weights, and the norm's output."""
    prepare = pair.prepare
    scale, bias, mean, variance = (pair.prepared_value(i) for i in norm.inputs[1:5])
    weight = layer.inputs[1]
    rank = len(pair.shape(weight) or ())
    epsilon = prepare.scalar(float(norm.attrs.get("epsilon", 1e-5)))
    factor = prepare.emit("Div", scale, prepare.emit("Sqrt", prepare.emit("Add", variance, epsilon)))
    spread = [1] * rank
    spread[channel_axis(layer)] = -1
    folded = prepare.emit("Mul", pair.prepared_value(weight), prepare.emit("Reshape", factor, prepare.ints(*spread)))
    centred = prepare.emit("Neg", mean)
    if len(layer.inputs) > 2 and layer.inputs[2]:
        centred = prepare.emit("Sub", pair.prepared_value(layer.inputs[2]), mean)
    shift = prepare.emit("Add", prepare.emit("Mul", centred, factor), bias)
    value = norm.outputs[0]
    new_weight = pair.define_tensor(f"{value}~folded", folded, like=weight)
    new_bias = pair.define_tensor(f"{value}~shift", shift, like=norm.inputs[1])
    # A MatMul has no bias.
    if layer.op == "MatMul":
        layer.op = "Gemm"
    layer.inputs = [layer.inputs[0], new_weight, new_bias]
    layer.outputs = [value]
