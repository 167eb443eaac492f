"""Reads a graph as expressions: by which operator each value is computed, and which numbers are constant.

The recognition of norms and activations that are written in primitives (`importing.norms`, `importing.activations`)
compares these expressions with definitions. Operands must be the very ones of the definition, not similar ones.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container

from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

# How far a constant may be from its definition, relative to it: the rounding of float32 and a bit.
CONSTANT_TOLERANCE = 1e-6


class Expressions:
    """A graph as expressions over its values. `constants` are names of initialisers."""

    def __init__(self, graph: Graph, trace: Trace, constants: Container[str]) -> None:
        self.graph, self.trace, self.constants = graph, trace, constants
        # By value, the standard operator that computes it as its first output.
        self.makers = {n.outputs[0]: n for n in graph.nodes if not n.domain and n.outputs[0]}
        self.from_data = graph.values_from_inputs()

    def maker(self, value: str, *operators: str) -> Node | None:
        node = self.makers.get(value)
        return node if node is not None and node.op in operators else None

    def number(self, value: str) -> float | None:
        """The number that a constant of one element holds."""
        array = self.graph.initializers.get(value)
        if array is None or value not in self.constants or array.size != 1 or array.dtype.kind not in "fiu":
            return None
        return float(array.reshape(-1)[0])

    def is_number(self, value: str, expected: float) -> bool:
        """Whether a value is a constant of this number, up to rounding."""
        number = self.number(value)
        return number is not None and math.isclose(number, expected, rel_tol=CONSTANT_TOLERANCE)

    def factors(self, value: str, depth: int = 6) -> tuple[Counter[str], float]:
        """A product as its factors: how often each value occurs, and the product of the constants."""
        node, number = self.makers.get(value), self.number(value)
        if number is not None:
            return Counter(), number
        if node is None or depth == 0:
            return Counter([value]), 1.0
        if node.op == "Mul":
            (a, m), (b, n) = (self.factors(i, depth - 1) for i in node.inputs)
            return a + b, m * n
        if node.op == "Div" and (divisor := self.number(node.inputs[1])):
            left, n = self.factors(node.inputs[0], depth - 1)
            return left, n / divisor
        if node.op == "Pow" and (power := self.number(node.inputs[1])) in (2, 3):
            inner, n = self.factors(node.inputs[0], depth - 1)
            return Counter({k: c * int(power) for k, c in inner.items()}), n ** int(power)
        return Counter([value]), 1.0

    def without_addend(self, value: str, expected: float) -> str | None:
        """The other operand of a sum with this constant; None if the value is no sum with it."""
        node = self.maker(value, "Add")
        for a, b in (node.inputs, node.inputs[::-1]) if node is not None else ():
            if self.is_number(b, expected):
                return a
        return None
