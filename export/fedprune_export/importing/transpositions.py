"""Transpositions in disguise: axes merged by a reshape, transposed, and parted again.

torch writes the keys of an attention so: (batch, heads, places, dims) as (batch × heads, places, dims), these
transposed, and back. As one transposition no axis of heads is ever merged with the batch, so that heads can be cut.
"""

from __future__ import annotations

from fedprune_export.channels.reshapes import BATCH, common_factors, extents
from fedprune_export.graph import Graph, Node
from fedprune_export.trace import Trace


def merge_transpositions(graph: Graph, seen: Trace) -> None:
    """Write a reshape, a transposition and a reshape as one transposition of all factors, where they are one."""
    makers = graph.producers()
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        moved = _made_by(makers, node, "Reshape", "Transpose")
        merged = _made_by(makers, moved, "Transpose", "Reshape") if moved is not None else None
        if moved is not None and merged is not None:
            _merge(graph, node, moved, merged, seen)
        graph.nodes.append(node)
    graph.prune()


def _merge(graph: Graph, node: Node, moved: Node, merged: Node, seen: Trace) -> None:
    names = [merged.inputs[0], merged.outputs[0], node.outputs[0]]
    if not all(name in seen.shapes for name in names):
        return
    before, between, after = (extents(seen, name) for name in names)
    if before is None or between is None or after is None:
        return
    found = common_factors(before, between)
    if found is None:
        return
    factors, spans = found
    perm = moved.attrs.get("perm", list(range(len(between)))[::-1])
    order = [factor for place in perm for factor in spans[place]]
    free = [f % BATCH == 0 for f in factors]
    if [factors[f] for f in order] != after or sum(free) > 1:
        return
    source = merged.inputs[0]
    if factors != before:
        source = graph.emit(
            "Reshape", source, graph.ints(*(-1 if f else n for f, n in zip(free, factors, strict=True)))
        )
    node.op, node.inputs, node.attrs = "Transpose", [source], {"perm": order}


def _made_by(makers: dict[str, Node], node: Node, op: str, maker: str) -> Node | None:
    """The node that makes the first input of a node of this operator, if it is of that one."""
    if node.op != op or node.domain:
        return None
    found = makers.get(node.inputs[0])
    return found if found is not None and found.op == maker and not found.domain else None
