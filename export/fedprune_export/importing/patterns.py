"""Recognises norms and activations that are written in primitives, and replaces each by a single operator.

What is compared is expressions: of a product its factors and their exponents, so that x / sqrt(v), x · (1 / sqrt(v))
and x · v^-0.5 are the same. Operands must be the very ones of the definition, not similar ones. LayerNorm and RMSNorm
are recognised by the mean of squares, over the last axes or (between two transposes) over others; GroupNorm by an
instance norm of a reshaped value. A match replaces only the last node of a pattern: the others stay if something else
reads them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Container, Iterator
from typing import NamedTuple

import numpy as np

from fedprune_export.ir.composites import GELU_CUBE
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import Trace

_Factors = dict[str, float]

# How far a constant may be from its definition, relative to it: the rounding of float32 and a bit.
_CONSTANT_TOLERANCE = 1e-6
_SOFTPLUS_LINEAR_FROM = 17.0  # from here on softplus(x) and x are the same number in float32
_MAX_DEPTH = 6  # products of products that are taken together
_POWERS = {"Reciprocal": -1.0, "Sqrt": 0.5}


def replace_patterns(graph: Graph, trace: Trace, constants: Container[str]) -> int:
    """Replace norms and activations in primitives by the operators; returns how many."""
    expressions = _Expressions(graph, trace, constants)
    count = 0
    for node in graph.nodes:
        # A Mish is written with a Softplus, which torch writes in primitives, too.
        if node.op == "Where" and not node.domain and (x := _softplus_input(expressions, node)):
            node.op, node.inputs, node.attrs = "Softplus", [x], {}
            count += 1
    for node in list(graph.nodes):
        if node.domain or trace.dtypes.get(node.outputs[0]) != np.float32:
            continue
        if node.op in ("Div", "Mul") and (match := _match_activation(expressions, node)):
            node.op, node.inputs, node.attrs = match
        elif norm := _match_norm(expressions, node):
            _replace_norm(expressions, norm)
        else:
            continue
        count += 1
    if count:
        # Inner nodes of a pattern go unless something else reads them.
        graph.prune()
    return count


class _Expressions:
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

    def factors(self, value: str, whole: Collection[str] = (), depth: int = _MAX_DEPTH) -> tuple[_Factors, float]:
        """A product as its factors with their exponents, and the product of its constants.

        `whole` are values that count as factors although they are products themselves.
        """
        node, number = self.makers.get(value), self.number(value)
        if number is not None:
            return {}, number
        if node is None or value in whole or depth == 0:
            return {value: 1}, 1.0
        power = self.number(node.inputs[1]) if node.op == "Pow" else _POWERS.get(node.op)
        if power is not None:
            # A root of a square is no factor again, but its absolute value.
            if power not in (-1, 2, 3):
                return {node.inputs[0]: power}, 1.0
            terms = [(node.inputs[0], int(power))]
        elif node.op in ("Mul", "Div"):
            terms = list(zip(node.inputs, (1, 1 if node.op == "Mul" else -1), strict=True))
        else:
            return {value: 1}, 1.0
        out, product = _Factors(), 1.0
        for operand, exponent in terms:
            inner, number = self.factors(operand, whole, depth - 1)
            if exponent < 0 and not number:
                return {value: 1}, 1.0
            product *= number**exponent
            for name, times in inner.items():
                out[name] = out.get(name, 0) + times * exponent
        return out, product

    def is_product(self, value: str, factors: _Factors, number: float = 1.0, whole: Collection[str] = ()) -> bool:
        """Whether a value is the product of these factors and a constant, up to rounding."""
        found, product = self.factors(value, whole)
        return found == factors and math.isclose(product, number, rel_tol=_CONSTANT_TOLERANCE)

    def sums(self, value: str) -> Iterator[tuple[str, str]]:
        """The operands of a sum of two, in both orders."""
        node = self.maker(value, "Add")
        return itertools.permutations(node.inputs) if node is not None else iter(())  # type: ignore[return-value]


# -- activations -------------------------------------------------------------------------------------------------------


def _softplus_input(expressions: _Expressions, node: Node) -> str | None:
    """The input of PyTorch's softplus, which returns x itself from a bound on; in float32 that is the same number."""
    condition, x, soft = node.inputs
    greater, inner = expressions.maker(condition, "Greater"), expressions.maker(soft, "Softplus")
    if greater is None or inner is None or greater.inputs[0] != x or inner.inputs[0] != x:
        return None
    bound = expressions.number(greater.inputs[1])
    return x if bound is not None and bound >= _SOFTPLUS_LINEAR_FROM else None


def _match_activation(expressions: _Expressions, node: Node) -> tuple[str, list[str], dict[str, object]] | None:
    """Gelu, 0.5 x (1 + erf(x / √2)) or its form by tanh, or Mish, x tanh(softplus(x)): operator, inputs, attributes."""
    values, number = expressions.factors(node.outputs[0])
    if list(values.values()) != [1, 1]:
        return None
    for x, curve in itertools.permutations(values):
        if expressions.trace.shapes.get(x) != expressions.trace.shapes[node.outputs[0]]:
            continue
        tanh = expressions.maker(curve, "Tanh")
        soft = expressions.maker(tanh.inputs[0], "Softplus") if tanh is not None else None
        if number == 1 and soft is not None and soft.inputs[0] == x:
            return "Mish", [x], {}
        for inner, one in expressions.sums(curve) if math.isclose(number, 0.5, rel_tol=_CONSTANT_TOLERANCE) else ():
            step = expressions.maker(inner, "Erf", "Tanh")
            if step is None or not expressions.is_product(one, {}):
                continue
            if step.op == "Erf" and expressions.is_product(step.inputs[0], {x: 1}, math.sqrt(0.5)):
                return "Gelu", [x], {"approximate": "none"}
            if step.op == "Tanh" and _is_cubic(expressions, step.inputs[0], x):
                return "Gelu", [x], {"approximate": "tanh"}
    return None


def _is_cubic(expressions: _Expressions, value: str, x: str) -> bool:
    """Whether a value is √(2 / π) times x + c x³, or times x and 1 + c x²."""
    inside, _ = expressions.factors(value)
    power = 2 if x in inside else 3
    return any(
        expressions.is_product(value, {x: 1, curve: 1} if power == 2 else {curve: 1}, math.sqrt(2 / math.pi))
        and expressions.is_product(low, {} if power == 2 else {x: 1})
        and expressions.is_product(high, {x: power}, GELU_CUBE)
        for curve in inside
        for low, high in expressions.sums(curve)
    )


# -- norms -------------------------------------------------------------------------------------------------------------


class _Norm(NamedTuple):
    """A norm in primitives, before scale and bias: the operator, its input, the pattern's last node, the axes (of a
    GroupNormalization the channels), and the constant scale and bias of its channels, if it has them."""

    op: str
    x: str
    last: Node
    axes: tuple[int, ...]
    attrs: dict[str, object]
    vectors: tuple[Array, ...] = ()


def _match_norm(expressions: _Expressions, node: Node) -> _Norm | None:
    if node.op == "Reshape":
        return _match_group_norm(expressions, node)
    if node.op not in ("Div", "Mul"):
        return None
    # x / sqrt(mean x² + epsilon), where x may be a value minus its mean.
    for x, root in itertools.permutations(node.inputs) if node.op == "Mul" else [node.inputs]:
        inverse, number = expressions.factors(root)
        if number != 1 or list(inverse.values()) != [-0.5 if node.op == "Mul" else 0.5]:
            continue
        for mean, epsilon in expressions.sums(next(iter(inverse))):
            axes, small = _mean_axes(expressions, mean), expressions.number(epsilon)
            if axes is None or small is None or not 0 < small < 1:
                continue
            square, attrs = expressions.makers[mean].inputs[0], {"epsilon": small}
            if expressions.is_product(square, {x: 2}, whole=[x]):
                centre = _centre(expressions, x)
                if centre is not None and centre[1] == axes:
                    return _Norm("LayerNormalization", centre[0], node, axes, {**attrs})
                return _Norm("RMSNormalization", x, node, axes, {**attrs})
            inside, number = expressions.factors(square)
            centres = {_centre(expressions, value) for value in (x, *inside)}
            source = next(iter(centres))
            if number == 1 and sum(inside.values()) == 2 and len(centres) == 1 and source and source[1] == axes:
                return _Norm("LayerNormalization", source[0], node, axes, {**attrs})
    return None


def _mean_axes(expressions: _Expressions, value: str) -> tuple[int, ...] | None:
    """The axes of a mean with keepdims; None if a value is another one, or the batch is among the axes."""
    node = expressions.maker(value, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1) or "axes" not in node.attrs:
        return None
    rank = len(expressions.trace.shapes[node.inputs[0]])
    axes = tuple(sorted(a % rank for a in node.attrs["axes"]))
    # A mean over the batch belongs to a batch norm.
    return axes if axes and axes[0] > 0 else None


def _centre(expressions: _Expressions, value: str) -> tuple[str, tuple[int, ...]] | None:
    """The x and the axes of x − mean(x); None if a value is another one."""
    node = expressions.maker(value, "Sub")
    axes = _mean_axes(expressions, node.inputs[1]) if node is not None else None
    if node is None or axes is None or expressions.makers[node.inputs[1]].inputs[0] != node.inputs[0]:
        return None
    return node.inputs[0], axes


def _match_group_norm(expressions: _Expressions, node: Node) -> _Norm | None:
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
    if any(n not in expressions.constants or n not in expressions.graph.initializers for n in normal.inputs[1:3]):
        return None
    vectors = (np.repeat(expressions.graph.initializers[n], channels // groups) for n in normal.inputs[1:3])
    attrs: dict[str, object] = {"num_groups": groups, "epsilon": normal.attrs.get("epsilon", 1e-5)}
    return _Norm("GroupNormalization", x, node, (1,), attrs, tuple(vectors))


def _replace_norm(expressions: _Expressions, norm: _Norm) -> None:
    """Replace the last node of a pattern by the operator, with the scale and bias that follow, or ones and zeros."""
    graph, trace, last = expressions.graph, expressions.trace, norm.last
    is_group, shape = norm.op == "GroupNormalization", trace.shapes[norm.x]
    scale, bias = norm.vectors or (np.ones([shape[a] for a in norm.axes]), np.zeros(0))
    inputs, nodes = list[str](), list[Node]()
    # No vectors are multiplied here: those that follow are taken only if the norm's own are 1 and 0.
    for op, own in (("Mul", scale), ("Add", bias)) if norm.op != "RMSNormalization" else (("Mul", scale),):
        follows = bool((scale == 1).all() and (bias == 0).all())
        found = _following_vector(expressions, norm, last.outputs[0], op, nodes) if follows else None
        if found is not None:
            name, last = found
            inputs.append(name)
        elif op == "Mul" or is_group:
            inputs.append(graph.constant(own, np.float32))
    out = last.outputs[0]
    attrs = norm.attrs if is_group else {**norm.attrs, "axis": -len(norm.axes)}
    order = [a for a in range(len(shape)) if a not in norm.axes] + list(norm.axes)
    if is_group or order == sorted(order):
        nodes.append(Node(norm.op, [norm.x, *inputs], [out], attrs, out))
    else:
        transposed, normal = graph.fresh("Transpose"), graph.fresh(norm.op)
        nodes.append(Node("Transpose", [norm.x], [transposed], {"perm": order}, transposed))
        nodes.append(Node(norm.op, [transposed, *inputs], [normal], attrs, normal))
        nodes.append(Node("Transpose", [normal], [out], {"perm": [order.index(a) for a in range(len(order))]}, out))
    index = next(i for i, n in enumerate(graph.nodes) if n is last)
    graph.nodes[index : index + 1] = nodes
    expressions.makers[out] = nodes[-1]


def _following_vector(
    expressions: _Expressions, norm: _Norm, value: str, op: str, nodes: list[Node]
) -> tuple[str, Node] | None:
    """The scale (`op` Mul) or bias (Add) that is applied to a value, in the norm's shape, and the node that applies it;
    None if there is none. A reshape that it needs is added to `nodes`.

    The value must have no other reader: otherwise the norm would be computed twice.
    """
    graph, trace = expressions.graph, expressions.trace
    readers = [n for n in graph.nodes if value in n.inputs]
    if len(readers) != 1 or readers[0].op != op or readers[0].domain or readers[0].inputs.count(value) != 1:
        return None
    reader, x_shape = readers[0], trace.shapes[norm.x]
    operand = next(i for i in reader.inputs if i != value)
    # An operand that is computed from data is no vector of the norm.
    if operand in expressions.from_data or operand not in trace.shapes or trace.dtypes[operand] != np.float32:
        return None
    full = (1,) * (len(x_shape) - len(trace.shapes[operand])) + trace.shapes[operand]
    expected = tuple(size if a in norm.axes else 1 for a, size in enumerate(x_shape))
    if full != expected or trace.shapes[reader.outputs[0]] != x_shape or any(p.name == value for p in graph.outputs):
        return None
    shape = tuple(x_shape[a] for a in norm.axes)
    # Back through reshapes to the stored vector.
    while trace.shapes[operand] != shape and (node := expressions.maker(operand, "Reshape", "Unsqueeze", "Squeeze")):
        operand = node.inputs[0]
    if trace.shapes[operand] == shape:
        return operand, reader
    if operand in expressions.constants:
        return graph.constant(graph.initializers[operand].reshape(shape), np.float32), reader
    if len(shape) != 1:
        return None
    flat = graph.fresh("Reshape")
    nodes.append(Node("Reshape", [operand, graph.ints(-1)], [flat], {}, flat))
    return flat, reader
