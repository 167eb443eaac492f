"""Norms that exporters and people write out in primitives, found again.

LayerNorm and RMSNorm from means of squares, over the last axes or (between two transposes) over others; GroupNorm from
an instance norm of a reshaped value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container
from dataclasses import dataclass

import numpy as np

from fedprune_export.importing.patterns import Expressions
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_SHAPING = ("Reshape", "Unsqueeze", "Squeeze")


@dataclass(frozen=True)
class _Found:
    """A norm without its vectors.

    Attributes:
        op: Which.
        x: What is normalised.
        value: The result.
        axes: Axes that are normalised together, ascending; of a GroupNormalization the channels.
        attrs: epsilon, num_groups.
        scale: Constant scale and bias of channels that are a part of it, if any.
    """

    op: str
    x: str
    value: str
    axes: tuple[int, ...]
    attrs: dict[str, object]
    scale: tuple[np.ndarray[tuple[int, ...], np.dtype[np.float32]], ...] = ()


def find_norms(graph: Graph, seen: Trace, constants: Container[str]) -> int:
    """Replace norms in primitives by the operators; returns how many."""
    found = 0
    while True:
        expressions = Expressions.of(graph, seen, constants)
        match = next(filter(None, (_norm(expressions, n) for n in graph.nodes)), None)
        if match is None:
            return found
        _replace(expressions, match)
        graph.prune()
        found += 1


def _norm(expressions: Expressions, node: Node) -> _Found | None:
    if node.domain or node.outputs[0] not in expressions.seen.shapes:
        return None
    if node.op in ("Div", "Mul"):
        return _by_squares(expressions, node)
    return _grouped(expressions, node) if node.op == "Reshape" else None


# -- LayerNorm and RMSNorm -------------------------------------------------------------------------------------------


def _by_squares(expressions: Expressions, node: Node) -> _Found | None:
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
            return _Found("LayerNormalization", centre[0], node.outputs[0], axes, {"epsilon": epsilon})
        if inside == Counter({x: 2}):
            return _Found("RMSNormalization", x, node.outputs[0], axes, {"epsilon": epsilon})
    return None


def _root(expressions: Expressions, value: str) -> tuple[str, float] | None:
    """A mean and epsilon, from sqrt(mean + epsilon)."""
    node = expressions.made_by(value, "Sqrt", "Pow")
    if node is None or (node.op == "Pow" and not expressions.is_number(node.inputs[1], 0.5)):
        return None
    return _with_epsilon(expressions, node.inputs[0])


def _inverse_root(expressions: Expressions, value: str) -> tuple[str, float] | None:
    """A mean and epsilon, from 1 / sqrt(mean + epsilon)."""
    node = expressions.made_by(value, "Reciprocal", "Div", "Pow")
    if node is None:
        return None
    if node.op == "Pow":
        return _with_epsilon(expressions, node.inputs[0]) if expressions.is_number(node.inputs[1], -0.5) else None
    if node.op == "Div" and not expressions.is_number(node.inputs[0], 1.0):
        return None
    return _root(expressions, node.inputs[-1])


def _with_epsilon(expressions: Expressions, value: str) -> tuple[str, float] | None:
    node = expressions.made_by(value, "Add")
    for mean, epsilon in (node.inputs, node.inputs[::-1]) if node is not None else ():
        number = expressions.number(epsilon)
        if number is not None and 0 < number < 1:
            return mean, number
    return None


def _mean_axes(expressions: Expressions, value: str) -> tuple[int, ...] | None:
    """The axes of a mean that keeps them, none of which is the batch."""
    node = expressions.made_by(value, "ReduceMean")
    if node is None or not node.attrs.get("keepdims", 1) or "axes" not in node.attrs:
        return None
    rank = len(expressions.seen.shapes[node.inputs[0]])
    axes = tuple(sorted(a % rank for a in node.attrs["axes"]))
    return axes if axes and axes[0] > 0 else None


def _centre(expressions: Expressions, value: str) -> tuple[str, tuple[int, ...]] | None:
    """A value and the axes over which its mean is taken away."""
    node = expressions.made_by(value, "Sub")
    if node is None:
        return None
    axes = _mean_axes(expressions, node.inputs[1])
    if axes is None or expressions.makers[node.inputs[1]].inputs[0] != node.inputs[0]:
        return None
    return node.inputs[0], axes


# -- GroupNorm -------------------------------------------------------------------------------------------------------


def _grouped(expressions: Expressions, node: Node) -> _Found | None:
    """An instance norm of [batch, groups, rest] between two reshapes, the second of which goes back."""
    seen, normal = expressions.seen, expressions.made_by(node.inputs[0], "InstanceNormalization")
    first = expressions.made_by(normal.inputs[0], "Reshape") if normal else None
    if normal is None or first is None:
        return None
    x, inner = first.inputs[0], seen.dims(first.outputs[0])
    outer = seen.dims(x)
    if outer != seen.dims(node.outputs[0]) or len(outer) < 3 or outer[0] is not None or inner[0] is not None:
        return None
    channels, groups = outer[1], inner[1]
    if channels is None or groups is None or channels % groups or None in outer[1:]:
        return None
    vectors = [expressions.graph.initializers.get(i) for i in normal.inputs[1:3]]
    if any(v is None or n not in expressions.constants for v, n in zip(vectors, normal.inputs[1:3], strict=True)):
        return None
    attrs: dict[str, object] = {"num_groups": groups, "epsilon": normal.attrs.get("epsilon", 1e-5)}
    scale, bias = (np.repeat(v, channels // groups) for v in vectors if v is not None)
    return _Found("GroupNormalization", x, node.outputs[0], (1,), attrs, (scale, bias))


# -- vectors ---------------------------------------------------------------------------------------------------------


def _replace(expressions: Expressions, found: _Found) -> None:
    """Put the operator where the pattern ends, with the scale and bias that follow, or ones and zeros."""
    graph = expressions.graph
    shape = tuple(expressions.seen.shapes[found.x][a] for a in found.axes)
    value, last = found.value, expressions.makers[found.value]
    scale: str | None = None
    bias: str | None = None
    nodes: list[Node] = []
    plain = not found.scale or bool((found.scale[0] == 1).all() and (found.scale[1] == 0).all())
    if plain and (step := _vector(expressions, found, value, "Mul", shape, nodes)):
        scale, last = step
        value = last.outputs[0]
    if plain and found.op != "RMSNormalization" and (step := _vector(expressions, found, value, "Add", shape, nodes)):
        bias, last = step
    if scale is None:
        scale = graph.constant(found.scale[0] if found.scale else np.ones(shape), np.float32)
    if bias is None and found.op == "GroupNormalization":
        bias = graph.constant(found.scale[1], np.float32)
    inputs = [scale] if bias is None else [scale, bias]
    at = next(i for i, n in enumerate(graph.nodes) if n is last)
    rank, out = len(expressions.seen.shapes[found.x]), last.outputs[0]
    attrs = {**found.attrs, "axis": -len(found.axes)} if found.op != "GroupNormalization" else found.attrs
    if found.op == "GroupNormalization" or found.axes[0] == rank - len(found.axes):
        nodes.append(Node(found.op, [found.x, *inputs], [out], attrs, out))
    else:
        order = [a for a in range(rank) if a not in found.axes] + list(found.axes)
        back = [order.index(a) for a in range(rank)]
        turned, normal = graph.fresh("Transpose"), graph.fresh(found.op)
        nodes.append(Node("Transpose", [found.x], [turned], {"perm": order}, turned))
        nodes.append(Node(found.op, [turned, *inputs], [normal], attrs, normal))
        nodes.append(Node("Transpose", [normal], [out], {"perm": back}, out))
    graph.nodes[at : at + 1] = nodes


def _vector(
    expressions: Expressions, found: _Found, value: str, op: str, shape: tuple[int, ...], nodes: list[Node]
) -> tuple[str, Node] | None:
    """The scale or bias that is applied to a value, in the norm's shape, and the node that applies it.

    The value must have no other reader: else the norm would be computed twice.
    """
    readers = [n for n in expressions.graph.nodes if value in n.inputs]
    if len(readers) != 1 or readers[0].op != op or readers[0].domain or Counter(readers[0].inputs)[value] != 1:
        return None
    if any(p.name == value for p in expressions.graph.outputs):
        return None
    other = next(i for i in readers[0].inputs if i != value)
    seen, rank = expressions.seen, len(expressions.seen.shapes[found.x])
    if other in expressions.from_data or other not in seen.shapes or seen.dtypes[other] != np.float32:
        return None
    full = (1,) * (rank - len(seen.shapes[other])) + seen.shapes[other]
    expected = tuple(seen.shapes[found.x][a] if a in found.axes else 1 for a in range(rank))
    if full != expected or seen.shapes[readers[0].outputs[0]] != seen.shapes[found.x]:
        return None
    while seen.shapes[other] != shape:
        node = expressions.made_by(other, *_SHAPING)
        if node is not None and seen.shapes[node.inputs[0]] == shape:
            return node.inputs[0], readers[0]
        if node is None:
            break
        other = node.inputs[0]
    if seen.shapes[other] == shape:
        return other, readers[0]
    if other in expressions.constants:
        return expressions.graph.constant(expressions.graph.initializers[other].reshape(shape), np.float32), readers[0]
    if len(shape) != 1:
        return None
    flat = expressions.graph.fresh("Reshape")
    nodes.append(Node("Reshape", [other, expressions.graph.ints(-1)], [flat], {}, flat))
    return flat, readers[0]
