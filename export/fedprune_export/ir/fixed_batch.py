"""Refuses models that take batches of one size only, with a hint how to export them otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.measured_shapes import shapes_at_batch

# Sizes that batches of exported models are fixed at.
_USUAL_BATCHES = (1, 2, 4, 16, 32, 64, 128)


def check_batch(port: Port) -> None:
    """Make sure that an input takes batches of any size. Raises `ModelError` if it doesn't."""
    if not port.shape or isinstance(port.shape[0], int):
        raise ModelError(
            f"input {port.name} has a fixed batch",
            expected="a free first dimension",
            got=list(port.shape),
            hint="Export the model with a dynamic batch.",
        )


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
