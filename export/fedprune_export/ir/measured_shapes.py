"""The shapes of all values of a graph at one batch size: inferred where onnx can, and measured by a run elsewhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Array, Graph, Port
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.shape_inference import InferredShapes, infer


def shapes_at_batch(graph: Graph, batch: int) -> InferredShapes:
    """The shapes and types of all values of a graph at one batch size, by inference and, where that fails, by a run."""
    # What onnx can't infer is run, which may let it infer what follows; each pass must make progress.
    inferred = infer(graph, batch)
    measured: dict[str, Array] = {}
    while inferred.missing:
        before = len(measured)
        measured |= run_values(graph, inferred.missing, batch)
        inferred = infer(graph, batch, measured)
        if len(measured) == before:
            raise ModelError(f"value {inferred.missing[0]} has no shape")
    return inferred


def run_values(graph: Graph, names: Sequence[str], batch: int) -> dict[str, Array]:
    """Compute these values by running the graph."""
    probe = graph.copy()
    probe.outputs = [Port(n, np.dtype(np.float32), ()) for n in names]
    probe.prune()
    proto = probe.to_proto()
    for value in proto.graph.output:
        # The type is unknown before the run, and onnxruntime accepts an output without one.
        value.ClearField("type")
    return OnnxSession(proto.SerializeToString()).run(sample_feeds(probe, batch))
