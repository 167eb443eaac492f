"""Composites that people and exporters write out in primitives, found again: activations; norms have their own module.

What is found replaces only the last node of a pattern: others stay where something else reads them. Nothing is found
by resemblance: operands and constants must be the very ones of the definition.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from fedprune_export.ir.composites import GELU_CUBE
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_EXACT = 1e-6
"""How far a constant may be from its definition, relative to it: the rounding of float32 and a bit."""


_LINEAR = 17.0
"""From here on softplus(x) and x are the same number in float32."""


@dataclass
class Expressions:
    """A graph as expressions over its values.

    Attributes:
        graph: The graph.
        seen: Shapes and types of its values.
        constants: Initialisers that are constants.
        makers: The node of the main domain that makes each value as its first output.
        from_data: Values that depend on the graph's input.
    """

    graph: Graph
    seen: Trace
    constants: Container[str]
    makers: dict[str, Node]
    from_data: set[str]

    @classmethod
    def of(cls, graph: Graph, seen: Trace, constants: Container[str]) -> Expressions:
        """The expressions of a graph whose values have been traced."""
        made = {p.name for p in graph.inputs}
        for node in graph.nodes:
            if made.intersection(node.inputs):
                made.update(o for o in node.outputs if o)
        makers = {n.outputs[0]: n for n in graph.nodes if not n.domain and n.outputs[0]}
        return cls(graph, seen, constants, makers, made)

    def made_by(self, value: str, *operators: str) -> Node | None:
        """The node that makes a value, if it is one of these operators."""
        node = self.makers.get(value)
        return node if node is not None and node.op in operators else None

    def number(self, value: str) -> float | None:
        """The number that a constant of one element holds."""
        array = self.graph.initializers.get(value)
        if array is None or value not in self.constants or array.size != 1 or array.dtype.kind not in "fiu":
            return None
        return float(array.reshape(-1)[0])

    def is_number(self, value: str, expected: float) -> bool:
        """Whether a value is this constant."""
        found = self.number(value)
        return found is not None and math.isclose(found, expected, rel_tol=_EXACT)

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

    def plus(self, value: str, expected: float) -> str | None:
        """What a constant is added to."""
        node = self.made_by(value, "Add")
        for a, b in (node.inputs, node.inputs[::-1]) if node is not None else ():
            if self.is_number(b, expected):
                return a
        return None

    def is_vector(self, value: str, shape: tuple[int, ...]) -> bool:
        """Whether a value of this shape is computed without the data."""
        return value not in self.from_data and self.seen.shapes.get(value) == shape


def find_activations(graph: Graph, seen: Trace, constants: Container[str]) -> int:
    """Replace Softplus, Gelu (by erf or tanh) and Mish in primitives by the operators; returns how many."""
    expressions = Expressions.of(graph, seen, constants)
    found = 0
    for node in graph.nodes:
        if node.op == "Where" and not node.domain and (x := _softplus(expressions, node)):
            node.op, node.inputs, node.attrs = "Softplus", [x], {}
            found += 1
    for node in reversed(graph.nodes):
        if node.domain or node.op not in ("Mul", "Div") or seen.dtypes.get(node.outputs[0]) != np.float32:
            continue
        values, number = expressions.factors(node.outputs[0])
        match = _gelu(expressions, values, number) or _mish(expressions, values, number)
        if match and seen.shapes.get(match[1]) == seen.shapes[node.outputs[0]]:
            node.op, x, node.attrs = match
            node.inputs = [x]
            found += 1
    if found:
        graph.prune()
    return found


def _softplus(expressions: Expressions, node: Node) -> str | None:
    """The x of torch's form, which is x itself from 20 on: there float32 makes no difference."""
    condition, x, soft = node.inputs
    greater, inner = expressions.made_by(condition, "Greater"), expressions.made_by(soft, "Softplus")
    if greater is None or inner is None or greater.inputs[0] != x or inner.inputs[0] != x:
        return None
    bound = expressions.number(greater.inputs[1])
    return x if bound is not None and bound >= _LINEAR else None


_Match = tuple[str, str, dict[str, object]]


def _pairs(values: Counter[str]) -> list[tuple[str, str]]:
    """Both orders of a product of two different values."""
    if len(values) != 2 or values.total() != 2:
        return []
    a, b = values
    return [(a, b), (b, a)]


def _gelu(expressions: Expressions, values: Counter[str], number: float) -> _Match | None:
    if not math.isclose(number, 0.5, rel_tol=_EXACT):
        return None
    for x, curve in _pairs(values):
        inner = expressions.plus(curve, 1.0)
        node = expressions.made_by(inner, "Erf", "Tanh") if inner else None
        if node is None:
            continue
        inside, scale = expressions.factors(node.inputs[0])
        if node.op == "Erf" and inside == Counter([x]) and math.isclose(scale, math.sqrt(0.5), rel_tol=_EXACT):
            return "Gelu", x, {"approximate": "none"}
        curved = node.op == "Tanh" and math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=_EXACT)
        if curved and _is_cubic(expressions, inside, x):
            return "Gelu", x, {"approximate": "tanh"}
    return None


def _is_cubic(expressions: Expressions, values: Counter[str], x: str) -> bool:
    """Whether a product is x + c x^3, or x times 1 + c x^2."""
    power = 2 if values[x] == 1 else 3
    rest = values - Counter([x])
    node = expressions.made_by(next(iter(rest)), "Add") if rest.total() == 1 else None
    for a, b in (node.inputs, node.inputs[::-1]) if node is not None else ():
        if (a == x if power == 3 else expressions.is_number(a, 1.0)) and b != x:
            cube, factor = expressions.factors(b)
            if cube == Counter({x: power}) and math.isclose(factor, GELU_CUBE, rel_tol=_EXACT):
                return True
    return False


def _mish(expressions: Expressions, values: Counter[str], number: float) -> _Match | None:
    if number != 1:
        return None
    for x, curve in _pairs(values):
        tanh = expressions.made_by(curve, "Tanh")
        soft = expressions.made_by(tanh.inputs[0], "Softplus") if tanh else None
        if soft is not None and soft.inputs[0] == x:
            return "Mish", x, {}
    return None
