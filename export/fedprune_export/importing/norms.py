"""Recognises norms that are written in primitives, and replaces each by a single operator.

LayerNorm and RMSNorm are recognised by the mean of squares, over the last axes or (between two transposes) over others;
GroupNorm by an instance norm of a reshaped value. A match replaces only the last node of a pattern: the others stay if
something else reads them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedprune_export.importing.expressions import Expressions
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_RESHAPES = ("Reshape", "Unsqueeze", "Squeeze")


@dataclass(frozen=True)
class _NormMatch:
    """A norm that was recognised in primitives, before scale and bias.

    Attributes:
        op: The operator that replaces it.
        x: The value that is normalised.
        last: The pattern's last node.
        axes: Axes that are normalised together, ascending; of a GroupNormalization the channels.
        scale_and_bias: The constant scale and bias of its channels, if it has them.
    """

    op: str
    x: str
    last: Node
    axes: tuple[int, ...]
    attrs: dict[str, object]
    scale_and_bias: tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...] = ()


class _ScaleOrBias(NamedTuple):
    """The scale or bias that is applied to a norm: its name, the node that applies it, and a reshape that it needs."""

    name: str
    node: Node
    reshape: Node | None = None


def replace_norms(graph: Graph, trace: Trace, constants: Container[str]) -> int:
    """Replace norms in primitives by the operators; returns how many."""
    count = 0
    while True:
        # One match at a time: each replacement changes the nodes that the next one has to read.
        expressions = Expressions(graph, trace, constants)
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


def _match_by_squares(expressions: Expressions, node: Node) -> _NormMatch | None:
    """LayerNorm and RMSNorm: x / sqrt(mean x^2 + epsilon), where x may be a value minus its mean."""
    for x, root in (node.inputs, node.inputs[::-1]):
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
            return _NormMatch("LayerNormalization", centre[0], node, axes, {"epsilon": epsilon})
        if inside == Counter({x: 2}):
            return _NormMatch("RMSNormalization", x, node, axes, {"epsilon": epsilon})
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
    """The axes of a mean with keepdims; None if a value is another one, or the batch is among the axes."""
    node = expressions.maker(value, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1) or "axes" not in node.attrs:
        return None
    rank = len(expressions.trace.shapes[node.inputs[0]])
    axes = tuple(sorted(a % rank for a in node.attrs["axes"]))
    # A mean over the batch belongs to a batch norm.
    return axes if axes and axes[0] > 0 else None


def _centre(expressions: Expressions, value: str) -> tuple[str, tuple[int, ...]] | None:
    """The x and the axes of x − mean(x); None if a value is another one."""
    node = expressions.maker(value, "Sub")
    if node is None:
        return None
    axes = _mean_axes(expressions, node.inputs[1])
    if axes is None or expressions.makers[node.inputs[1]].inputs[0] != node.inputs[0]:
        return None
    return node.inputs[0], axes


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
    return _NormMatch("GroupNormalization", x, node, (1,), attrs, (scale, bias))


def _replace_norm(expressions: Expressions, norm: _NormMatch) -> None:
    """Replace the last node of a pattern by the operator, with the scale and bias that follow, or ones and zeros."""
    graph, last = expressions.graph, norm.last
    scale = bias = None
    # A norm with a scale and bias of its own takes those that follow only if its own are 1 and 0: no vectors are
    # multiplied here.
    if not norm.scale_and_bias or bool((norm.scale_and_bias[0] == 1).all() and (norm.scale_and_bias[1] == 0).all()):
        scale = _following_vector(expressions, norm, last.outputs[0], "Mul")
        last = scale.node if scale else last
        if norm.op != "RMSNormalization":
            bias = _following_vector(expressions, norm, last.outputs[0], "Add")
            last = bias.node if bias else last
    is_group = norm.op == "GroupNormalization"
    if scale:
        inputs = [scale.name]
    else:
        ones = np.ones([expressions.trace.shapes[norm.x][a] for a in norm.axes])
        inputs = [graph.constant(norm.scale_and_bias[0] if norm.scale_and_bias else ones, np.float32)]
    if bias or is_group:
        inputs.append(bias.name if bias else graph.constant(norm.scale_and_bias[1], np.float32))
    nodes = [vector.reshape for vector in (scale, bias) if vector and vector.reshape]
    rank, out = len(expressions.trace.shapes[norm.x]), last.outputs[0]
    attrs = norm.attrs if is_group else {**norm.attrs, "axis": -len(norm.axes)}
    if is_group or norm.axes[0] == rank - len(norm.axes):
        nodes.append(Node(norm.op, [norm.x, *inputs], [out], attrs, out))
    else:
        order = [a for a in range(rank) if a not in norm.axes] + list(norm.axes)
        back = [order.index(a) for a in range(rank)]
        transposed, normal = graph.fresh("Transpose"), graph.fresh(norm.op)
        nodes.append(Node("Transpose", [norm.x], [transposed], {"perm": order}, transposed))
        nodes.append(Node(norm.op, [transposed, *inputs], [normal], attrs, normal))
        nodes.append(Node("Transpose", [normal], [out], {"perm": back}, out))
    index = next(i for i, n in enumerate(graph.nodes) if n is last)
    graph.nodes[index : index + 1] = nodes


def _following_vector(expressions: Expressions, norm: _NormMatch, value: str, op: str) -> _ScaleOrBias | None:
    """The scale (`op` Mul) or bias (Add) that is applied to a value, in the norm's shape; None if there is none.

    The value must have no other reader: otherwise the norm would be computed twice.
    """
    graph, trace = expressions.graph, expressions.trace
    readers = [n for n in graph.nodes if value in n.inputs]
    if len(readers) != 1 or readers[0].op != op or readers[0].domain or Counter(readers[0].inputs)[value] != 1:
        return None
    if any(p.name == value for p in graph.outputs):
        return None
    reader, x_shape = readers[0], trace.shapes[norm.x]
    operand = next(i for i in reader.inputs if i != value)
    # An operand that is computed from data is no vector of the norm.
    if operand in expressions.from_data or operand not in trace.shapes or trace.dtypes[operand] != np.float32:
        return None
    full = (1,) * (len(x_shape) - len(trace.shapes[operand])) + trace.shapes[operand]
    expected = tuple(size if a in norm.axes else 1 for a, size in enumerate(x_shape))
    if full != expected or trace.shapes[reader.outputs[0]] != x_shape:
        return None
    shape = tuple(x_shape[a] for a in norm.axes)
    # Back through reshapes to the stored vector.
    while trace.shapes[operand] != shape and (node := expressions.maker(operand, *_RESHAPES)) is not None:
        operand = node.inputs[0]
    if trace.shapes[operand] == shape:
        return _ScaleOrBias(operand, reader)
    if operand in expressions.constants:
        return _ScaleOrBias(graph.constant(graph.initializers[operand].reshape(shape), np.float32), reader)
    if len(shape) != 1:
        return None
    flat = graph.fresh("Reshape")
    return _ScaleOrBias(flat, reader, Node("Reshape", [operand, graph.ints(-1)], [flat], {}, flat))
