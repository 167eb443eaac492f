"""Transpositions in disguise: axes merged by a reshape, transposed, and parted again.

torch writes the keys of an attention so: (batch, heads, places, dims) as (batch × heads, places, dims), these
transposed, and back. As one transposition no axis of heads is ever merged with the batch, so that heads can be cut.
"""

from __future__ import annotations

import math

from fedprune_export.graph import Graph, Node
from fedprune_export.trace import Trace


def merge_transpositions(graph: Graph, seen: Trace) -> None:
    """Write a reshape, a transposition and a reshape as one transposition where they are one."""
    makers = graph.producers()
    for node in graph.nodes:
        moved = _made_by(makers, node, "Reshape", "Transpose")
        merged = _made_by(makers, moved, "Transpose", "Reshape") if moved is not None else None
        if moved is None or merged is None:
            continue
        names = [merged.inputs[0], merged.outputs[0], node.outputs[0]]
        if not all(name in seen.shapes for name in names):
            continue
        before, between, after = ([*zip(seen.shapes[n], seen.shapes_second[n], strict=True)] for n in names)
        perm = moved.attrs.get("perm", list(range(len(between)))[::-1])
        parts = _parts([a for a, _ in before], [a for a, _ in between])
        if parts is None or parts != _parts([b for _, b in before], [b for _, b in between]):
            continue
        order = [axis for place in perm for axis in parts[place]]
        if [before[axis] for axis in order] == after:
            node.op, node.inputs, node.attrs = "Transpose", [merged.inputs[0]], {"perm": order}
    graph.prune()


def _made_by(makers: dict[str, Node], node: Node, op: str, maker: str) -> Node | None:
    """The node that makes the first input of a node of this operator, if it is of that one."""
    if node.op != op or node.domain:
        return None
    found = makers.get(node.inputs[0])
    return found if found is not None and found.op == maker and not found.domain else None


def _parts(before: list[int], after: list[int]) -> list[list[int]] | None:
    """Per new axis the old axes that a reshape merges into it; None where it does anything else."""
    parts: list[list[int]] = []
    at = 0
    for size in after:
        part: list[int] = []
        while at < len(before) and (not part or math.prod(before[i] for i in part) < size):
            part.append(at)
            at += 1
        if math.prod(before[i] for i in part) != size:
            return None
        parts.append(part)
    while at < len(before) and before[at] == 1 and parts:
        parts[-1].append(at)
        at += 1
    return parts if at == len(before) else None
