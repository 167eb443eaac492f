"""Lowers a model to float16 or int8: the graph that a board runs, and the graphs that make its tensors.

Weights change after every round, and a board converts them itself. Here passes over the graph fold its norms
(`folding`), and then convert it to float16 or quantise it (`quantisation_plan`). Inputs and outputs stay float32. Which
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
from onnx import TensorProto

from fedprune.core.errors import ModelError
from fedprune.runtime.precision import RANGES, pack_graphs, prepare_tensors
from fedprune.runtime.precision_files import PRECISIONS, calibrate_file, graph_file, prepare_file, weights_file
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Node, Port
from fedprune_export.precision.lowered_pair import LoweredPair, node_text
from fedprune_export.precision.quantisation_plan import QuantisationPlan, calibration_graph, plan_quantisation
from fedprune_export.pruning.model import Model

# The axis of a weight that its output channels are on.
_CHANNEL_AXES = {"Conv": 0, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}

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
    pair = LoweredPair(model, widths)
    fold_norms(pair)
    stays: list[str] = []
    calibrate, plan = None, QuantisationPlan()
    if precision == "float16":
        stays = convert_to_float16(pair)
    elif precision == "int8":
        use_quantisable_forms(pair)
        plan = plan_quantisation(pair, keep)
        if not plan.layers:
            raise ModelError(
                f"no layer of {model.architecture.name} can be computed with 8 bits",
                expected="a convolution, or a product with a weight of two axes",
                hint="Leave int8 out of --precision.",
            )
        calibrate = calibration_graph(model, widths, plan)
        stays = quantise(pair, plan)
    pair.finish()
    return _serialise(pair, precision, calibrate, plan, tuple(stays))


def _serialise(
    pair: LoweredPair, precision: str, calibrate: bytes | None, plan: QuantisationPlan, stays: tuple[str, ...]
) -> Lowered:
    """Write the graphs as bytes."""
    # Types and shapes of the tensors are seen by a run of the prepare graph on zeros: exact, and simpler than
    # inference.
    rows = sum(p.name == RANGES and int(p.shape[0] or 0) for p in pair.prepare.inputs)
    ranges = np.zeros((rows, 2), np.float32) if precision == "int8" else None
    outputs = prepare_tensors(OnnxSession(pair.prepare.to_bytes()), pair.zero_weights(), ranges)
    tensors = {n: v for n, v in outputs.items() if n != RANGES}
    return Lowered(
        precision=precision,
        graph=pair.graph_bytes(outputs, weights_file(precision)),
        prepare=pair.prepare_bytes(tensors),
        calibrate=calibrate,
        activations=tuple(plan.values),
        layers=tuple(plan.layers),
        float32_nodes=stays,
    )


def convert_to_float16(pair: LoweredPair) -> list[str]:
    """Let a graph compute in float16. Returns the nodes that stay in float32."""
    writer = _Float16Writer(pair)
    nodes, pair.graph.nodes = pair.graph.nodes, []
    return [node_text(n) for n in nodes if not writer.add_node(n)]


class _Float16Writer:
    """Writes the nodes of a graph again, one after the other, with the casts that they need."""

    def __init__(self, pair: LoweredPair) -> None:
        self._pair, self._graph = pair, pair.graph
        self._output_names = pair.output_names()
        self._half_names: dict[str, str] = {}
        self._cast_back: set[str] = set()
        self._computed_in_half: set[str] = set()

    def add_node(self, node: Node) -> bool:
        """Append a node with the casts that it needs; returns False if it computes floats in float32."""
        floats = [self._pair.is_float(o) for o in node.outputs if o]
        reads = [i for i in node.inputs if i and self._is_float(i)]
        if node.op not in _FLOAT16_OPERATORS or node.domain or not reads or not floats or not all(floats):
            node.inputs = [self._as_float32(i) if i in reads else i for i in node.inputs]
            self._graph.nodes.append(node)
            return not reads or not any(floats)
        node.inputs = [self._as_float16(i) if i in reads else i for i in node.inputs]
        names = [o for o in node.outputs if o]
        node.outputs = [f"{o}~float16" if o else o for o in node.outputs]
        self._half_names |= {n: f"{n}~float16" for n in names}
        self._computed_in_half.update(names)
        self._graph.nodes.append(node)
        # The model's outputs stay float32: their readers need not know the precision.
        for name in self._output_names.intersection(names):
            self._as_float32(name)
        return True

    def _is_float(self, name: str) -> bool:
        constant = self._graph.initializers.get(name)
        if constant is not None:
            return bool(constant.dtype == np.float32)
        return self._pair.is_tensor(name) or self._pair.is_float(name)

    def _as_float16(self, name: str) -> str:
        """A value in float16."""
        if name in self._half_names:
            return self._half_names[name]
        half_name = self._half_names[name] = f"{name}~float16"
        if name in self._graph.initializers:
            value = np.clip(self._graph.initializers[name], -_MAX_FLOAT16, _MAX_FLOAT16)
            self._graph.initializers[half_name] = value.astype(np.float16)
        elif self._pair.is_tensor(name):
            prepare = self._pair.prepare
            # Numbers that are too large become the largest, not infinite. The trial of the finished model shows whether
            # that harms.
            prepared_name = self._pair.prepared_value(name)
            bounded = prepare.emit("Clip", prepared_name, prepare.scalar(-_MAX_FLOAT16), prepare.scalar(_MAX_FLOAT16))
            half = prepare.emit("Cast", bounded, attrs={"to": TensorProto.FLOAT16})
            self._pair.define_tensor(half_name, half, np.float16)
        else:
            self._graph.emit("Cast", name, attrs={"to": TensorProto.FLOAT16}, out=half_name)
        return half_name

    def _as_float32(self, name: str) -> str:
        """A value in float32, under its own name."""
        if name in self._computed_in_half and name not in self._cast_back:
            self._cast_back.add(name)
            self._graph.emit("Cast", self._half_names[name], attrs={"to": TensorProto.FLOAT}, out=name)
            self._graph.nodes[-1].name = f"{name}~float32"  # the node that made the value may be called like it
        return name


def quantise(pair: LoweredPair, plan: QuantisationPlan) -> list[str]:
    """Let a graph with folded norms compute with 8 bits; `prepare` then has the input `RANGES` [n, 2]: the least and
    the greatest number of each of `plan.values`.

    Returns the nodes with weights that stay in float32.
    """
    graph = pair.graph
    _define_scales(pair, plan)
    nodes, graph.nodes = graph.nodes, []
    rounded_names = {p.name: _emit_rounding(pair, p.name, plan) for p in graph.inputs if p.name in plan.scale_owners}
    float_layers = []
    for node in nodes:
        if node.outputs[0] in plan.layers:
            _quantise_layer(pair, node, plan)
        elif any(pair.is_tensor(i) for i in node.inputs if i):
            float_layers.append(node_text(node))
        node.inputs = [rounded_names.get(i, i) for i in node.inputs]
        graph.nodes.append(node)
        rounded_names |= {o: _emit_rounding(pair, o, plan) for o in node.outputs if o in plan.scale_owners}
    return float_layers


def _define_scales(pair: LoweredPair, plan: QuantisationPlan) -> None:
    """Scale and zero point of every value of the plan, from the ranges."""
    prepare = pair.prepare
    prepare.inputs.append(Port(RANGES, np.dtype(np.float32), (len(plan.values), 2)))
    zero = prepare.scalar(0)
    # 0 must be exact, so that every range must contain it: borders are padded with 0, and clamps end there.
    low = prepare.emit("Min", prepare.emit("Gather", RANGES, prepare.constant(0, np.int64), attrs={"axis": 1}), zero)
    high = prepare.emit("Max", prepare.emit("Gather", RANGES, prepare.constant(1, np.int64), attrs={"axis": 1}), zero)
    span = prepare.emit("Div", prepare.emit("Sub", high, low), prepare.scalar(255))
    scale = prepare.emit("Max", span, prepare.scalar(_MIN_SCALE))
    zero_point = prepare.emit("Round", prepare.emit("Div", prepare.emit("Neg", low), scale))
    zero_point = prepare.emit(
        "Cast", prepare.emit("Clip", zero_point, zero, prepare.scalar(255)), attrs={"to": TensorProto.UINT8}
    )
    for row, name in enumerate(plan.values):
        index = prepare.constant(row, np.int64)
        pair.define_tensor(f"{name}~scale", prepare.emit("Gather", scale, index, out=f"{name}~scale"))
        pair.define_tensor(f"{name}~zero", prepare.emit("Gather", zero_point, index, out=f"{name}~zero"), np.uint8)


def _emit_rounding(pair: LoweredPair, name: str, plan: QuantisationPlan) -> str:
    """A value rounded to 8 bits."""
    scale, zero = f"{plan.scale_owners[name]}~scale", f"{plan.scale_owners[name]}~zero"
    return pair.graph.emit("DequantizeLinear", pair.graph.emit("QuantizeLinear", name, scale, zero), scale, zero)


def _quantise_layer(pair: LoweredPair, node: Node, plan: QuantisationPlan) -> None:
    """Give a layer 8-bit weights round(w / s) and an int32 bias round(b / (s · input scale)): s = max|w| / 127 per
    output channel, or more where the bias would exceed an int32."""
    prepare, graph = pair.prepare, pair.graph
    stem, axis = node.outputs[0], channel_axis(node)
    shape = pair.shape(node.inputs[1]) or ()
    weight = pair.prepared_value(node.inputs[1])
    bias = pair.prepared_value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else ""
    axes = [i for i in range(len(shape)) if i != axis]
    largest = prepare.emit("ReduceMax", prepare.emit("Abs", weight), attrs={"axes": axes, "keepdims": 0})
    scale = prepare.emit("Max", prepare.emit("Div", largest, prepare.scalar(127)), prepare.scalar(_MIN_SCALE))
    input_scale = pair.prepared_value(f"{plan.scale_owners[node.inputs[0]]}~scale")
    if bias:
        # A bias exceeds an int32 at the scale of weights that are almost zero.
        min_scale = prepare.emit(
            "Div", prepare.emit("Abs", bias), prepare.emit("Mul", input_scale, prepare.scalar(2.0**30))
        )
        scale = prepare.emit("Max", scale, min_scale)
    zeros = prepare.emit("ConstantOfShape", prepare.emit("Shape", scale), attrs={"value": np.zeros(1, np.int8)})
    numbers = prepare.emit("QuantizeLinear", weight, scale, zeros, attrs={"axis": axis})
    node.inputs[1] = graph.emit(
        "DequantizeLinear",
        pair.define_tensor(f"{stem}~weight", numbers, np.int8),
        pair.define_tensor(f"{stem}~scales", scale),
        graph.constant(np.zeros(shape[axis]), np.int8),
        attrs={"axis": axis},
    )
    if bias:
        product = prepare.emit("Mul", scale, input_scale)
        rounded_bias = prepare.emit(
            "Cast", prepare.emit("Round", prepare.emit("Div", bias, product)), attrs={"to": TensorProto.INT32}
        )
        node.inputs[2] = graph.emit(
            "DequantizeLinear",
            pair.define_tensor(f"{stem}~bias", rounded_bias, np.int32),
            pair.define_tensor(f"{stem}~product", product),
            attrs={"axis": 0},
        )


def use_quantisable_forms(pair: LoweredPair) -> None:
    """Replace operators by equal ones that have an 8-bit form."""
    graph = pair.graph
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        shape = pair.shape(node.inputs[0]) if node.inputs else None
        axes = [a % 4 for a in node.attrs.get("axes") or []]
        is_of_maps = shape is not None and len(shape) == 4 and sorted(axes) == [2, 3]
        if node.op == "Flatten" and not node.domain and node.attrs.get("axis", 1) == 1 and shape is not None:
            # The size is written out: for an empty batch Reshape couldn't infer it.
            graph.emit("Reshape", node.inputs[0], graph.ints(0, math.prod(shape[1:])), out=node.outputs[0])
        elif node.op == "ReduceMean" and not node.domain and is_of_maps and bool(node.attrs.get("keepdims", 1)):
            graph.emit("GlobalAveragePool", node.inputs[0], out=node.outputs[0])
        else:
            graph.nodes.append(node)


def channel_axis(node: Node) -> int:
    """The axis of a layer's weight that its output channels are on."""
    return 0 if node.op == "Gemm" and node.attrs.get("transB", 0) else _CHANNEL_AXES[node.op]


def fold_norms(pair: LoweredPair) -> None:
    """Fold every batch norm that is the only reader of a layer with weights; others stay.

    At inference a batch norm is y = a · x + b per channel, with a = scale / √(var + ε) and b = bias − a · mean. After a
    layer y = W x + c that is the layer with the weights a · W and the bias a · c + b."""
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
