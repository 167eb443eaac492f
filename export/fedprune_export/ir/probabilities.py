"""Finds out whether a graph's output is probabilities, and which node makes them."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS

PROBABILITY_OPERATORS = frozenset({"Softmax", "Sigmoid", "HardSigmoid"})

# Operators whose outputs are probabilities if their first input is.
_PROBABILITY_PRESERVING = REARRANGEMENTS | {
    *("Cast", "Clip", "Dropout", "Expand", "Gather", "GatherND", "GatherElements", "Pad", "Resize", "Slice", "Split"),
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("Tile", "TopK"),
}

# Operators that may join several probabilities into others, such as averages or products of them.
_COMBINING_OPERATORS = frozenset({"Add", "Concat", "Div", "Max", "Mean", "Min", "Mul", "Sum"})


def probability_node(graph: Graph, output: str, weights: Container[str]) -> Node | None:
    """The node that makes an output's probabilities; None if any of its numbers is something else.

    `weights`: initialisers that aren't constants: a product with them is no probability.
    """
    makers = graph.producers()
    constants = {name: value for name, value in graph.initializers.items() if name not in weights}
    maker: Node | None = None
    # Back from the output: every path has to end in an operator that makes probabilities.
    pending, visited = [output], {output}
    while pending:
        node = makers.get(pending.pop())
        if node is None or node.domain:
            return None
        sources: list[str] = []
        is_primitive = _ends_softmax(node, makers) or _ends_sigmoid(node, makers, constants)
        if node.op in PROBABILITY_OPERATORS or is_primitive:
            maker = maker or node
        elif node.op in _PROBABILITY_PRESERVING:
            sources = node.inputs[:1]
        elif node.op in _COMBINING_OPERATORS and _keeps_unit_range(node, constants):
            sources = [i for i in node.inputs if i not in constants]
        elif node.op == "Sub" and _is_ones(node.inputs[0], constants):
            sources = node.inputs[1:]
        else:
            return None
        pending += [i for i in sources if i not in visited]
        visited.update(sources)
    return maker


def _is_ones(name: str, constants: Mapping[str, Array]) -> bool:
    return name in constants and bool(np.all(constants[name] == 1))


def _ends_softmax(node: Node, makers: Mapping[str, Node]) -> bool:
    """Whether a node ends a softmax in primitives: e / sum(e), or exp(LogSoftmax)."""
    if node.op == "Exp":
        return node.inputs[0] in makers and makers[node.inputs[0]].op == "LogSoftmax"
    total = makers.get(node.inputs[1]) if node.op == "Div" else None
    return total is not None and total.op == "ReduceSum" and total.inputs[0] == node.inputs[0]


def _ends_sigmoid(node: Node, makers: Mapping[str, Node], constants: Mapping[str, Array]) -> bool:
    """Whether a node ends a sigmoid in primitives: 1 / (1 + exp(-x))."""
    is_inverse = node.op == "Reciprocal" or (node.op == "Div" and _is_ones(node.inputs[0], constants))
    total = makers.get(node.inputs[-1]) if is_inverse else None
    if total is None or total.op != "Add":
        return False
    operators = [makers[i].op for i in total.inputs if i in makers]
    return operators == ["Exp"] and any(_is_ones(i, constants) for i in total.inputs)


def _keeps_unit_range(node: Node, constants: Mapping[str, Array]) -> bool:
    """Whether a node's constants leave combinations of probabilities between 0 and 1."""
    values = [constants[i] for i in node.inputs if i in constants]
    if node.op == "Div":
        return node.inputs[1] in constants and bool((constants[node.inputs[1]] >= 1).all())
    if node.op in ("Add", "Sum"):
        return not values
    return all(((v >= 0) & (v <= 1)).all() for v in values)
