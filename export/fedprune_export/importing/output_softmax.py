"""Removes a softmax at the end of a model, because the loss contains it: the output becomes logits."""

from __future__ import annotations

import math

import numpy as np

from fedprune.model.step_contract import LOGITS
from fedprune_export.importing.simplification import bypass
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.trace import Trace

# Bounds of probabilities this near to 0 and 1 guard a logarithm; well below checks._TOLERANCE.
_PROBABILITY_MARGIN = 1e-5


def drop_output_softmax(graph: Graph, trace: Trace, notes: list[str]) -> str:
    """Remove a softmax over classes at the end, which the loss contains; the order of the classes stays the same.

    Operators that only rearrange or clip its numbers may follow it. Returns the removed operator; empty without one.
    """
    makers, readers = graph.producers(), graph.consumers()
    followers: list[Node] = []
    last, name = makers.get(LOGITS), LOGITS
    while last is not None and not last.domain and last.op in REARRANGEMENTS | {"Cast", "Clip"}:
        if trace.dtypes[last.outputs[0]].kind != "f":
            return ""
        followers.append(last)
        name = last.inputs[0]
        last = makers.get(name) if len(readers[name]) == 1 else None
    if last is None or last.domain or last.op not in ("Softmax", "LogSoftmax") or LOGITS in readers:
        return ""
    # Without a node before the softmax the input itself would be the logits.
    if last.inputs[0] not in makers or not trace.shapes[name]:
        return ""
    axis: int | None = int(last.attrs.get("axis", -1)) % len(trace.shapes[name])
    clips = [node for node in followers if node.op == "Clip"]
    # A clip that cuts more than the margin of a logarithm changes predictions.
    if any(not _keeps_probabilities(graph, clip) for clip in clips) or (clips and last.op == "LogSoftmax"):
        return ""
    for node in reversed(followers):
        axis = _axis_after(node, axis, trace) if axis is not None else None
    if axis != 1:
        return ""
    notes.append(f"The {last.op} at the end was removed: the output is logits.")
    for node in (last, *clips):
        bypass(graph, node, {LOGITS})
    return last.op


def _keeps_probabilities(graph: Graph, clip: Node) -> bool:
    """Whether a clip leaves probabilities as they are, but for a margin that protects a logarithm."""
    low, high = ([*clip.inputs, "", ""][i] for i in (1, 2))
    are_constant = all(name in graph.initializers for name in (low, high) if name)
    bottom, top = graph.initializers.get(low, np.zeros(1)), graph.initializers.get(high, np.ones(1))
    return are_constant and bool((bottom <= _PROBABILITY_MARGIN).all() and (top >= 1 - _PROBABILITY_MARGIN).all())


def _axis_after(node: Node, axis: int, trace: Trace) -> int | None:
    """The index of an axis after a node that rearranges values; None if the node merges or splits it."""
    if node.op == "Transpose":
        rank = len(trace.shapes[node.inputs[0]])
        return list(node.attrs.get("perm", range(rank)[::-1])).index(axis)
    before, after = trace.shapes[node.inputs[0]], trace.shapes[node.outputs[0]]
    ahead = math.prod(before[:axis])
    candidates = [i for i, size in enumerate(after) if size == before[axis] and math.prod(after[:i]) == ahead]
    return candidates[-1] if candidates else None
