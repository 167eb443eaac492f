"""Random inputs for a graph: float samples, or identifiers that its embeddings have rows for."""

from __future__ import annotations

import math

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Array, Graph, Port

# Of a sample several batches are made. A camera's picture has a quarter of these numbers.
_MAX_SAMPLE_ELEMENTS = 2**24

# Operators whose output still consists of identifiers.
_IDENTIFIER_PRESERVING = frozenset(
    {"Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice"}
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


def sample_input(port: Port, batch: int, seed: int = 0, *, below: int | None = None) -> Array:
    """An array for a graph input: random normal numbers, or random whole numbers from 0 on.

    Raises `ModelError` as `sample_sizes` does, or if a size is invalid or the array would be huge.

    Args:
        below: The number of identifiers, which embeddings limit; by default two, or all numbers of 8 bits.
    """
    sizes = sample_sizes(port)
    if any(d < 1 for d in sizes) or math.prod(sizes) > _MAX_SAMPLE_ELEMENTS:
        raise ModelError(
            f"size of input {port.name}", expected=f"1 to {_MAX_SAMPLE_ELEMENTS} numbers per sample", got=sizes
        )
    if port.dtype.kind in "iub":
        count = _default_count(port) if below is None else below
        return np.random.default_rng(seed).integers(0, count, (batch, *sizes)).astype(port.dtype)
    return np.random.default_rng(seed).standard_normal((batch, *sizes), np.float32)


def sample_feeds(graph: Graph, batch: int, seed: int = 0) -> dict[str, Array]:
    """Arrays for all inputs of a graph, of other numbers for each."""
    below = vocabulary_size(graph)
    return {p.name: sample_input(p, batch, seed + index, below=below) for index, p in enumerate(graph.inputs)}


def vocabulary_size(graph: Graph) -> int:
    """The number of identifiers that a graph's embeddings have rows for; without an embedding 2, or all numbers of
    8 bits."""
    ports = [p for p in graph.inputs if p.dtype.kind in "iub"]
    names = {p.name for p in ports}
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
    return max(1, min(sizes, default=min((_default_count(p) for p in ports), default=2)))


def _default_count(port: Port) -> int:
    """How many numbers are drawn for an input that no embedding limits: few identifiers, or any pixel."""
    if port.dtype.kind == "b" or port.dtype.itemsize > 2:
        return 2
    return min(256, int(np.iinfo(port.dtype).max) + 1)
