"""Dropout: while training, a random part of the values is set to 0 and the rest scaled by 1 / (1 − ratio).

The random mask is an input of the training graph, so that the board draws it.
"""

from __future__ import annotations

import json

from fedprune.core.errors import ModelError
from fedprune.model.step_contract import DROPOUT_METADATA, dropout_mask_name
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.ir.dropout import dropout_ratio, mask_axes
from fedprune_export.ir.graph import Node


@gradient_rule("Dropout")
def dropout(tape: Tape, node: Node) -> Pull:
    """Write y = x · mask. Returns the *pull* (a function that writes the input's gradient): dx = dy · mask."""
    name, graph = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    ratio = dropout_ratio(tape.source, node)
    if ratio is None:
        raise ModelError(f"{describe(node)}: its ratio is computed", expected="a constant")
    axes = mask_axes(tape.source, node)
    dims = tuple(d if axes is None or i in axes else 1 for i, d in enumerate(shape))
    unknown_dims = [d for d in dims if not tape.is_width(d)]  # the board knows its batch and widths only
    if unknown_dims:
        raise ModelError(f"{describe(node)}: its size depends on the samples", got=unknown_dims[0])
    mask = dropout_mask_name(node.name or node.outputs[0])
    graph.add_input(mask, dims)
    # The board draws the masks; it finds their names and ratios here.
    ratios = json.loads(graph.metadata.get(DROPOUT_METADATA, "{}"))
    graph.metadata[DROPOUT_METADATA] = json.dumps({**ratios, mask: ratio})
    tape.enter(node.outputs[0], graph.emit("Mul", x, mask), shape)
    return lambda dy, *_: tape.add_gradient(name, graph.emit("Mul", dy, mask))
