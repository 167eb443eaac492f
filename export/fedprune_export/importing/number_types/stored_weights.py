"""Finds the weights that a file stores in another form than as tensors of float32, and stores them so.

Such as weights of 16 bits behind a Cast, and weights that a node fills with one number.
"""

from __future__ import annotations

import math

import numpy as np
import onnx

from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import REARRANGEMENTS
from fedprune_export.ir.shape_inference import MAX_ELEMENTS

# Inputs that only a weight or the bias of one can be. A norm's scale of ones is as often a norm without one.
_WEIGHT_INPUTS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "MatMul": (1,)}
_WEIGHT_INPUTS["BatchNormalization"] = (1, 2, 3, 4)
_BIASED_OPERATORS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def store_weights(graph: Graph) -> None:
    """Store weights as tensors of float32.

    - Tensors in another precision that are cast to float32 before any use, perhaps after they were rearranged.
    - Values of ConstantOfShape that are read as weights.
    """
    readers = graph.consumers()
    for name, value in list(graph.initializers.items()):
        # numpy knows bfloat16 as a type of another kind.
        if value.dtype != np.float32 and value.dtype.kind in "fV" and (casts := _casts_behind(name, readers)):
            graph.initializers[name] = value.astype(np.float32)
            for node in casts:
                node.op, node.attrs = "Identity", {}
    _store_fills(graph)


def _casts_behind(name: str, readers: dict[str, list[tuple[Node, int]]]) -> list[Node]:
    """The casts to float32 that all readers of a tensor are, or lead to by rearrangement; none if one reads it else."""
    casts: list[Node] = []
    for node, position in readers.get(name, []):
        if node.op == "Cast" and not node.domain and node.attrs.get("to") == onnx.TensorProto.FLOAT:
            casts.append(node)
        elif node.op in REARRANGEMENTS and not node.domain and position == 0:
            behind = _casts_behind(node.outputs[0], readers)
            if not behind:
                return []
            casts += behind
        else:
            return []
    return casts


def _store_fills(graph: Graph) -> None:
    """Store what ConstantOfShape fills as a tensor, where it is read as a weight."""
    readers, makers, elements = graph.consumers(), graph.producers(), 0
    kept: list[Node] = []
    for node in graph.nodes:
        shape = graph.initializers.get(node.inputs[0]) if node.op == "ConstantOfShape" and not node.domain else None
        number = node.attrs.get("value", np.zeros(1, np.float32))
        if shape is None or number.dtype != np.float32 or not _is_weight(node.outputs[0], readers, makers):
            kept.append(node)
            continue
        sizes = [int(size) for size in shape.reshape(-1)]
        elements += math.prod(sizes) if min(sizes, default=1) > 0 else MAX_ELEMENTS
        # The trace refuses what is larger, before anything is allocated.
        if elements >= MAX_ELEMENTS:
            kept.append(node)
            continue
        graph.initializers[node.outputs[0]] = np.full(sizes, number.reshape(-1)[0], np.float32)
    graph.nodes = kept


def _is_weight(name: str, readers: dict[str, list[tuple[Node, int]]], makers: dict[str, Node]) -> bool:
    """Whether all readers of a value read it as a weight, or as the bias that is added to a product."""
    uses = readers.get(name, [])
    return bool(uses) and all(
        position in _WEIGHT_INPUTS.get(node.op, ())
        or (node.op in REARRANGEMENTS and position == 0 and _is_weight(node.outputs[0], readers, makers))
        or (node.op == "Add" and _is_product(makers.get(node.inputs[1 - position])))
        for node, position in uses
    )


def _is_product(node: Node | None) -> bool:
    return node is not None and node.op in _BIASED_OPERATORS and not node.domain
