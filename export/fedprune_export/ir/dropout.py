"""Dropout in imported graphs: a node that returns its input, which a training step replaces by what is random in it.

That is a product with a mask or, where the metadata says so, numbers that are drawn instead of the input, their mean.

A node has two inputs, the value and the ratio, as ONNX has it; it is never in ONNX's training mode. ONNX has no field
for numbers that are dropped together, such as whole channels: the graph's metadata says on which axes a mask differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError, value_text
from fedprune.model.random_inputs import Draw
from fedprune_export.ir.bypass import bypass
from fedprune_export.ir.graph import Graph, Node, decode_metadata

# The key of a graph's metadata for the axes on which the mask of a dropout varies, by the node's name. Dropouts whose
# mask varies on all axes are not listed.
DROPOUT_AXES_KEY = "fedprune.dropout_axes"

# The key of the metadata for dropouts whose random numbers their ratio doesn't say: `Draw` as JSON, by the node's name.
DRAWS_KEY = "fedprune.draws"


def is_dropout(node: Node) -> bool:
    return node.op == "Dropout" and not node.domain


def dropout_ratio(graph: Graph, node: Node) -> float | None:
    """The share of numbers that a dropout drops; None where it is computed or no share."""
    if "ratio" in node.attrs or len(node.inputs) < 2 or not node.inputs[1]:
        ratio = np.asarray(node.attrs.get("ratio", 0.5))
    elif node.inputs[1] in graph.initializers:
        ratio = graph.initializers[node.inputs[1]]
    else:
        return None
    value = float(ratio.reshape(-1)[0]) if ratio.size == 1 else -1.0
    # A ratio of float32 is meant as the decimal number that it is nearest to.
    return float(f"{value:.6g}") if 0 <= value <= 1 else None


def node_draw(graph: Graph, node: Node) -> Draw | None:
    """What a dropout draws while training; None where its ratio is computed."""
    draw = read_draws(graph.metadata).get(node.name)
    if draw is None and (ratio := dropout_ratio(graph, node)) is not None:
        draw = Draw.dropout(ratio)
    return draw


def mask_axes(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """The axes on which a dropout's mask varies; None for all. Raises `ModelError` if the metadata is damaged."""
    return read_mask_axes(graph).get(node.name)


def read_mask_axes(graph: Graph) -> dict[str, tuple[int, ...]]:
    """The axes on which masks vary, by the dropout's name. Raises `ModelError` if the metadata is damaged."""
    kind = dict[str, tuple[int, ...]]
    return decode_metadata(graph.metadata, DROPOUT_AXES_KEY, kind, "lists of axes by name") or {}


def read_draws(texts: Mapping[str, str]) -> dict[str, Draw]:
    """What dropouts draw by their names. Raises `ModelError` if the text is something else."""
    table = decode_metadata(texts, DRAWS_KEY, dict[str, Any], "distributions by name") or {}
    draws = {name: draw for name, value in table.items() if (draw := Draw.parse(value)) is not None}
    if len(draws) < len(table):
        raise ModelError(f"metadata {DRAWS_KEY}", expected="distributions by name", got=value_text(texts[DRAWS_KEY]))
    return draws


def remove_dropouts(graph: Graph) -> None:
    """Remove all dropouts, which do nothing at inference."""
    bypass(graph, [n for n in graph.nodes if is_dropout(n)])
    for key in (DROPOUT_AXES_KEY, DRAWS_KEY):
        graph.metadata.pop(key, None)
