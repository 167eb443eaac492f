"""Operators that can be written in several ways, brought into one; those that do nothing, taken out."""

from __future__ import annotations

import math
from collections.abc import Container

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import Trace

_KEEPING = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"})
_ENDLESS = 2**31 - 1
"""Where slices end that go to the end of any axis."""

_NEUTRAL = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0, "Pow": 1.0}
"""What an operator's second operand must be for it to do nothing; the first too where the order doesn't matter."""


def _substitute(graph: Graph, old: str, new: str) -> None:
    """Let every reader of `old` read `new`; an output keeps its name, so its producer takes it over."""
    for node in graph.nodes:
        node.inputs = [new if i == old else i for i in node.inputs]


def drop_idle(graph: Graph) -> None:
    """Take out Identity and Dropout."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.domain or node.op not in ("Identity", "Dropout"):
            continue
        if node.op == "Dropout" and len(node.outputs) > 1 and node.outputs[1] in graph.consumers():
            continue
        bypass(graph, node, outputs)


def bypass(graph: Graph, node: Node, outputs: set[str]) -> None:
    """Remove a node whose first output is its first input."""
    source, target = node.inputs[0], node.outputs[0]
    if target in outputs:
        producer = graph.producers().get(source)
        if producer is None or source in outputs:
            return  # an output that is an input or initialiser keeps its Identity
        producer.outputs = [target if o == source else o for o in producer.outputs]
        _substitute(graph, source, target)
    else:
        _substitute(graph, target, source)
    graph.nodes = [n for n in graph.nodes if n is not node]


def simplify(graph: Graph, seen: Trace, constants: Container[str]) -> None:
    """Bring operators that can be written in several ways into one.

    Raises:
        ModelError: A reduction takes computed axes.
    """
    for node in graph.nodes:
        if node.domain:
            continue
        traced = {i for i in [*node.inputs, *node.outputs] if i} <= seen.shapes.keys()
        if node.op == "Conv" and len(node.inputs) > 2 and node.inputs[2] in constants:
            if not np.any(graph.initializers[node.inputs[2]]):
                node.inputs = node.inputs[:2]
        elif node.op == "Reshape" and traced:
            _reshape(graph, node, seen)
        elif node.op == "ReduceSum":
            _sum(graph, node)
        elif node.op == "Squeeze" and len(node.inputs) < 2 and traced:
            axes = [i for i, d in enumerate(seen.dims(node.inputs[0])) if d == 1]
            node.inputs = [node.inputs[0], graph.ints(*axes)]
        elif node.op in ("Squeeze", "Unsqueeze") and len(node.inputs) == 2:
            target = node.inputs[1]
            if target in graph.initializers:
                node.inputs[1] = graph.ints(*graph.initializers[target].reshape(-1).tolist())
    _merge_reshapes(graph)
    _keep_axes(graph, seen)
    _drop_neutral(graph, seen, constants)


def _reshape(graph: Graph, node: Node, seen: Trace) -> None:
    """Write a flatten as Flatten, and at most one batch-dependent entry of a target as -1."""
    source, target = seen.dims(node.inputs[0]), seen.dims(node.outputs[0])
    flat = len(target) == 2 and len(source) >= 2 and source[0] is None and None not in source[1:]
    if flat and target[0] is None and target[1] == math.prod(d or 1 for d in source[1:]):
        node.op, node.inputs, node.attrs = "Flatten", node.inputs[:1], {"axis": 1}
        return
    if sum(d is None for d in target) <= 1 and 0 not in target:
        node.inputs = [node.inputs[0], graph.ints(*(-1 if d is None else d for d in target))]
        node.attrs.pop("allowzero", None)


def _sum(graph: Graph, node: Node) -> None:
    """The one reduction whose axes opset 17 takes as an input: known ones that are, or no input for all of them."""
    axes: list[int] = []
    if len(node.inputs) > 1 and node.inputs[1]:
        if node.inputs[1] not in graph.initializers:
            raise ModelError(f"operator {node.op} ({node.name}) takes computed axes", expected="constant axes")
        axes = graph.initializers[node.inputs[1]].reshape(-1).tolist()
    nothing = node.attrs.pop("noop_with_empty_axes", 0)
    if axes:
        node.inputs[1:] = [graph.ints(*axes)]
    else:
        node.inputs = node.inputs[:1]
        if nothing:
            node.op, node.attrs = "Identity", {}


def _merge_reshapes(graph: Graph) -> None:
    """A reshape of a reshape reads what that read."""
    makers = graph.producers()
    for node in graph.nodes:
        if node.domain or node.op != "Reshape" or 0 in graph.initializers.get(node.inputs[1], np.zeros(1)):
            continue
        before = makers.get(node.inputs[0])
        while before is not None and before.op == "Reshape" and not before.domain:
            node.inputs[0] = before.inputs[0]
            before = makers.get(node.inputs[0])
    graph.prune()


def _keep_axes(graph: Graph, seen: Trace) -> None:
    """A reduction whose axes a reshape puts back keeps them instead."""
    makers, readers = graph.producers(), graph.consumers()
    outputs = {p.name for p in graph.outputs}
    for node in graph.nodes:
        if node.domain or node.op not in ("Reshape", "Unsqueeze") or node.outputs[0] not in seen.shapes:
            continue
        before = makers.get(node.inputs[0])
        if before is None or before.domain or before.op not in _KEEPING or before.attrs.get("keepdims", 1):
            continue
        axes = before.attrs.get("axes")
        if before.op == "ReduceSum" and len(before.inputs) > 1 and before.inputs[1] in graph.initializers:
            axes = graph.initializers[before.inputs[1]].tolist()
        kept = before.outputs[0]
        if not axes or kept in outputs or len(readers[kept]) != 1 or before.inputs[0] not in seen.shapes:
            continue
        source = seen.dims(before.inputs[0])
        gone = {a % len(source) for a in axes}
        same = seen.dims(node.outputs[0]) == tuple(1 if i in gone else d for i, d in enumerate(source))
        if same and all(source[a] is not None for a in gone):
            before.attrs["keepdims"], before.outputs = 1, list(node.outputs)
            node.outputs = []
    graph.nodes = [n for n in graph.nodes if n.outputs]


def _drop_neutral(graph: Graph, seen: Trace, constants: Container[str]) -> None:
    """Take out products with one, sums with zero and expansions to the shape that a value has."""
    outputs = {p.name for p in graph.outputs}
    for node in list(graph.nodes):
        if node.op == "Slice" and not node.domain and _is_whole(graph, seen, node):
            node.inputs = node.inputs[:1]
            bypass(graph, node, outputs)
            continue
        if node.op == "Concat" and not node.domain and len(node.inputs) == 1:
            bypass(graph, node, outputs)
            continue
        if node.op == "ScatterND" and not node.domain and _overwrites(seen, node):
            node.inputs = node.inputs[2:]
            bypass(graph, node, outputs)
            continue
        if node.domain or len(node.inputs) != 2 or node.outputs[0] not in seen.shapes:
            continue
        for x, other in (node.inputs, node.inputs[::-1]):
            if x not in seen.shapes or seen.dims(x) != seen.dims(node.outputs[0]):
                continue
            if other != node.inputs[1] and node.op not in ("Mul", "Add"):
                continue
            value = graph.initializers.get(other)
            neutral = (
                value is not None
                and other in constants
                and node.op in _NEUTRAL
                and value.dtype == np.float32
                and bool((value == _NEUTRAL[node.op]).all())
            )
            if neutral or node.op == "Expand":
                node.inputs = [x]
                bypass(graph, node, outputs)
                break


def _is_whole(graph: Graph, seen: Trace, node: Node) -> bool:
    """Whether a slice takes everything."""
    arguments = [graph.initializers.get(i) for i in node.inputs[1:] if i]
    if any(a is None for a in arguments) or not {node.inputs[0], node.outputs[0]} <= seen.shapes.keys():
        return False
    starts, ends = (a.tolist() for a in arguments[:2] if a is not None)
    steps = graph.initializers[node.inputs[4]] if len(node.inputs) > 4 and node.inputs[4] else np.ones(1)
    whole = all(s == 0 and e >= _ENDLESS for s, e in zip(starts, ends, strict=True))
    sizes = seen.dims(node.inputs[0])
    return bool((steps == 1).all()) and (whole or (None not in sizes and sizes == seen.dims(node.outputs[0])))


def _overwrites(seen: Trace, node: Node) -> bool:
    """Whether a scatter puts every row of its updates in its own place: torch's `x[:] = y`."""
    data, places, updates = node.inputs
    if node.attrs.get("reduction", "none") != "none" or not {data, updates} <= seen.shapes.keys():
        return False
    runs = [(seen.integers.get(places), seen.shapes), (seen.integers_second.get(places), seen.shapes_second)]
    return seen.dims(data) == seen.dims(updates) and all(
        rows is not None and np.array_equal(rows, np.arange(shapes[data][0])[:, None]) for rows, shapes in runs
    )
