"""How many bytes every value of a training graph takes, for a batch and widths."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedprune.model.architecture import Architecture
from fedprune.model.step_contract import X
from fedprune_export.formulation.layouts import BLOCKED
from fedprune_export.ir.drafts import Dim, Node
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.shape_inference import Inferred, follow, hold


@dataclass(frozen=True)
class ValueSizes:
    """What the values of a training graph take.

    Attributes:
        shapes: Shapes by name. A value of which onnx can't tell the shape is missing.
        bytes: Bytes by name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    bytes: Mapping[str, int]


def value_sizes(
    graph: Graph, architecture: Architecture, widths: tuple[int, ...], batch: int, block: int
) -> ValueSizes:
    """The sizes of all values of a training graph.

    Args:
        graph: A training graph: of these widths, or of all.
        batch: Samples that are worked on at once.
        block: Channels of a block, for graphs that have operators in blocks.

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
        _follow(graph, out, node, block)
    return ValueSizes(out.shapes, {n: math.prod(s) * out.dtypes[n].itemsize for n, s in out.shapes.items()})


def _size(dim: Dim, batch: int) -> int:
    return dim if isinstance(dim, int) else batch


def _follow(graph: Graph, out: Inferred, node: Node, block: int) -> None:
    """Add the shapes of a node's outputs."""
    if node.domain != BLOCKED:
        follow(graph, out, node, [o for o in node.outputs if o and o not in out.shapes])
        return
    if node.inputs[0] not in out.shapes:
        return
    first, result = out.shapes[node.inputs[0]], node.outputs[0]
    out.dtypes[result] = out.dtypes[node.inputs[0]]
    if node.op == "ReorderInput":
        out.shapes[result] = (first[0], -(-first[1] // block) * block, *first[2:])
    elif node.op == "ReorderOutput":
        out.shapes[result] = (first[0], int(node.attrs["channels"]), *first[2:])
    elif node.op == "Upsample":
        out.shapes[result] = tuple(d * int(s) for d, s in zip(first, node.attrs["scales"], strict=True))
    else:  # their other operators have the shapes of ONNX's
        follow(graph, out, Node(node.op, _plain_inputs(node), [result], _plain_attrs(node)), [result])


def _plain_inputs(node: Node) -> list[str]:
    return node.inputs[:2] if node.op == "Conv" else node.inputs[:1]


def _plain_attrs(node: Node) -> dict[str, object]:
    return {k: v for k, v in node.attrs.items() if not k.startswith("activation")}
