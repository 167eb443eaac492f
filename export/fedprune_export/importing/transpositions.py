"""Finds transpositions in disguise, and writes each as one Transpose.

Axes that a reshape merges, that are transposed, and that a reshape splits again are transposed as a whole. PyTorch
writes the keys of an attention in this way: it merges (batch, heads, positions, dims) to (batch × heads, positions,
dims), transposes that, and splits it. In one transposition no axis of heads is merged with the batch, so that heads can
be cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprune_export.channels.factors import common_factors, extents
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.trace import BATCH_EXTENT, Trace


def merge_transpositions(graph: Graph, trace: Trace) -> None:
    """Write a reshape, transpositions and a reshape as one transposition of all factors, where that is the same.

    A transposition that takes another one back becomes an Identity.
    """
    makers = {name: node for name, node in graph.producers().items() if not node.domain}
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        if node.op == "Reshape" and not node.domain:
            _merge_transposition(graph, node, makers, trace)
        elif node.op == "Transpose" and not node.domain:
            _undo_transposition(node, makers)
        graph.nodes.append(node)
    graph.prune()


def _undo_transposition(node: Node, makers: Mapping[str, Node]) -> None:
    maker = makers.get(node.inputs[0])
    if maker is None or maker.op != "Transpose":
        return
    there, back = maker.attrs.get("perm"), node.attrs.get("perm")
    # Without an order both reverse the axes.
    if there is back is None or (there and back and [there[i] for i in back] == sorted(there)):
        node.op, node.inputs, node.attrs = "Identity", maker.inputs[:1], {}


def _merge_transposition(graph: Graph, node: Node, makers: Mapping[str, Node], trace: Trace) -> None:
    """Merge this reshape with the transpositions and the reshape before it, where they are one transposition."""
    after = _extents_or_none(trace, node.outputs[0])
    name, perm = node.inputs[0], list(range(len(_extents_or_none(trace, node.inputs[0]) or [])))
    # Backwards to the reshape before this one; the transpositions between are composed into one.
    while True:
        maker = makers.get(name)
        if maker is None or maker.op not in ("Reshape", "Transpose"):
            return
        before, between = _extents_or_none(trace, maker.inputs[0]), _extents_or_none(trace, name)
        if before is None or between is None or after is None or len(between) != len(perm):
            return
        if maker.op == "Transpose":
            step = list(maker.attrs.get("perm", range(len(perm))[::-1]))
            perm = [step[i] for i in perm]
        elif before != between:
            break
        name = maker.inputs[0]
    common = common_factors(before, between)
    if common is None or perm == sorted(perm):
        return
    factors, spans = common
    order = [factor for axis in perm for factor in spans[axis]]
    transposed = [factors[f] for f in order]
    exact = transposed == after
    frees_batch = _merges_batch(before, between) and not _merges_batch(factors, after)
    # Every axis after the reshape must be a product of consecutive factors.
    regrouped = common_factors(transposed, after) if frees_batch else None
    if not exact and (regrouped is None or regrouped[0] != transposed):
        return
    # The target of a reshape has one −1, so only one factor can depend on the batch.
    if sum(f % BATCH_EXTENT == 0 for f in factors) > 1:
        return
    source = maker.inputs[0]
    if factors != before:
        source = graph.emit("Reshape", source, _reshape_target(graph, factors))
    if exact:
        node.op, node.inputs, node.attrs = "Transpose", [source], {"perm": order}
    else:
        node.inputs = [graph.emit("Transpose", source, attrs={"perm": order}), _reshape_target(graph, after)]
        node.attrs.pop("allowzero", None)


def _merges_batch(before: Sequence[int], between: Sequence[int]) -> bool:
    """Whether a reshape merges the batch with another axis."""
    return any(b % BATCH_EXTENT == 0 and b not in before for b in between)


def _reshape_target(graph: Graph, sizes: Sequence[int]) -> str:
    """The target of a reshape to these sizes, with −1 for the one that depends on the batch."""
    return graph.ints(*(-1 if n % BATCH_EXTENT == 0 else n for n in sizes))


def _extents_or_none(trace: Trace, name: str) -> list[int] | None:
    """The sizes of a value as `channels.factors` compares them; None if it wasn't traced."""
    return extents(trace, name) if name in trace.shapes else None
