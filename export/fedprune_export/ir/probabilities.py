"""Whether a graph ends in probabilities, and what makes them."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np

from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS

MAKERS = frozenset({"Softmax", "Sigmoid", "HardSigmoid"})

_PASSING = REARRANGEMENTS | {
    *("Cast", "Clip", "Dropout", "Expand", "Gather", "GatherND", "GatherElements", "Pad", "Resize", "Slice", "Split"),
    *("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("Tile", "TopK"),
}
"""Operators of whose first input the outputs are probabilities where that holds some."""

_JOINING = frozenset({"Add", "Concat", "Div", "Max", "Mean", "Min", "Mul", "Sum"})
"""Operators that make probabilities, or shares of them, of probabilities and constants."""


def maker_of_probabilities(graph: Graph, output: str, weights: Container[str]) -> Node | None:
    """The node that makes the probabilities that an output consists of; None where any of it is something else.

    Args:
        weights: Initialisers that aren't constants: what is scaled by them is no probability.
    """
    makers = graph.producers()
    constants = {name: value for name, value in graph.initializers.items() if name not in weights}
    first: Node | None = None
    waiting, seen = [output], {output}
    while waiting:
        node = makers.get(waiting.pop())
        if node is None or node.domain:
            return None
        read: list[str] = []
        if node.op in MAKERS:
            first = first or node
        elif node.op in _PASSING:
            read = node.inputs[:1]
        elif node.op in _JOINING and not _can_enlarge(node, constants):
            read = [i for i in node.inputs if i not in constants]
        elif node.op == "Sub" and np.all(constants.get(node.inputs[0], np.zeros(1)) == 1):
            read = node.inputs[1:]
        else:
            return None
        waiting += [i for i in read if i not in seen]
        seen.update(read)
    return first


def _can_enlarge(node: Node, constants: Mapping[str, Array]) -> bool:
    """Whether constants of a node make more than probabilities of probabilities."""
    values = [constants[i] for i in node.inputs if i in constants]
    if node.op == "Div":
        return node.inputs[1] not in constants or not bool((values[0] >= 1).all())
    return (node.op in ("Add", "Sum") and bool(values)) or not all(((v >= 0) & (v <= 1)).all() for v in values)
