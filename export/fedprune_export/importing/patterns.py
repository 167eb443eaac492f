"""Norms and activations that are written in primitives are replaced by single operators.

LayerNorm and RMSNorm come from means of squares, over the last axes or (between two transposes) over others; GroupNorm
from an instance norm of a reshaped value. A match replaces only the last node of a pattern: the others stay where
something else reads them. Operands and constants must be the very ones of the definition, not similar ones.
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

# How far a constant may be from its definition, relative to it: the rounding of float32 and a bit.
_CONSTANT_TOLERANCE = 1e-6


_SOFTPLUS_LINEAR_FROM = 17.0  # from here on softplus(x) and x are the same number in float32


@dataclass
class Expressions:
    """A graph as expressions over its values.

    `makers`: the standard operator that makes each value as its first output.
    """

    graph: Graph
    trace: Trace
    constants: Container[str]
    makers: dict[str, Node]
    from_data: set[str]

    @classmethod
    def of(cls, graph: Graph, trace: Trace, constants: Container[str]) -> Expressions:
        makers = {n.outputs[0]: n for n in graph.nodes if not n.domain and n.outputs[0]}
        return cls(graph, trace, constants, makers, graph.values_from_inputs())

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
        return number is not None and math.isclose(number, expected, rel_tol=_CONSTANT_TOLERANCE)

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
        """The other operand of a sum with this constant; None if a value is no such sum."""
        node = self.maker(value, "Add")
        for a, b in (node.inputs, node.inputs[::-1]) if node is not None else ():
            if self.is_number(b, expected):
                return a
        return None


def find_activations(graph: Graph, trace: Trace, constants: Container[str]) -> int:
    """Replace Softplus, Gelu (by erf or tanh) and Mish in primitives by the operators; returns how many."""
    expressions = Expressions.of(graph, trace, constants)
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
        if match and trace.shapes.get(match[1]) == trace.shapes[node.outputs[0]]:
            # The inner nodes stay until nothing reads them; `prune` removes them.
            node.op, x, node.attrs = match
            node.inputs = [x]
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


_Match = tuple[str, str, dict[str, object]]


def _both_orders(values: Counter[str]) -> list[tuple[str, str]]:
    """Both orders of a product of two different values."""
    if len(values) != 2 or values.total() != 2:
        return []
    a, b = values
    return [(a, b), (b, a)]


def _match_gelu(expressions: Expressions, values: Counter[str], number: float) -> _Match | None:
    if not math.isclose(number, 0.5, rel_tol=_CONSTANT_TOLERANCE):
        return None
    for x, curve in _both_orders(values):
        inner = expressions.without_addend(curve, 1.0)
        node = expressions.maker(inner, "Erf", "Tanh") if inner else None
        if node is None:
            continue
        inside, scale = expressions.factors(node.inputs[0])
        is_erf_scale = math.isclose(scale, math.sqrt(0.5), rel_tol=_CONSTANT_TOLERANCE)
        if node.op == "Erf" and inside == Counter([x]) and is_erf_scale:
            return "Gelu", x, {"approximate": "none"}
        is_tanh_form = node.op == "Tanh" and math.isclose(scale, math.sqrt(2 / math.pi), rel_tol=_CONSTANT_TOLERANCE)
        if is_tanh_form and _is_cubic(expressions, inside, x):
            return "Gelu", x, {"approximate": "tanh"}
    return None


def _is_cubic(expressions: Expressions, values: Counter[str], x: str) -> bool:
    """Whether a product is x + c x^3, or x times 1 + c x^2."""
    power = 2 if values[x] == 1 else 3
    rest = values - Counter([x])
    node = expressions.maker(next(iter(rest)), "Add") if rest.total() == 1 else None
    for a, b in (node.inputs, node.inputs[::-1]) if node is not None else ():
        if (a == x if power == 3 else expressions.is_number(a, 1.0)) and b != x:
            cube, factor = expressions.factors(b)
            if cube == Counter({x: power}) and math.isclose(factor, GELU_CUBE, rel_tol=_CONSTANT_TOLERANCE):
                return True
    return False


def _match_mish(expressions: Expressions, values: Counter[str], number: float) -> _Match | None:
    if number != 1:
        return None
    for x, curve in _both_orders(values):
        tanh = expressions.maker(curve, "Tanh")
        soft = expressions.maker(tanh.inputs[0], "Softplus") if tanh else None
        if soft is not None and soft.inputs[0] == x:
            return "Mish", x, {}
    return None


_RESHAPES = ("Reshape", "Unsqueeze", "Squeeze")


@dataclass(frozen=True)
class _NormMatch:
    """A norm that was recognised in primitives, before scale and bias.

    Attributes:
        axes: Axes that are normalised together, ascending; of a GroupNormalization the channels.
        scale: The constant scale and bias of its channels, if it has them.
    """

    op: str
    x: str
    value: str
    axes: tuple[int, ...]
    attrs: dict[str, object]
    scale: tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...] = ()


def find_norms(graph: Graph, trace: Trace, constants: Container[str]) -> int:
    """Replace norms in primitives by the operators; returns how many."""
    count = 0
    while True:
        # One match at a time: each replacement changes the nodes that the next one has to read.
        expressions = Expressions.of(graph, trace, constants)
        match = next(filter(None, (_match_norm(expressions, n) for n in graph.nodes)), None)
        if match is None:
            return count
        _replace_norm(expressions, match)
        graph.prune()
        count += 1


def _match_norm(expressions: Expressions, node: Node) -> _NormMatch | None:
    if node.domain or node.outputs[0] not in expressions.trace.shapes:
        return None
    if node.op in ("Div", "Mul"):
        return _match_by_squares(expressions, node)
    return _match_group_norm(expressions, node) if node.op == "Reshape" else None


# -- LayerNorm and RMSNorm -------------------------------------------------------------------------------------------


def _match_by_squares(expressions: Expressions, node: Node) -> _NormMatch | None:
    """x / sqrt(mean x^2 + epsilon), where x may be a value minus its mean."""
    for x, root in ((a, b) for a, b in (node.inputs, node.inputs[::-1])):
        if node.op == "Div":
            square = _root(expressions, root) if x == node.inputs[0] else None
        else:
            square = _inverse_root(expressions, root)
        if square is None:
            continue
        mean, epsilon = square
        axes = _mean_axes(expressions, mean)
        if axes is None:
            continue
        inside, number = expressions.factors(expressions.makers[mean].inputs[0], 2)
        if number != 1 or inside.total() != 2:
            continue
        centre = _centre(expressions, x)
        if centre is not None and all(_centre(expressions, v) == centre for v in inside) and centre[1] == axes:
            return _NormMatch("LayerNormalization", centre[0], node.outputs[0], axes, {"epsilon": epsilon})
        if inside == Counter({x: 2}):
            return _NormMatch("RMSNormalization", x, node.outputs[0], axes, {"epsilon": epsilon})
    return None


def _root(expressions: Expressions, value: str) -> tuple[str, float] | None:
    """The mean and epsilon of sqrt(mean + epsilon)."""
    node = expressions.maker(value, "Sqrt", "Pow")
    if node is None or (node.op == "Pow" and not expressions.is_number(node.inputs[1], 0.5)):
        return None
    return _with_epsilon(expressions, node.inputs[0])


def _inverse_root(expressions: Expressions, value: str) -> tuple[str, float] | None:
    """The mean and epsilon of 1 / sqrt(mean + epsilon)."""
    node = expressions.maker(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op == "Pow":
        return _with_epsilon(expressions, node.inputs[0]) if expressions.is_number(node.inputs[1], -0.5) else None
    if node.op == "Div" and not expressions.is_number(node.inputs[0], 1.0):
        return None
    return _root(expressions, node.inputs[-1])


def _with_epsilon(expressions: Expressions, value: str) -> tuple[str, float] | None:
    node = expressions.maker(value, "Add")
    for mean, epsilon in (node.inputs, node.inputs[::-1]) if node is not None else ():
        number = expressions.number(epsilon)
        if number is not None and 0 < number < 1:
            return mean, number
    return None


def _mean_axes(expressions: Expressions, value: str) -> tuple[int, ...] | None:
    """The axes of a mean with keepdims; None if a value is no such mean, or the batch is among the axes."""
    node = expressions.maker(value, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1) or "axes" not in node.attrs:
        return None
    rank = len(expressions.trace.shapes[node.inputs[0]])
    axes = tuple(sorted(a % rank for a in node.attrs["axes"]))
    # A mean over the batch belongs to a batch norm.
    return axes if axes and axes[0] > 0 else None


def _centre(expressions: Expressions, value: str) -> tuple[str, tuple[int, ...]] | None:
    """The x and the axes of x − mean(x); None if a value is no such difference."""
    node = expressions.maker(value, "Sub")
    if node is None:
        return None
    axes = _mean_axes(expressions, node.inputs[1])
    if axes is None or expressions.makers[node.inputs[1]].inputs[0] != node.inputs[0]:
        return None
    return node.inputs[0], axes


# -- GroupNorm -------------------------------------------------------------------------------------------------------


def _match_group_norm(expressions: Expressions, node: Node) -> _NormMatch | None:
    """A group norm: an instance norm of [batch, groups, rest] between a reshape and its reverse."""
    trace, normal = expressions.trace, expressions.maker(node.inputs[0], "InstanceNormalization")
    first = expressions.maker(normal.inputs[0], "Reshape") if normal else None
    if normal is None or first is None:
        return None
    x, inner = first.inputs[0], trace.dims(first.outputs[0])
    outer = trace.dims(x)
    if outer != trace.dims(node.outputs[0]) or len(outer) < 3 or outer[0] is not None or inner[0] is not None:
        return None
    channels, groups = outer[1], inner[1]
    if channels is None or groups is None or channels % groups or None in outer[1:]:
        return None
    vectors = [expressions.graph.initializers.get(i) for i in normal.inputs[1:3]]
    if any(v is None or n not in expressions.constants for v, n in zip(vectors, normal.inputs[1:3], strict=True)):
        return None
    attrs: dict[str, object] = {"num_groups": groups, "epsilon": normal.attrs.get("epsilon", 1e-5)}
    scale, bias = (np.repeat(v, channels // groups) for v in vectors if v is not None)
    return _NormMatch("GroupNormalization", x, node.outputs[0], (1,), attrs, (scale, bias))


# -- vectors ---------------------------------------------------------------------------------------------------------


def _replace_norm(expressions: Expressions, norm: _NormMatch) -> None:
    """Replace the last node of a pattern by the operator, with the scale and bias that follow, or ones and zeros."""
    graph = expressions.graph
    shape = tuple(expressions.trace.shapes[norm.x][a] for a in norm.axes)
    value, last = norm.value, expressions.makers[norm.value]
    scale: str | None = None
    bias: str | None = None
    nodes: list[Node] = []
    plain = not norm.scale or bool((norm.scale[0] == 1).all() and (norm.scale[1] == 0).all())
    if plain and (step := _following_vector(expressions, norm, value, "Mul", shape, nodes)):
        scale, last = step
        value = last.outputs[0]
    if (
        plain
        and norm.op != "RMSNormalization"
        and (step := _following_vector(expressions, norm, value, "Add", shape, nodes))
    ):
        bias, last = step
    if scale is None:
        scale = graph.constant(norm.scale[0] if norm.scale else np.ones(shape), np.float32)
    if bias is None and norm.op == "GroupNormalization":
        bias = graph.constant(norm.scale[1], np.float32)
    inputs = [scale] if bias is None else [scale, bias]
    index = next(i for i, n in enumerate(graph.nodes) if n is last)
    rank, out = len(expressions.trace.shapes[norm.x]), last.outputs[0]
    attrs = {**norm.attrs, "axis": -len(norm.axes)} if norm.op != "GroupNormalization" else norm.attrs
    if norm.op == "GroupNormalization" or norm.axes[0] == rank - len(norm.axes):
        nodes.append(Node(norm.op, [norm.x, *inputs], [out], attrs, out))
    else:
        order = [a for a in range(rank) if a not in norm.axes] + list(norm.axes)
        back = [order.index(a) for a in range(rank)]
        turned, normal = graph.fresh("Transpose"), graph.fresh(norm.op)
        nodes.append(Node("Transpose", [norm.x], [turned], {"perm": order}, turned))
        nodes.append(Node(norm.op, [turned, *inputs], [normal], attrs, normal))
        nodes.append(Node("Transpose", [normal], [out], {"perm": back}, out))
    graph.nodes[index : index + 1] = nodes


def _following_vector(
    expressions: Expressions, norm: _NormMatch, value: str, op: str, shape: tuple[int, ...], nodes: list[Node]
) -> tuple[str, Node] | None:
    """The scale or bias that is applied to a value, in the norm's shape, and the node that applies it; else None.

    `op` applies it: Mul or Add. A reshape to the norm's shape, if one is needed, is appended to `nodes`. The value must
    have no other reader: else the norm would be computed twice.
    """
    readers = [n for n in expressions.graph.nodes if value in n.inputs]
    if len(readers) != 1 or readers[0].op != op or readers[0].domain or Counter(readers[0].inputs)[value] != 1:
        return None
    if any(p.name == value for p in expressions.graph.outputs):
        return None
    operand = next(i for i in readers[0].inputs if i != value)
    trace, rank = expressions.trace, len(expressions.trace.shapes[norm.x])
    # What scales a norm's output by data is no vector of the norm.
    if operand in expressions.from_data or operand not in trace.shapes or trace.dtypes[operand] != np.float32:
        return None
    full = (1,) * (rank - len(trace.shapes[operand])) + trace.shapes[operand]
    expected = tuple(trace.shapes[norm.x][a] if a in norm.axes else 1 for a in range(rank))
    if full != expected or trace.shapes[readers[0].outputs[0]] != trace.shapes[norm.x]:
        return None
    while trace.shapes[operand] != shape:
        node = expressions.maker(operand, *_RESHAPES)
        if node is not None and trace.shapes[node.inputs[0]] == shape:
            return node.inputs[0], readers[0]
        if node is None:
            break
        operand = node.inputs[0]
    if trace.shapes[operand] == shape:
        return operand, readers[0]
    if operand in expressions.constants:
        array = expressions.graph.initializers[operand].reshape(shape)
        return expressions.graph.constant(array, np.float32), readers[0]
    if len(shape) != 1:
        return None
    flat = expressions.graph.fresh("Reshape")
    nodes.append(Node("Reshape", [operand, expressions.graph.ints(-1)], [flat], {}, flat))
    return flat, readers[0]
