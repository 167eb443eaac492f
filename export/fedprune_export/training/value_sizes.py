"""How many bytes every value of a training graph takes, for a batch and widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedprune.model.architecture import Architecture
from fedprune.model.step_contract import X
from fedprune_export.ir.drafts import Dim
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.shape_inference import Inferred, follow, hold


@dataclass(frozen=True)
class ValueSizes:
    """What the values of a training graph take.

    Attributes:
        shapes: Shapes by name. A value of which onnx can't tell the shape is missing.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bytes: Mapping[str, int]


def value_sizes(graph: Graph, architecture: Architecture, widths: tuple[int, ...], batch: int) -> ValueSizes:
    """The sizes of all values of a training graph.

    Args:
        batch: Samples that are worked on at once.

    Raises:
        ModelError: An operator is in a form that onnx doesn't allow.
    """
    shapes = architecture.shapes(widths)
    out = Inferred()
    for port in graph.inputs:
        owner = port.name.rpartition("::")[0] if port.name not in shapes and port.shape else port.name
        # Only weights and what goes with them have channels; the other names are the batch's.
        out.shapes[port.name] = (
            shapes[owner]
            if owner in shapes and len(port.shape) == len(shapes[owner])
            else tuple(_size(d, batch) for d in port.shape)
        )
        out.dtypes[port.name] = port.dtype
    if X in out.shapes:
        out.shapes[X] = (batch, *architecture.input_shape)
    for name, value in graph.initializers.items():
        hold(out, name, value)
    for node in graph.nodes:
        follow(graph, out, node, [o for o in node.outputs if o and o not in out.shapes])
    return ValueSizes(out.shapes, {n: math.prod(s) * out.dtypes[n].itemsize for n, s in out.shapes.items()})


def _size(dim: Dim, batch: int) -> int:
    return dim if isinstance(dim, int) else batch
