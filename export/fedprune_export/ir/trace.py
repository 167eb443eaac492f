"""A trace of a graph's values: shapes, types and small integers at several batch sizes.

The channel analysis, rewrites and gradient rules read it. Axes whose size differs between batch sizes depend on the
batch; the small integers are what the graph computes from sizes, such as targets of reshapes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Array, Graph, Port
from fedprune_export.ir.sample_inputs import sample_feeds
from fedprune_export.ir.shape_inference import InferredShapes, infer

# The first two batch sizes; tests use others, so that nothing frozen at one of these goes unnoticed.
TRACE_BATCHES = (3, 5)

# Stands for the batch where sizes are matched by arithmetic: a prime that no model's dimension is a multiple of.
BATCH_EXTENT = 1_000_003

# More sizes, for shapes only: some sizes follow the batch only where it is small or even.
_EXTRA_BATCHES = (1, 8)

# Shape arithmetic has one number per axis, and rarely a few for each.
_MAX_TRACED_INTEGERS = 64


@dataclass(frozen=True)
class Trace:
    """Shapes of every value, at the first, the second and further batch sizes, and small integers at the first two."""

    shapes: Mapping[str, tuple[int, ...]]
    shapes_second: Mapping[str, tuple[int, ...]]
    shapes_further: tuple[Mapping[str, tuple[int, ...]], ...]
    dtypes: Mapping[str, np.dtype[Any]]
    integers: Mapping[str, Array]
    integers_second: Mapping[str, Array]

    def batched(self, name: str) -> tuple[bool, ...]:
        """Per axis, whether its size depends on the batch."""
        all_shapes = (self.shapes, self.shapes_second, *self.shapes_further)
        return tuple(len(set(sizes)) > 1 for sizes in zip(*(shapes[name] for shapes in all_shapes), strict=True))

    def dims(self, name: str) -> tuple[int | None, ...]:
        """Sizes, None where they depend on the batch."""
        return tuple(None if b else a for a, b in zip(self.shapes[name], self.batched(name), strict=True))


def trace_graph(graph: Graph) -> Trace:
    """Infer every value of a graph at all batch sizes.

    Raises `ModelError` if a value would be huge, or an operator makes no sense.
    """
    runs = [shapes_at_batch(graph, batch) for batch in (*TRACE_BATCHES, *_EXTRA_BATCHES)]
    first, second, *further = runs
    for name, shape in first.shapes.items():
        # A Squeeze without axes removes the batch where it is 1.
        if any(len(run.shapes[name]) != len(shape) for run in runs):
            raise ModelError(
                f"value {name} has another number of axes for one sample than for several",
                hint="Squeeze axes by number, so that an axis of one sample stays.",
            )
    return Trace(
        first.shapes,
        second.shapes,
        tuple(run.shapes for run in further),
        first.dtypes,
        _small_integers(first),
        _small_integers(second),
    )


def _small_integers(inferred: InferredShapes) -> dict[str, Array]:
    return {k: v for k, v in inferred.numbers.items() if v.dtype.kind in "iu" and v.size <= _MAX_TRACED_INTEGERS}


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


def run_values(graph: Graph, names: Sequence[str], batch: int, scale: float = 1.0) -> dict[str, Array]:
    """Compute these values by running the graph on samples, whose floats are multiplied by `scale`."""
    probe = graph.copy()
    probe.outputs = [Port(n, np.dtype(np.float32), ()) for n in names]
    probe.prune()
    proto = probe.to_proto()
    for value in proto.graph.output:
        # The type is unknown before the run, and onnxruntime accepts an output without one.
        value.ClearField("type")
    feeds = sample_feeds(probe, batch)
    feeds |= {n: v * v.dtype.type(scale) for n, v in feeds.items() if scale != 1 and v.dtype.kind == "f"}
    return OnnxSession(proto.SerializeToString()).run(feeds)
