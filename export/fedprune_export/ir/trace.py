"""A trace of a graph's values: shapes, types and small integers at several batch sizes.

Shapes are inferred, operator by operator, with all the numbers that they are computed from; what can't be inferred is
run. Axes whose size differs between batch sizes depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.shape_inference import InferredShapes, ShapeError, infer

Array = npt.NDArray[Any]

# The first two batch sizes; tests use others, so that nothing frozen at one of these goes unnoticed.
TRACE_BATCHES = (3, 5)

# Stands for the batch where sizes are matched by arithmetic: a prime that no model's dimension is a multiple of.
BATCH_EXTENT = 1_000_003

# More sizes, for the sake of shapes alone: some sizes follow the batch only where it is small or even.
_EXTRA_BATCHES = (1, 8)

# Of a sample several batches are made. A camera's picture has a quarter of these numbers.
_MAX_SAMPLE_ELEMENTS = 2**24

# Shape arithmetic has one number per axis, and rarely a few for each.
_MAX_TRACED_INTEGERS = 64

# Operators whose output still consists of identifiers.
_IDENTIFIER_PRESERVING = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice"}
)


@dataclass(frozen=True)
class Trace:
    """Shapes of every value. `integers`: values of small integer tensors at the first batch size (shape arithmetic)."""

    shapes: Mapping[str, tuple[int, ...]]
    shapes_second: Mapping[str, tuple[int, ...]]
    shapes_further: tuple[Mapping[str, tuple[int, ...]], ...]
    dtypes: Mapping[str, np.dtype[Any]]
    integers: Mapping[str, Array]
    integers_second: Mapping[str, Array]

    def batched(self, name: str) -> tuple[bool, ...]:
        """Per axis, whether its size depends on the batch."""
        columns = zip(*(shapes[name] for shapes in self._shapes_by_batch), strict=True)
        return tuple(len(set(column)) > 1 for column in columns)

    def dims(self, name: str) -> tuple[int | None, ...]:
        """Sizes, None where they depend on the batch."""
        return tuple(None if b else a for a, b in zip(self.shapes[name], self.batched(name), strict=True))

    @property
    def _shapes_by_batch(self) -> tuple[Mapping[str, tuple[int, ...]], ...]:
        return (self.shapes, self.shapes_second, *self.shapes_further)


def check_batch(port: Port) -> None:
    """Make sure that an input takes batches of any size. Raises `ModelError` if it doesn't."""
    if not port.shape or isinstance(port.shape[0], int):
        raise ModelError(
            f"input {port.name} has a fixed batch",
            expected="a free first dimension",
            got=list(port.shape),
            hint="Export the model with a dynamic batch.",
        )


def sample_sizes(port: Port) -> list[int]:
    """Sizes of one sample of an input. Raises `ModelError` if a dimension other than the first is free."""
    sizes = [d for d in port.shape[1:] if isinstance(d, int)]
    if len(sizes) + 1 != len(port.shape):
        raise ModelError(
            f"input {port.name} has free dimensions besides the batch",
            expected="fixed sizes from the second dimension on",
            got=list(port.shape),
            hint="Export the model with a fixed input size.",
        )
    return sizes


def sample_input(port: Port, batch: int, seed: int = 0, *, below: int = 2) -> Array:
    """An array for a graph input: random normal numbers, or random identifiers for int64.

    Raises `ModelError` as `sample_sizes` does, or if a size is invalid or the array would be huge.

    Args:
        below: The number of identifiers, which embeddings limit.
    """
    sizes = sample_sizes(port)
    if any(d < 1 for d in sizes) or math.prod(sizes) > _MAX_SAMPLE_ELEMENTS:
        raise ModelError(
            f"size of input {port.name}", expected=f"1 to {_MAX_SAMPLE_ELEMENTS} numbers per sample", got=sizes
        )
    if port.dtype == np.int64:
        return np.random.default_rng(seed).integers(0, below, (batch, *sizes))
    return np.random.default_rng(seed).standard_normal((batch, *sizes), np.float32)


def sample_feeds(graph: Graph, batch: int, seed: int = 0) -> dict[str, Array]:
    """Arrays for all inputs of a graph."""
    below = vocabulary_size(graph)
    return {p.name: sample_input(p, batch, seed, below=below) for p in graph.inputs}


def vocabulary_size(graph: Graph) -> int:
    """The number of identifiers that a graph's embeddings have rows for; 2 without an embedding."""
    names = {p.name for p in graph.inputs if p.dtype == np.int64}
    sizes = []
    for node in graph.nodes:
        if node.domain:
            continue
        if node.op in _IDENTIFIER_PRESERVING and node.inputs[0] in names:
            names.update(node.outputs)
        elif node.op == "Gather" and node.inputs[1] in names and node.inputs[0] in graph.initializers:
            axis = int(node.attrs.get("axis", 0))
            shape = graph.initializers[node.inputs[0]].shape
            sizes += [shape[axis]] if -len(shape) <= axis < len(shape) else []
        elif node.op == "OneHot" and node.inputs[0] in names and node.inputs[1] in graph.initializers:
            sizes.append(int(graph.initializers[node.inputs[1]].reshape(-1)[0]))
    # Identifiers must be valid in every table that they index, so the smallest one counts.
    return max(1, min(sizes, default=2))


def trace_graph(graph: Graph) -> Trace:
    """Infer every value of a graph at all batch sizes.

    Raises `ModelError` if the batch can't vary, a value would be huge, or an operator makes no sense.
    """
    for port in graph.inputs:
        check_batch(port)
    try:
        runs = [shapes_at_batch(graph, batch) for batch in (*TRACE_BATCHES, *_EXTRA_BATCHES)]
    except ShapeError as error:
        refuse_fixed_batch(graph, str(error))
        raise
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


_USUAL_BATCHES = (1, 2, 4, 16, 32, 64, 128)  # sizes that batches of exported models are fixed at


def refuse_fixed_batch(graph: Graph, consequence: str = "") -> None:
    """Refuse a graph that is valid for batches of one size only, with a `ModelError`.

    Args:
        consequence: The error for other sizes; without one, only a node with a fixed batch is reported.
    """
    for batch in _USUAL_BATCHES:
        try:
            shapes = shapes_at_batch(graph, batch).shapes
        except ModelError:
            continue
        node = next((n for n in graph.nodes if _fixes_batch(graph, n, shapes, batch)), None)
        if node is None and not consequence:
            continue
        what = f"the model ({consequence})" if node is None else f"{node.op} {node.name}"
        raise ModelError(
            f"{what} is made for batches of {batch}",
            expected="batches of any size",
            hint="In forward, take the batch's size from the input, as x.flatten(1) and x.reshape(len(x), -1) do, and "
            "export with a dynamic batch (torch: dynamic_shapes, or dynamic_axes of older exporters).",
        )


def _fixes_batch(graph: Graph, node: Node, shapes: Mapping[str, tuple[int, ...]], batch: int) -> bool:
    """Whether a node reshapes a value with a batch to a shape in which the batch is a number."""
    if node.domain or node.op not in ("Reshape", "Expand") or node.inputs[1] not in graph.initializers:
        return False
    before = shapes[node.inputs[0]]
    target: list[int] = graph.initializers[node.inputs[1]].reshape(-1).tolist()
    # A target such as [8, -1] or [16, 64] contains the batch as a number, perhaps times another axis.
    fixed = bool(target) and target[0] > 0 and (target[0] % batch == 0 or -1 not in target)
    return fixed and bool(before) and before[0] == batch and node.inputs[0] not in graph.initializers


def shapes_at_batch(graph: Graph, batch: int) -> InferredShapes:
    """The shapes and types of all values of a graph at one batch size, by inference and, where that fails, by a run."""
    # What onnx can't infer is run, which may let it infer what follows; each turn must make progress.
    facts = infer(graph, batch)
    measured: dict[str, Array] = {}
    while facts.missing:
        before = len(measured)
        measured |= _run_values(graph, facts.missing, batch)
        facts = infer(graph, batch, measured)
        if len(measured) == before:
            raise ModelError(f"value {facts.missing[0]} has no shape")
    return facts


def _small_integers(facts: InferredShapes) -> dict[str, Array]:
    return {k: v for k, v in facts.numbers.items() if v.dtype.kind in "iu" and v.size <= _MAX_TRACED_INTEGERS}


def _run_values(graph: Graph, names: Sequence[str], batch: int) -> dict[str, Array]:
    """Compute these values by running the graph."""
    probe = graph.copy()
    probe.outputs = [Port(n, np.dtype(np.float32), ()) for n in names]
    probe.prune()
    proto = probe.to_proto()
    for value in proto.graph.output:
        # The type is unknown before the run, and onnxruntime accepts an output without one.
        value.ClearField("type")
    return OnnxSession(proto.SerializeToString()).run(sample_feeds(probe, batch))
