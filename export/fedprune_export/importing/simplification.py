"""Simplifies an imported graph: each operator gets one form, and operators that do nothing are removed.

`simplify` brings reshapes and squeezes into one form each, and removes products with one, sums with zero
and other operators that return their input. Graphs are changed in place; their outputs stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_KEEPDIMS_REDUCTIONS = frozenset(f"Reduce{kind}" for kind in ("Mean", "Sum", "Max", "Min", "L1", "L2", "SumSquare"))
# The neutral second operand of an operator; also the first, if the operator is commutative.
_NEUTRAL_OPERANDS = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0, "Pow": 1.0}

_COMMUTATIVE = ("Mul", "Add")


def drop_identities(graph: Graph) -> None:
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.op == "Identity" and not node.domain:
            bypass(graph, node, outputs)


def bypass(graph: Graph, node: Node, outputs: set[str]) -> None:
    """Remove a node whose first output is its first input."""
    source, target = node.inputs[0], node.outputs[0]
    if target in outputs:
        # The name of an output must stay, so its producer takes it over.
        producer = graph.producers().get(source)
        if producer is None or source in outputs:
            return  # an output that is an input or initialiser keeps its Identity
        producer.outputs = [target if o == source else o for o in producer.outputs]
        source, target = target, source
    graph.nodes = [n for n in graph.nodes if n is not node]
    for reader in graph.nodes:
        reader.inputs = [source if i == target else i for i in reader.inputs]


def simplify(graph: Graph, trace: Trace, constants: Container[str]) -> None:
    """Bring operators that can be written in several ways into one."""
    for node in graph.nodes:
        if node.domain:
            continue
        traced = {i for i in [*node.inputs, *node.outputs] if i} <= trace.shapes.keys()
        if node.op in ("Conv", "Gemm") and len(node.inputs) > 2 and node.inputs[2] in constants:
            # Exporters give a layer without a bias one of zeros. A constant with a number per channel keeps all
            # channels.
            if not np.any(graph.initializers[node.inputs[2]]):
                node.inputs = node.inputs[:2]
        elif node.op == "Reshape" and traced:
            _simplify_reshape(graph, node, trace)
        elif node.op == "Concat":
            # Parts without any numbers, such as an empty slice.
            filled = [i for i in node.inputs if i not in trace.shapes or 0 not in trace.dims(i)]
            node.inputs = filled or node.inputs
        elif node.op == "Squeeze" and len(node.inputs) < 2 and traced:
            axes = [i for i, d in enumerate(trace.dims(node.inputs[0])) if d == 1]
            node.inputs = [node.inputs[0], graph.ints(*axes)]
        elif node.op in ("Squeeze", "Unsqueeze") and len(node.inputs) == 2:
            target = node.inputs[1]
            if target in graph.initializers:
                node.inputs[1] = graph.ints(*graph.initializers[target].reshape(-1).tolist())
    _merge_reshapes(graph)
    _keep_reduced_axes(graph, trace)
    _drop_neutral(graph, trace, constants)
    _write_even_powers(graph, constants)


def _simplify_reshape(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a reshape that flattens samples as Flatten; in others write the entry that depends on the batch as −1."""
    source, target = trace.dims(node.inputs[0]), trace.dims(node.outputs[0])
    flat = len(target) == 2 and len(source) >= 2 and source[0] is None and None not in source[1:]
    if flat and target[0] is None and target[1] == math.prod(d or 1 for d in source[1:]):
        node.op, node.inputs, node.attrs = "Flatten", node.inputs[:1], {"axis": 1}
        return
    if sum(d is None for d in target) <= 1 and 0 not in target:
        node.inputs = [node.inputs[0], graph.ints(*(-1 if d is None else d for d in target))]
        node.attrs.pop("allowzero", None)


def _write_even_powers(graph: Graph, constants: Container[str]) -> None:
    """Write fourth powers and the like as products: onnxruntime's optimiser, which doesn't look at the exponent, takes
    a norm by them for a LayerNormalization."""
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        power = graph.initializers.get(node.inputs[1]) if node.op == "Pow" and node.inputs[1] in constants else None
        if power is not None and power.ndim <= 1 and power.size == 1 and power.item() in (4, 6, 8):
            factor = product = graph.emit("Mul", node.inputs[0], node.inputs[0])
            for _ in range(int(power.item()) // 2 - 2):
                product = graph.emit("Mul", product, factor)
            node.op, node.inputs = "Mul", [product, factor]
        graph.nodes.append(node)


def _merge_reshapes(graph: Graph) -> None:
    """Let a reshape of a reshape read the input of the first."""
    makers = graph.producers()
    for node in graph.nodes:
        # A 0 in the target copies a size of the input, which would be another one after the merge.
        if node.domain or node.op != "Reshape" or 0 in graph.initializers.get(node.inputs[1], np.zeros(1)):
            continue
        before = makers.get(node.inputs[0])
        while before is not None and before.op == "Reshape" and not before.domain:
            node.inputs[0] = before.inputs[0]
            before = makers.get(node.inputs[0])
    graph.prune()


def _keep_reduced_axes(graph: Graph, trace: Trace) -> None:
    """Let a reduction keep its axes, where a reshape inserts them again."""
    makers, readers = graph.producers(), graph.consumers()
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        if node.domain or node.op not in ("Reshape", "Unsqueeze") or node.outputs[0] not in trace.shapes:
            continue
        before = makers.get(node.inputs[0])
        if before is None or before.domain or before.op not in _KEEPDIMS_REDUCTIONS or before.attrs.get("keepdims", 1):
            continue
        axes = before.attrs.get("axes")
        if before.op == "ReduceSum" and len(before.inputs) > 1 and before.inputs[1] in graph.initializers:
            axes = graph.initializers[before.inputs[1]].tolist()
        reduced = before.outputs[0]
        if not axes or reduced in outputs or len(readers[reduced]) != 1 or before.inputs[0] not in trace.shapes:
            continue
        source = trace.dims(before.inputs[0])
        reduced_axes = {a % len(source) for a in axes}
        kept_dims = tuple(1 if i in reduced_axes else d for i, d in enumerate(source))
        if trace.dims(node.outputs[0]) == kept_dims and all(source[a] is not None for a in reduced_axes):
            before.attrs["keepdims"], before.outputs = 1, list(node.outputs)
            node.outputs = []
    graph.nodes = [n for n in graph.nodes if n.outputs]


def _drop_neutral(graph: Graph, trace: Trace, constants: Container[str]) -> None:
    """Remove products with one, sums with zero, expansions to a value's own shape, and slices of everything."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        value = None if node.domain else _unchanged_input(graph, trace, constants, node)
        if value is not None:
            node.inputs = [value]
            bypass(graph, node, outputs)


def _unchanged_input(graph: Graph, trace: Trace, constants: Container[str], node: Node) -> str | None:
    """The input that a node returns unchanged; None if it computes something."""
    if node.op == "Slice":
        return node.inputs[0] if _takes_everything(graph, trace, node) else None
    if node.op == "Concat" and len(node.inputs) == 1:
        return node.inputs[0]
    if node.op == "Where":
        condition, _, second = node.inputs
        never = condition in graph.initializers and not graph.initializers[condition].any()
        alike = {second, node.outputs[0]} <= trace.shapes.keys() and trace.dims(second) == trace.dims(node.outputs[0])
        return second if never and alike else None
    if len(node.inputs) != 2 or node.outputs[0] not in trace.shapes:
        return None
    for x, operand in (node.inputs, node.inputs[::-1]):
        is_first = operand != node.inputs[1]
        same_shape = x in trace.shapes and trace.dims(x) == trace.dims(node.outputs[0])
        if not same_shape or (is_first and node.op not in _COMMUTATIVE):
            continue
        if node.op == "Expand":
            return x
        value = graph.initializers.get(operand) if operand in constants and node.op in _NEUTRAL_OPERANDS else None
        if value is not None and value.dtype == np.float32 and bool((value == _NEUTRAL_OPERANDS[node.op]).all()):
            return x
    return None


def _takes_everything(graph: Graph, trace: Trace, node: Node) -> bool:
    before, after = node.inputs[0], node.outputs[0]
    steps = graph.initializers.get(node.inputs[4]) if len(node.inputs) > 4 and node.inputs[4] else np.ones(1)
    if steps is None or not (steps == 1).all() or not {before, after} <= trace.shapes.keys():
        return False
    # A range with a step of 1 that is as long as its axis, at every batch, is the axis.
    all_shapes = (trace.shapes, trace.shapes_second, *trace.shapes_further)
    return all(shapes[before] == shapes[after] for shapes in all_shapes)
