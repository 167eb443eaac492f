"""int8, as pairs of QuantizeLinear and DequantizeLinear that onnxruntime fuses with the operators between them.

A value v of an activation is q = clip(round(v / s) + z, 0, 255), unsigned with a zero point, one scale per tensor;
weights are signed, symmetric and have a scale per output channel; a bias is int32 at the product of both scales. For
this combination onnxruntime has kernels on all processors that boards have: VNNI and AMX on x86, dot product and matrix
instructions on Arm (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).

Layers with weights are quantised first. Operators between two of them are quantised if all their inputs are already;
everything else stays in float32.

A `LoweredPair` (`weight_prep`) is the graph that a board runs and the graph that prepares its tensors.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from fedprune.runtime.precision import RANGES
from fedprune_export.bundles.inference import refer_to_weights
from fedprune_export.ir.graph import Node, Port
from fedprune_export.precision.folding import channel_axis
from fedprune_export.precision.half import node_text
from fedprune_export.precision.weight_prep import LoweredPair
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model


def calibration_graph(model: Model, widths: Sequence[int], plan: QuantisationPlan) -> bytes:
    """The inference graph with the smallest and largest numbers of activations as its output, float32 [n, 2].

    Its weights are those of the inference graph, in the same file. Raises `BundleError` if the widths don't fit the
    architecture. `plan`: which activations, in this order.
    """
    graph = at_widths(model, widths)
    rows = []
    for name in plan.values:
        bounds = [graph.emit(op, name, attrs={"keepdims": 0}) for op in ("ReduceMin", "ReduceMax")]
        row = graph.emit("Concat", *(graph.emit("Unsqueeze", b, graph.ints(0)) for b in bounds), attrs={"axis": 0})
        rows.append(graph.emit("Unsqueeze", row, graph.ints(0)))
    graph.emit("Concat", *rows, out=RANGES, attrs={"axis": 0})
    graph.outputs = [Port(RANGES, np.dtype(np.float32), (len(rows), 2))]
    graph.prune()
    return refer_to_weights(graph.to_proto(), model.architecture.shapes(widths))


_QUANTISABLE_LAYERS = frozenset({"Conv", "Gemm", "MatMul"})
# A clamp after a layer costs nothing: the range of its output ends where the clamp does, and rounding clamps.
_CLAMPING_OPERATORS = frozenset({"Relu", "Clip"})

# Operators whose output holds numbers of their input, and so has its scale.
_REARRANGING_OPERATORS = frozenset({"MaxPool", "Reshape", "Transpose", "Squeeze", "Unsqueeze"})

# Operators that onnxruntime computes on 8 bits; their output has a scale of its own.
_QUANTISED_OPERATORS = frozenset({"Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid"})

# The scale of values that are always zero: a scale of 0 would make 0 / 0.
_MIN_SCALE = 1e-12


@dataclass
class QuantisationPlan:
    """The parts to quantise.

    Attributes:
        values: Activations with a range of their own, in the graph's order: rows of the ranges.
        scales: Per quantised activation, the activation whose scale it has.
    """

    layers: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)
    scales: dict[str, str] = field(default_factory=dict)


def plan_quantisation(pair: LoweredPair, keep: Collection[str] = ()) -> QuantisationPlan:
    """Choose the parts of a folded graph to quantise. `keep`: outputs of layers that stay in float32."""
    plan = QuantisationPlan()
    graph, output_names = pair.graph, pair.output_names()
    consumers = graph.consumers()

    def range_source(name: str) -> str:
        """The value whose range counts: that after a clamp, if nothing else reads the one before."""
        readers = consumers.get(name, [])
        clamp = readers[0][0] if len(readers) == 1 and name not in output_names else None
        return clamp.outputs[0] if clamp is not None and clamp.op in _CLAMPING_OPERATORS and not clamp.domain else name

    ranged: set[str] = set()
    layers = [n for n in graph.nodes if _is_layer(pair, n) and n.outputs[0] not in keep]
    plan.layers = [n.outputs[0] for n in layers]
    for node in layers:
        ranged.add(node.inputs[0])
        if node.op == "Conv" and range_source(node.outputs[0]) not in output_names:
            ranged.add(range_source(node.outputs[0]))
    plan.scales = {p.name: p.name for p in graph.inputs if p.name in ranged}
    for node in graph.nodes:
        reads = [i for i in node.inputs if i and not pair.is_tensor(i) and i not in graph.initializers]
        reads_quantised = bool(reads) and not node.domain and set(reads) <= plan.scales.keys()
        floats = [i for i in node.inputs if i and pair.is_float(i)]
        is_inner = len(node.outputs) == 1 and node.outputs[0] not in output_names
        if reads_quantised and node.op in _REARRANGING_OPERATORS and is_inner:
            plan.scales[node.outputs[0]] = plan.scales[reads[0]]
            continue
        if reads_quantised and node.op in _QUANTISED_OPERATORS and set(floats) == set(reads):
            output = range_source(node.outputs[0])
            ranged |= {output} - output_names
        plan.scales |= {o: o for o in node.outputs if o in ranged}
    plan.values = [v for v in plan.scales if plan.scales[v] == v]
    return plan


def _is_layer(pair: LoweredPair, node: Node) -> bool:
    """Whether a node is a layer that has an 8-bit form here."""
    if node.domain or node.op not in _QUANTISABLE_LAYERS or not pair.is_float(node.inputs[0]):
        return False
    if pair.is_tensor(node.inputs[0]) or not pair.is_tensor(node.inputs[1]):
        return False
    shape = pair.shape(node.inputs[1])
    if shape is None or (node.op != "Conv" and len(shape) != 2):
        return False
    if node.op == "Gemm":
        is_unscaled = node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0 and not node.attrs.get(
            "transA", 0
        )
        bias = node.inputs[2] if len(node.inputs) > 2 else ""
        if not is_unscaled or (bias and len(pair.shape(bias) or ()) != 1):
            return False
    return all(pair.is_tensor(i) or i in pair.graph.initializers for i in node.inputs[2:] if i)


def quantise(pair: LoweredPair, plan: QuantisationPlan) -> list[str]:
    """Let a folded graph compute with 8 bits; its prepare graph then takes ranges [n, 2] of the plan's values.

    Returns the nodes with weights that stay in float32.
    """
    graph = pair.graph
    _define_scales(pair, plan)
    nodes, graph.nodes = graph.nodes, []
    rounded_names: dict[str, str] = {}
    for port in graph.inputs:
        if port.name in plan.scales:
            rounded_names[port.name] = _emit_rounding(pair, port.name, plan)
    stays = []
    for node in nodes:
        if node.outputs[0] in plan.layers:
            _quantise_layer(pair, node, plan)
        elif any(pair.is_tensor(i) for i in node.inputs if i):
            stays.append(node_text(node))
        node.inputs = [rounded_names.get(i, i) for i in node.inputs]
        graph.nodes.append(node)
        for name in node.outputs:
            if name in plan.scales:
                rounded_names[name] = _emit_rounding(pair, name, plan)
    return stays


def _define_scales(pair: LoweredPair, plan: QuantisationPlan) -> None:
    """Scale and zero point of every value of the plan, from the ranges."""
    make = pair.prepare
    make.inputs.append(Port(RANGES, np.dtype(np.float32), (len(plan.values), 2)))
    zero = make.scalar(0)
    # Every range must contain 0, and 0 must be exact: borders are padded with it, and clamps end there.
    low = make.emit("Min", make.emit("Gather", RANGES, make.constant(0, np.int64), attrs={"axis": 1}), zero)
    high = make.emit("Max", make.emit("Gather", RANGES, make.constant(1, np.int64), attrs={"axis": 1}), zero)
    span = make.emit("Div", make.emit("Sub", high, low), make.scalar(255))
    scale = make.emit("Max", span, make.scalar(_MIN_SCALE))
    zero_point = make.emit("Round", make.emit("Div", make.emit("Neg", low), scale))
    zero_point = make.emit(
        "Cast", make.emit("Clip", zero_point, zero, make.scalar(255)), attrs={"to": TensorProto.UINT8}
    )
    for row, name in enumerate(plan.values):
        index = make.constant(row, np.int64)
        pair.define_tensor(f"{name}~scale", make.emit("Gather", scale, index, out=f"{name}~scale"))
        pair.define_tensor(f"{name}~zero", make.emit("Gather", zero_point, index, out=f"{name}~zero"), np.uint8)


def _emit_rounding(pair: LoweredPair, name: str, plan: QuantisationPlan) -> str:
    """A value rounded to 8 bits."""
    scale, zero = f"{plan.scales[name]}~scale", f"{plan.scales[name]}~zero"
    return pair.graph.emit("DequantizeLinear", pair.graph.emit("QuantizeLinear", name, scale, zero), scale, zero)


def _quantise_layer(pair: LoweredPair, node: Node, plan: QuantisationPlan) -> None:
    """Give a layer 8-bit weights and a bias at the scale of its sums."""
    make, graph = pair.prepare, pair.graph
    stem, axis = node.outputs[0], channel_axis(node)
    shape = pair.shape(node.inputs[1]) or ()
    weight = pair.prepared_value(node.inputs[1])
    bias = pair.prepared_value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else ""
    axes = [i for i in range(len(shape)) if i != axis]
    largest = make.emit("ReduceMax", make.emit("Abs", weight), attrs={"axes": axes, "keepdims": 0})
    scale = make.emit("Max", make.emit("Div", largest, make.scalar(127)), make.scalar(_MIN_SCALE))
    input_scale = pair.prepared_value(f"{plan.scales[node.inputs[0]]}~scale")
    if bias:
        # With weights that are almost zero, a bias may exceed an int32 at their scale.
        min_scale = make.emit("Div", make.emit("Abs", bias), make.emit("Mul", input_scale, make.scalar(2.0**30)))
        scale = make.emit("Max", scale, min_scale)
    zeros = make.emit("ConstantOfShape", make.emit("Shape", scale), attrs={"value": np.zeros(1, np.int8)})
    numbers = make.emit("QuantizeLinear", weight, scale, zeros, attrs={"axis": axis})
    node.inputs[1] = graph.emit(
        "DequantizeLinear",
        pair.define_tensor(f"{stem}~weight", numbers, np.int8),
        pair.define_tensor(f"{stem}~scales", scale),
        graph.constant(np.zeros(shape[axis]), np.int8),
        attrs={"axis": axis},
    )
    if bias:
        product = make.emit("Mul", scale, input_scale)
        rounded_bias = make.emit(
            "Cast", make.emit("Round", make.emit("Div", bias, product)), attrs={"to": TensorProto.INT32}
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
        if node.op == "Flatten" and not node.domain and node.attrs.get("axis", 1) == 1 and shape is not None:
            # The size is written out: for an empty batch Reshape couldn't infer it.
            graph.emit("Reshape", node.inputs[0], graph.ints(0, math.prod(shape[1:])), out=node.outputs[0])
        elif node.op == "ReduceMean" and not node.domain and shape is not None and _is_map_mean(node, len(shape)):
            graph.emit("GlobalAveragePool", node.inputs[0], out=node.outputs[0])
        else:
            graph.nodes.append(node)


def _is_map_mean(node: Node, rank: int) -> bool:
    """Whether a mean is that of every channel's map."""
    axes = node.attrs.get("axes") or []
    return rank == 4 and sorted(a % rank for a in axes) == [2, 3] and bool(node.attrs.get("keepdims", 1))
