"""int8, written as pairs of QuantizeLinear and DequantizeLinear, which onnxruntime fuses with the operators between.

A value v of an activation is q = clip(round(v / s) + z, 0, 255), unsigned with a zero point, one scale per tensor;
weights are signed, symmetric and have a scale per output channel; a bias is int32 at the product of both scales. For
this combination onnxruntime has kernels on all processors that boards have: VNNI and AMX on x86, dot product and matrix
instructions on Arm (https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html).

A `LoweredPair` is the graph that a board runs, and the `prepare` graph that makes its tensors from float32 weights.
"""

from __future__ import annotations

import math

import numpy as np
from onnx import TensorProto

from fedprune.runtime.precision import RANGES
from fedprune_export.ir.graph import Node, Port
from fedprune_export.precision.folding import channel_axis
from fedprune_export.precision.lowered_pair import LoweredPair, node_text
from fedprune_export.precision.quantisation_plan import QuantisationPlan

# The scale of values that are always zero: a scale of 0 would make 0 / 0.
_MIN_SCALE = 1e-12


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
