"""Recognises Softplus, Gelu and Mish that are written in primitives, and replaces each by a single operator."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Container
from typing import NamedTuple

import numpy as np

from fedprune_export.importing.expressions import CONSTANT_TOLERANCE, Expressions
from fedprune_export.ir.composites import GELU_CUBE
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_SOFTPLUS_LINEAR_FROM = 17.0  # from here on softplus(x) and x are the same number in float32


def replace_activations(graph: Graph, trace: Trace, constants: Container[str]) -> int:
    """Replace Softplus, Gelu (by erf or tanh) and Mish in primitives by the operators; returns how many."""
    expressions = Expressions(graph, trace, constants)
    count = 0
    for node in graph.nodes:
        if node.op == "Where" and not node.domain and (x := _match_softplus(expressions, node)):
            node.op, node.inputs, node.attrs = "Softplus", [x], {}
            count += 1
    for node in reversed(graph.nodes):
        if node.domain or node.op not in ("Mul", "Div") or trace.dtypes.get(node.outputs[0]) != np.float32:
            continue
        values, number = expressions.factors(node.outputs[0])
        match = _match_gelu(expressions, values, number) or _match_mish(expressions, values, number)
        if match and trace.shapes.get(match.x) == trace.shapes[node.outputs[0]]:
            # The inner nodes stay until nothing reads them; `prune` removes them.
            node.op, node.inputs, node.attrs = match.op, [match.x], match.attrs
            count += 1
    if count:
        graph.prune()
    return count


def _match_softplus(expressions: Expressions, node: Node) -> str | None:
    """The input of PyTorch's softplus, which returns x itself from a bound on; in float32 that is the same number."""
    condition, x, soft = node.inputs
    greater, inner = expressions.maker(condition, "Greater"), expressions.maker(soft, "Softplus")
    if greater is None or inner is None or greater.inputs[0] != x or inner.inputs[0] != x:
        return None
    bound = expressions.number(greater.inputs[1])
    return x if bound is not None and bound >= _SOFTPLUS_LINEAR_FROM else None


class _Match(NamedTuple):
    """An activation that was recognised: its operator, its input and its attributes."""

    op: str
    x: str
    attrs: dict[str, object]


def _both_orders(values: Counter[str]) -> list[tuple[str, str]]:
    """Both orders of a product of two different values."""
    if len(values) != 2 or values.total() != 2:
        return []
    a, b = values
    return [(a, b), (b, a)]


def _match_gelu(expressions: Expressions, values: Counter[str], number: float) -> _Match | None:
    """0.5 x (1 + erf(x / √2)), or its approximation by tanh; `values` and `number` are the factors of the product."""
    if not math.isclose(number, 0.5, rel_tol=CONSTANT_TOLERANCE):
        return None
    for x, curve in _both_orders(values):
        inner = expressions.without_addend(curve, 1.0)
        node = expressions.maker(inner, "Erf", "Tanh") if inner else None
        if node is None:
            continue
        inside, scale = expressions.factors(node.inputs[0])
        is_erf_scale = math.isclose(scale, math.sqrt(0.5), rel_tol=CONSTANT_TOLERANCE)
        if node.op == "Erf" and inside == Counter([x]) and is_erf_scale:
            return _Match("Gelu", x, {"approximate": "none"})
        is_tanh_form = node.op == "Tanh" and math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=CONSTANT_TOLERANCE)
        if is_tanh_form and _is_cubic(expressions, inside, x):
            return _Match("Gelu", x, {"approximate": "tanh"})
    return None


def _is_cubic(expressions: Expressions, values: Counter[str], x: str) -> bool:
    """Whether a product is x + c x^3, or x times 1 + c x^2."""
    power = 2 if values[x] == 1 else 3
    rest = values - Counter([x])
    node = expressions.maker(next(iter(rest)), "Add") if rest.total() == 1 else None
    for a, b in (node.inputs, node.inputs[::-1]) if node is not None else ():
        if (a == x if power == 3 else expressions.is_number(a, 1.0)) and b != x:
            cube, factor = expressions.factors(b)
            if cube == Counter({x: power}) and math.isclose(factor, GELU_CUBE, rel_tol=CONSTANT_TOLERANCE):
                return True
    return False


def _match_mish(expressions: Expressions, values: Counter[str], number: float) -> _Match | None:
    """The product x tanh(softplus(x))."""
    if number != 1:
        return None
    for x, curve in _both_orders(values):
        tanh = expressions.maker(curve, "Tanh")
        soft = expressions.maker(tanh.inputs[0], "Softplus") if tanh else None
        if soft is not None and soft.inputs[0] == x:
            return _Match("Mish", x, {})
    return None
