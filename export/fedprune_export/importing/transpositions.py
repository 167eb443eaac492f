"""Transpositions in disguise: axes merged by a reshape, transposed, and parted again.

torch writes the keys of an attention so: (batch, heads, places, dims) as (batch × heads, places, dims), these
transposed, and back. As one transposition no axis of heads is ever merged with the batch, so that heads can be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprune_export.channels.reshapes import common_factors, extents
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import BATCH_EXTENT, Trace


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
    moved = [factors[f] for f in order]
    exact = moved == after
    parted = _hides_batch(before, between) and not _hides_batch(factors, after)
    if not exact and not (parted and _merges(moved, after)):
        return
    if sum(f % BATCH_EXTENT == 0 for f in factors) > 1:
        return
    source = maker.inputs[0]
    if factors != before:
        source = graph.emit("Reshape", source, _target(graph, factors))
    if exact:
        node.op, node.inputs, node.attrs = "Transpose", [source], {"perm": order}
    else:
        node.inputs = [graph.emit("Transpose", source, attrs={"perm": order}), _target(graph, after)]
        node.attrs.pop("allowzero", None)


def _hides_batch(before: Sequence[int], between: Sequence[int]) -> bool:
    """Whether a reshape merges the batch with another axis."""
    return any(b % BATCH_EXTENT == 0 and b not in before for b in between)


def _merges(fine: Sequence[int], coarse: Sequence[int]) -> bool:
    """Whether every coarse axis is made of whole fine ones."""
    found = common_factors(fine, coarse)
    return found is not None and found[0] == list(fine)


def _target(graph: Graph, sizes: Sequence[int]) -> str:
    """A target of a reshape with the batch free."""
    return graph.ints(*(-1 if n % BATCH_EXTENT == 0 else n for n in sizes))


def _extents(seen: Trace, name: str) -> list[int] | None:
    """Sizes of a value by which shapes can be told apart; None where it wasn't traced."""
    return extents(seen, name) if name in seen.shapes else None
