"""Transpositions in disguise: axes merged by a reshape, transposed, and parted again.

torch writes the keys of an attention so: (batch, heads, places, dims) as (batch × heads, places, dims), these
transposed, and back. As one transposition no axis of heads is ever merged with the batch, so that heads can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune_export.channels.reshapes import BATCH, common_factors, extents
from fedprune_export.graph import Graph, Node
from fedprune_export.trace import Trace


def merge_transpositions(graph: Graph, seen: Trace) -> None:
    """Write a reshape, transpositions and a reshape as one transposition of all factors, where they are one."""
    makers = {name: node for name, node in graph.producers().items() if not node.domain}
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        if node.op == "Reshape" and not node.domain:
            _merge(graph, node, makers, seen)
        graph.nodes.append(node)
    graph.prune()


def _merge(graph: Graph, node: Node, makers: Mapping[str, Node], seen: Trace) -> None:
    """Look at what lies between this reshape and the one before it."""
    after = _extents(seen, node.outputs[0])
    name, perm = node.inputs[0], list(range(len(_extents(seen, node.inputs[0]) or [])))
    while True:
        maker = makers.get(name)
        if maker is None or maker.op not in ("Reshape", "Transpose"):
            return
        before, between = _extents(seen, maker.inputs[0]), _extents(seen, name)
        if before is None or between is None or after is None or len(between) != len(perm):
            return
        if maker.op == "Transpose":
            own = list(maker.attrs.get("perm", range(len(perm))[::-1]))
            perm = [own[i] for i in perm]
        elif before != between:
            break
        name = maker.inputs[0]
    found = common_factors(before, between)
    if found is None or perm == sorted(perm):
        return
    factors, spans = found
    order = [factor for place in perm for factor in spans[place]]
    free = [f % BATCH == 0 for f in factors]
    if [factors[f] for f in order] != after or sum(free) > 1:
        return
    source = maker.inputs[0]
    if factors != before:
        source = graph.emit(
            "Reshape", source, graph.ints(*(-1 if f else n for f, n in zip(free, factors, strict=True)))
        )
    node.op, node.inputs, node.attrs = "Transpose", [source], {"perm": order}


def _extents(seen: Trace, name: str) -> list[int] | None:
    """Sizes of a value by which shapes can be told apart; None where it wasn't traced."""
    return extents(seen, name) if name in seen.shapes else None
