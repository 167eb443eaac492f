"""Simplifies an imported graph: each operator gets one form, and operators that do nothing are removed.

`simplify` brings reshapes and squeezes into one form each, and removes products with one, sums with zero
and other operators that return their input. Graphs are changed in place; their outputs stay the same.
"""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from fedprune_export.ir.bypass import bypass
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.trace import Trace

# The neutral second operand of an operator; also the first, if the operator is commutative.
_NEUTRAL_OPERANDS = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0, "Pow": 1.0}

_COMMUTATIVE = ("Mul", "Add")
_COPYING_OPERATORS = REARRANGEMENTS | {"Cast", "Concat", "Expand", "Gather", "Slice", "Split"}

# First and last of the inputs that may be left out where they are zeros. Exporters give a layer without a bias one of
# zeros, which would keep all channels, and several recurrent layers the same zeros to begin with, which would tie their
# hidden units.
_ZERO_INPUTS = {"Conv": (2, 3), "Gemm": (2, 3), "GRU": (5, 6), "LSTM": (5, 7), "RNN": (5, 6)}


def simplify(graph: Graph, trace: Trace, constants: Container[str]) -> None:
    """Bring operators that can be written in several ways into one."""
    zeros = _zero_values(graph, constants)
    for node in graph.nodes:
        if node.domain:
            continue
        traced = {i for i in [*node.inputs, *node.outputs] if i} <= trace.shapes.keys()
        for i in range(*_ZERO_INPUTS.get(node.op, (0, 0))):
            if len(node.inputs) > i and node.inputs[i] in zeros:
                node.inputs[i] = ""
        while node.inputs and not node.inputs[-1]:
            node.inputs.pop()
        if node.op == "Reshape" and traced:
            _simplify_reshape(graph, node, trace)
        elif node.op == "Concat":
            # Parts without any numbers, such as an empty slice.
            filled = [i for i in node.inputs if i not in trace.shapes or 0 not in trace.dims(i)]
            node.inputs = filled or node.inputs
        elif node.op == "Squeeze" and len(node.inputs) < 2 and traced:
            axes = [i for i, d in enumerate(trace.dims(node.inputs[0])) if d == 1]
            node.inputs = [node.inputs[0], graph.ints(*axes)]
    _merge_reshapes(graph)
    _drop_neutral(graph, trace, constants)


def _zero_values(graph: Graph, constants: Container[str]) -> set[str]:
    """Values whose numbers are all 0."""
    zeros = {name for name, value in graph.initializers.items() if name in constants and not value.any()}
    for node in graph.nodes:
        if node.op == "ConstantOfShape":
            is_zero = not np.any(node.attrs.get("value", 0))
        else:
            sources = node.inputs if node.op == "Concat" else node.inputs[:1]
            is_zero = node.op in _COPYING_OPERATORS and zeros.issuperset(sources)
        if is_zero and not node.domain:
            zeros.update(node.outputs)
    return zeros


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


def _drop_neutral(graph: Graph, trace: Trace, constants: Container[str]) -> None:
    """Remove products with one, sums with zero, expansions to a value's own shape, and slices of everything."""
    unchanged = []
    for node in graph.nodes:
        value = None if node.domain else _unchanged_input(graph, trace, constants, node)
        if value is not None:
            node.inputs = [value]
            unchanged.append(node)
    bypass(graph, unchanged)


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
