"""Lowers a model to float16 or int8: the graph that a board runs, and the graphs that make its tensors.

Weights change after every round, and a board converts them itself. Here passes over one graph (`lowered_graph`) fold
its norms, and then convert it to float16 or quantise it (`quantisation_plan`). Inputs and outputs stay float32. Which
type an operator computes in is written into the graph (it is strongly typed), so that every runtime computes the same.

int8 is written as pairs of QuantizeLinear and DequantizeLinear, which onnxruntime fuses with the operators between. A
value v of an activation is q = clip(round(v / s) + z, 0, 255), unsigned with a zero point, one scale per tensor;
weights are signed, symmetric and have a scale per output channel; a bias is int32 at the product of both scales. For
this combination onnxruntime has kernels on all processors that boards have: VNNI and AMX on x86, dot product and matrix
instructions on Arm (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto

from fedprune.core.errors import ModelError
from fedprune.runtime.precision import RANGES, pack_graphs, prepare_tensors
from fedprune.runtime.precision_files import PRECISIONS, calibrate_file, graph_file, prepare_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune_export.bundles.inference import refer_to_files, zero_weights
from fedprune_export.channels.cost_table import channel_axis
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.precision.lowered_graph import LoweredGraph, is_layer, node_text
from fedprune_export.precision.quantisation_plan import QuantisationPlan, calibration_graph, plan_quantisation
from fedprune_export.pruning.model import Model

# Operators that compute in float16.
_FLOAT16_OPERATORS = frozenset(
    {
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "MaxPool", "AveragePool"),
        *("Add", "Sub", "Mul", "Max", "Min", "Clip", "Abs", "Neg"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "HardSigmoid", "HardSwish", "Sigmoid", "Tanh"),
        *("Concat", "Split", "Slice", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity"),
        *("Expand", "Gather", "Pad", "Tile", "Where", "DepthToSpace", "SpaceToDepth"),
    }
)

_MAX_FLOAT16 = float(np.finfo(np.float16).max)

# The scale of values that are always zero: a scale of 0 would make 0 / 0.
_MIN_SCALE = 1e-12


@dataclass(frozen=True)
class Lowered:
    """The graphs of one precision.

    Attributes:
        graph: The inference graph; its tensors are external data in the file
            `fedprune.runtime.precision_files.weights_file`.
        prepare: The graph from float32 weights, and for int8 ranges of activations, to these tensors.
        calibrate: The graph from a batch of samples to ranges of activations; None where none are needed.
        activations: Names of the activations with ranges, in the order of the ranges; empty where none are needed.
        layers: Outputs of the layers that compute with 8 bits, in order.
        float32_nodes: Descriptions of the nodes that stay in float32; empty for precision "float32".
    """

    precision: str
    graph: bytes
    prepare: bytes
    calibrate: bytes | None
    activations: tuple[str, ...]
    layers: tuple[str, ...]
    float32_nodes: tuple[str, ...]

    @property
    def files(self) -> dict[str, bytes]:
        p = self.precision
        files = {graph_file(p): self.graph, prepare_file(p): self.prepare}
        return files if self.calibrate is None else {**files, calibrate_file(p): self.calibrate}

    @property
    def packed(self) -> bytes:
        """The graphs as they travel to a board."""
        return pack_graphs(self.files)


def lower(model: Model, widths: Sequence[int], precision: str, *, keep: Collection[str] = ()) -> Lowered:
    """Lower a submodel. The result depends on widths alone, not on weights.

    `precision`: one of `fedprune.runtime.precision_files.PRECISIONS`; `keep`: with int8, outputs of layers that stay in
    float32. Raises `BundleError`: the widths don't fit the architecture. `ModelError`: there is no such precision, or
    nothing of the model can be computed with 8 bits.
    """
    if precision not in PRECISIONS:
        raise ModelError("precision", expected=" or ".join(PRECISIONS), got=precision)
    if model.base is not None:
        raise ModelError(
            f"precision {precision!r} of a model whose frozen weights are in {model.base.precision} already",
            hint="Leave --precision (precisions) or --base (base) out.",
        )
    lowered = LoweredGraph.of(model, widths)
    fold_norms(lowered)
    stays: list[str] = []
    calibrate, plan = None, QuantisationPlan()
    if precision == "float16":
        stays = convert_to_float16(lowered)
    elif precision == "int8":
        use_quantisable_forms(lowered)
        plan = plan_quantisation(lowered, keep)
        if not plan.layers:
            raise ModelError(
                f"no layer of {model.architecture.name} can be computed with 8 bits",
                expected="a convolution, or a product with a weight of two axes",
                hint="Leave int8 out of --precision.",
            )
        calibrate = calibration_graph(model, widths, plan)
        stays = quantise(lowered, plan)
    prepare = lowered.split()
    # Types and shapes of the tensors are seen by a run of the prepare graph: exact, and simpler than inference. Not on
    # zeros, because a model may divide a weight by its length.
    untyped = prepare.to_proto()
    del untyped.graph.output[:]
    untyped.graph.output.extend(onnx.ValueInfoProto(name=p.name) for p in prepare.outputs)
    ranges = np.zeros((len(plan.values), 2), np.float32) if precision == "int8" else None
    weights = {n: np.random.default_rng(0).random(v.shape, np.float32) for n, v in zero_weights(model, widths).items()}
    tensors = prepare_tensors(OnnxSession(untyped.SerializeToString()), weights, ranges)
    prepare.outputs = [Port(p.name, tensors[p.name].dtype, (None,) * tensors[p.name].ndim) for p in prepare.outputs]
    return Lowered(
        precision=precision,
        graph=refer_to_files(lowered.graph.to_proto(), {weights_file(precision): tensors}),
        prepare=prepare.to_bytes(),
        calibrate=calibrate,
        activations=tuple(plan.values),
        layers=tuple(plan.layers),
        float32_nodes=tuple(stays),
    )


def convert_to_float16(lowered: LoweredGraph) -> list[str]:
    """Let a graph compute in float16. Returns the nodes that stay in float32."""
    graph, tensors = lowered.graph, lowered.tensors()
    nodes, graph.nodes = graph.nodes, []
    float32_nodes: list[str] = []
    half_names: dict[str, str] = {}
    for node in nodes:
        floats = [lowered.is_float(o) for o in node.outputs if o]
        reads = [i for i in node.inputs if i and lowered.is_float(i)]
        # What depends on weights alone stays exact, because it is computed only once per round.
        if not reads or not any(floats) or not tensors.isdisjoint(node.outputs):
            graph.nodes.append(node)
        elif node.op not in _FLOAT16_OPERATORS or node.domain or not all(floats):
            float32_nodes.append(node_text(node))
            graph.nodes.append(node)
        else:
            for name in reads:
                if name not in half_names:
                    half_names[name] = _emit_float16(graph, name, is_tensor=name in tensors)
            node.inputs = [half_names[i] if i in reads else i for i in node.inputs]
            graph.nodes.append(node)
            for i, name in enumerate(node.outputs):
                if name:
                    half_names[name] = node.outputs[i] = f"{name}~float16"
                    # For readers in float32, which include those of the model's outputs.
                    graph.emit("Cast", node.outputs[i], attrs={"to": TensorProto.FLOAT}, out=name)
                    graph.nodes[-1].name = f"{name}~float32"  # the node that made the value may be called like it
    return float32_nodes


def _emit_float16(graph: Graph, name: str, *, is_tensor: bool) -> str:
    """A value in float16. Weights and constants that are too large become the largest number, not infinite: the trial
    of the finished model shows whether that harms."""
    half_name = f"{name}~float16"
    if name in graph.initializers:
        value = np.clip(graph.initializers[name], -_MAX_FLOAT16, _MAX_FLOAT16)
        graph.initializers[half_name] = value.astype(np.float16)
        return half_name
    if is_tensor:
        name = graph.emit("Clip", name, graph.scalar(-_MAX_FLOAT16), graph.scalar(_MAX_FLOAT16))
    return graph.emit("Cast", name, attrs={"to": TensorProto.FLOAT16}, out=half_name)


def quantise(lowered: LoweredGraph, plan: QuantisationPlan) -> list[str]:
    """Let a graph with folded norms compute with 8 bits. It then has the input `RANGES` [n, 2]: the least and the
    greatest number of each of `plan.values`.

    Returns the nodes with weights that stay in float32.
    """
    graph, tensors = lowered.graph, lowered.tensors()
    nodes, graph.nodes = graph.nodes, []
    _emit_scales(graph, plan)
    rounded_names = {p.name: _emit_rounding(graph, p.name, plan) for p in graph.inputs if p.name in plan.scale_owners}
    float_layers = []
    for node in nodes:
        if node.outputs[0] in plan.layers:
            _quantise_layer(lowered, node, plan)
        elif not tensors.isdisjoint(node.inputs) and tensors.isdisjoint(node.outputs):
            float_layers.append(node_text(node))
        node.inputs = [rounded_names.get(i, i) for i in node.inputs]
        graph.nodes.append(node)
        rounded_names |= {o: _emit_rounding(graph, o, plan) for o in node.outputs if o in plan.scale_owners}
    return float_layers


def _emit_scales(g: Graph, plan: QuantisationPlan) -> None:
    """Scale and zero point of every value of the plan, from the ranges."""
    g.add_input(RANGES, (len(plan.values), 2))
    zero = g.scalar(0)
    # 0 must be exact, so that every range must contain it: borders are padded with 0, and clamps end there.
    low = g.emit("Min", g.emit("Gather", RANGES, g.constant(0, np.int64), attrs={"axis": 1}), zero)
    high = g.emit("Max", g.emit("Gather", RANGES, g.constant(1, np.int64), attrs={"axis": 1}), zero)
    span = g.emit("Div", g.emit("Sub", high, low), g.scalar(255))
    scale = g.emit("Max", span, g.scalar(_MIN_SCALE))
    zero_point = g.emit("Round", g.emit("Div", g.emit("Neg", low), scale))
    zero_point = g.emit("Cast", g.emit("Clip", zero_point, zero, g.scalar(255)), attrs={"to": TensorProto.UINT8})
    for row, name in enumerate(plan.values):
        g.emit("Gather", scale, g.constant(row, np.int64), out=f"{name}~scale")
        g.emit("Gather", zero_point, g.constant(row, np.int64), out=f"{name}~zero")


def _emit_rounding(g: Graph, name: str, plan: QuantisationPlan) -> str:
    """A value rounded to 8 bits."""
    scale, zero = f"{plan.scale_owners[name]}~scale", f"{plan.scale_owners[name]}~zero"
    return g.emit("DequantizeLinear", g.emit("QuantizeLinear", name, scale, zero), scale, zero)


def _quantise_layer(lowered: LoweredGraph, node: Node, plan: QuantisationPlan) -> None:
    """Give a layer 8-bit weights round(w / s) and an int32 bias round(b / (s · input scale)): s = max|w| / 127 per
    output channel, or more where the bias would exceed an int32."""
    g, (value, weight, *biases) = lowered.graph, node.inputs
    stem, shape = node.outputs[0], lowered.shapes[weight]
    axis = channel_axis(node, len(shape))
    axes = [i for i in range(len(shape)) if i != axis]
    input_scale = f"{plan.scale_owners[value]}~scale"
    largest = g.emit("ReduceMax", g.emit("Abs", weight), attrs={"axes": axes, "keepdims": 0})
    scale = g.emit("Div", largest, g.scalar(127))
    if any(biases):
        # A bias exceeds an int32 at the scale of weights that are almost zero.
        min_scale = g.emit("Div", g.emit("Abs", biases[0]), g.emit("Mul", input_scale, g.scalar(2.0**30)))
        scale = g.emit("Max", scale, min_scale)
    scale = g.emit("Max", scale, g.scalar(_MIN_SCALE), out=f"{stem}~scales")
    zeros = g.emit("ConstantOfShape", g.emit("Shape", scale), attrs={"value": np.zeros(1, np.int8)})
    numbers = g.emit("QuantizeLinear", weight, scale, zeros, attrs={"axis": axis}, out=f"{stem}~weight")
    # Named after the layer: names of constants depend on which widths are equal, and one prepare graph serves them all.
    g.initializers[f"{stem}~zeros"] = np.zeros(shape[axis], np.int8)
    node.inputs[1] = g.emit("DequantizeLinear", numbers, scale, f"{stem}~zeros", attrs={"axis": axis})
    if any(biases):
        product = g.emit("Mul", scale, input_scale, out=f"{stem}~product")
        rounded = g.emit("Round", g.emit("Div", biases[0], product))
        numbers = g.emit("Cast", rounded, attrs={"to": TensorProto.INT32}, out=f"{stem}~bias")
        node.inputs[2] = g.emit("DequantizeLinear", numbers, product, attrs={"axis": 0})


def use_quantisable_forms(lowered: LoweredGraph) -> None:
    """Replace operators by equal ones that have an 8-bit form."""
    graph = lowered.graph
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        shape = lowered.shapes.get(node.inputs[0]) if node.inputs else None
        axes = [a % 4 for a in node.attrs.get("axes") or []]
        is_of_maps = shape is not None and len(shape) == 4 and sorted(axes) == [2, 3]
        if node.op == "Flatten" and not node.domain and node.attrs.get("axis", 1) == 1 and shape is not None:
            # The size is written out: for an empty batch Reshape couldn't infer it.
            graph.emit("Reshape", node.inputs[0], graph.ints(0, math.prod(shape[1:])), out=node.outputs[0])
        elif node.op == "ReduceMean" and not node.domain and is_of_maps and bool(node.attrs.get("keepdims", 1)):
            graph.emit("GlobalAveragePool", node.inputs[0], out=node.outputs[0])
        else:
            graph.nodes.append(node)


def fold_norms(lowered: LoweredGraph) -> None:
    """Fold every batch norm that is the only reader of a layer with weights; others stay.

    At inference a batch norm is y = a · x + b per channel, with a = scale / √(var + ε) and b = bias − a · mean. After a
    layer y = W x + c that is the layer with the weights a · W and the bias a · c + b."""
    graph, tensors = lowered.graph, lowered.tensors()
    producers, consumers = graph.producers(), graph.consumers()
    layers = {
        node.outputs[0]: layer
        for node in graph.nodes
        if node.op == "BatchNormalization"
        and (layer := producers.get(node.inputs[0])) is not None
        and len(consumers[node.inputs[0]]) == 1
        and _is_foldable(lowered, layer, node, tensors)
    }
    folded_values = {layer.outputs[0] for layer in layers.values()}
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        if node.outputs[0] in layers:
            _fold_norm(lowered, layers[node.outputs[0]], node)
        elif node.outputs[0] not in folded_values:
            graph.nodes.append(node)


def _is_foldable(lowered: LoweredGraph, layer: Node, norm: Node, tensors: Collection[str]) -> bool:
    """Whether a norm can be folded into the node before it."""
    if norm.domain or norm.attrs.get("training_mode", 0) or not is_layer(lowered, layer, tensors):
        return False
    # The model's output needs the layer's values before the norm.
    if norm.inputs[0] in lowered.output_names() or (layer.op == "ConvTranspose" and layer.attrs.get("group", 1) != 1):
        return False
    is_matrix = len(lowered.shapes.get(norm.inputs[0], ())) == 2
    are_constant = all(i in tensors or i in lowered.graph.initializers for i in norm.inputs[1:])
    return are_constant and (is_matrix or layer.op not in ("Gemm", "MatMul"))


def _fold_norm(lowered: LoweredGraph, layer: Node, norm: Node) -> None:
    """Append the layer with folded weights in the norm's place."""
    g, (weight, *biases), value = lowered.graph, layer.inputs[1:], norm.outputs[0]
    scale, bias, mean, variance = norm.inputs[1:5]
    epsilon = g.scalar(float(norm.attrs.get("epsilon", 1e-5)))
    factor = g.emit("Div", scale, g.emit("Sqrt", g.emit("Add", variance, epsilon)))
    spread = [1] * len(lowered.shapes[weight])
    spread[channel_axis(layer, len(spread))] = -1
    folded = g.emit("Mul", weight, g.emit("Reshape", factor, g.ints(*spread)), out=f"{value}~folded")
    centred = g.emit("Sub", biases[0], mean) if any(biases) else g.emit("Neg", mean)
    shift = g.emit("Add", g.emit("Mul", centred, factor), bias, out=f"{value}~shift")
    for name, like in ((folded, weight), (shift, bias)):
        lowered.shapes[name], lowered.dtypes[name] = lowered.shapes[like], lowered.dtypes[like]
    # A MatMul has no bias.
    layer.op = "Gemm" if layer.op == "MatMul" else layer.op
    layer.inputs, layer.outputs = [layer.inputs[0], folded, shift], [value]
    g.nodes.append(layer)
