"""Finds out, by values on random samples, whether a graph's output is probabilities, and of which logits."""

from __future__ import annotations

from collections.abc import Container
from contextlib import suppress

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.trace import run_values

_SAMPLES = 4
_LARGE_SCALE = 30.0  # of further samples, for which outputs that are no probabilities leave their range
_TOLERANCE = 1e-4

# An output that one of these makes with a weight takes any values: nothing has to be run.
_LINEAR_OPERATORS = frozenset({"Add", "Conv", "ConvTranspose", "Gemm", "MatMul"})
# Neither do these bound them.
_UNBOUNDED_OPERATORS = REARRANGEMENTS | {"AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMean", "Relu"}


def find_probabilities(graph: Graph, weights: Container[str]) -> tuple[int | None, str] | None:
    """The axis along which a graph's outputs sum to 1 (None without one), and the first value whose softmax or sigmoid
    they are (empty without one); None if any of them is no probability.

    `weights`: initialisers that aren't constants.
    """
    output = graph.outputs[0].name
    node = last_node(graph, _UNBOUNDED_OPERATORS)
    if node is not None and node.op in _LINEAR_OPERATORS and any(i in weights for i in node.inputs):
        return None
    runs = [run_values(graph, [output], _SAMPLES)[output]]
    with suppress(ModelError):  # identifiers may come as floats, and large ones have no row in a table
        runs.append(run_values(graph, [output], _SAMPLES, _LARGE_SCALE)[output])
    together = np.stack(runs).astype(np.float64)
    # Logits that begin at 0 have no value within the range.
    if not (np.abs(together - 0.5) <= 0.5 + _TOLERANCE).all() or not ((together > 0) & (together < 1)).any():
        return None
    shares = together[0]
    sums = {a: together.sum(a + 1) for a in range(1, shares.ndim) if shares.shape[a] > 1}
    axis = next((a for a, total in sums.items() if np.allclose(total, 1, atol=_TOLERANCE)), None)
    names = [o for node in graph.nodes for o in node.outputs if o and o != output]
    values = run_values(graph, names, _SAMPLES)
    return axis, next((n for n in names if _are_logits(values[n], shares, axis)), "")


def last_node(graph: Graph, followers: Container[str] = REARRANGEMENTS) -> Node | None:
    """What computes the numbers of a graph's first output, before those operators that follow it; None for an input."""
    makers, output = graph.producers(), graph.outputs[0].name
    while (node := makers.get(output)) is not None and node.op in followers:
        output = node.inputs[0]
    return node


def _are_logits(value: Array, shares: Array, axis: int | None) -> bool:
    if value.dtype.kind != "f" or value.shape != shares.shape or not np.isfinite(value).all():
        return False
    x = value.astype(np.float64)
    if axis is None:
        return np.allclose(1 / (1 + np.exp(-np.clip(x, -500, 500))), shares, atol=_TOLERANCE)
    powers = np.exp(x - x.max(axis, keepdims=True))
    return np.allclose(powers / powers.sum(axis, keepdims=True), shares, atol=_TOLERANCE)
