"""Whether a graph ends in probabilities, and what makes them."""

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
        if node.op in PROBABILITY_OPERATORS or _ends_primitive_form(node, makers, constants):
            maker = maker or node
        elif node.op in _PROBABILITY_PRESERVING:
            sources = node.inputs[:1]
        elif node.op in _COMBINING_OPERATORS and not _can_enlarge(node, constants):
            sources = [i for i in node.inputs if i not in constants]
        elif node.op == "Sub" and np.all(constants.get(node.inputs[0], np.zeros(1)) == 1):
            sources = node.inputs[1:]
        else:
            return None
        pending += [i for i in sources if i not in visited]
        visited.update(sources)
    return maker


def _ends_primitive_form(node: Node, makers: Mapping[str, Node], constants: Mapping[str, Array]) -> bool:
    """Whether a node ends a softmax or sigmoid in primitives: e / sum(e), exp(LogSoftmax) or 1 / (1 + exp(-x))."""

    def ops(name: str) -> list[str]:
        return [makers[i].op for i in makers[name].inputs if i in makers] if name in makers else []

    if node.op == "Exp":
        return node.inputs[0] in makers and makers[node.inputs[0]].op == "LogSoftmax"
    total = makers.get(node.inputs[1]) if node.op == "Div" else None
    if total is not None and total.op == "ReduceSum":
        return total.inputs[0] == node.inputs[0]
    if node.op == "Div" and not np.all(constants.get(node.inputs[0], np.zeros(1)) == 1):
        return False
    divisor = node.inputs[-1] if node.op in ("Div", "Reciprocal") else ""
    if divisor not in makers or makers[divisor].op != "Add":
        return False
    return ops(divisor) == ["Exp"] and any(np.all(constants.get(i, np.zeros(1)) == 1) for i in makers[divisor].inputs)


def _can_enlarge(node: Node, constants: Mapping[str, Array]) -> bool:
    """Whether a node's constants can make numbers above 1, or below 0, of probabilities."""
    values = [constants[i] for i in node.inputs if i in constants]
    # Dividing probabilities by numbers of at least 1 leaves shares of them.
    if node.op == "Div":
        return node.inputs[1] not in constants or not bool((constants[node.inputs[1]] >= 1).all())
    return (node.op in ("Add", "Sum") and bool(values)) or not all(((v >= 0) & (v <= 1)).all() for v in values)
