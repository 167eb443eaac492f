"""Where activations lie: a graph that a board runs over some of its samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.runtime.precision import RANGES
from fedprune_export.bundles.inference import with_weights
from fedprune_export.ir.graph import Port
from fedprune_export.precision.quantisation import Plan
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model


def calibration_graph(model: Model, widths: Sequence[int], plan: Plan) -> bytes:
    """The inference graph with another output: the least and the largest number of activations, float32 [n, 2].

    Its weights are those of the inference graph, in the same file.

    Args:
        model: The whole model.
        widths: Kept channels per group.
        plan: Which activations, in this order.

    Raises:
        BundleError: The widths don't fit the architecture.
    """
    graph = at_widths(model, widths)
    rows = []
    for name in plan.values:
        ends = [graph.emit(op, name, attrs={"keepdims": 0}) for op in ("ReduceMin", "ReduceMax")]
        pair = graph.emit("Concat", *(graph.emit("Unsqueeze", e, graph.ints(0)) for e in ends), attrs={"axis": 0})
        rows.append(graph.emit("Unsqueeze", pair, graph.ints(0)))
    graph.emit("Concat", *rows, out=RANGES, attrs={"axis": 0})
    graph.outputs = [Port(RANGES, np.dtype(np.float32), (len(rows), 2))]
    graph.prune()
    return with_weights(graph.to_proto(), model.architecture.shapes(widths))
