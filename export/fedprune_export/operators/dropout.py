"""Dropout: while training, a random part of the values is set to 0 and the rest scaled by 1 / (1 − ratio).

The random mask is an input of the training graph, so that the board draws it. So are other random numbers of a model,
which a Dropout stands for (`ir.dropout`).
"""

from __future__ import annotations

import json

from fedprune.core.errors import ModelError
from fedprune.model.random_inputs import MASK
from fedprune.model.step_contract import RANDOM_METADATA, dropout_mask_name, noise_name
from fedprune_export.autodiff.tape import Pull, Tape, describe, gradient_rule
from fedprune_export.ir.dropout import mask_axes, node_draw
from fedprune_export.ir.graph import Node


@gradient_rule("Dropout")
def dropout(tape: Tape, node: Node) -> Pull | None:
    """Write y = x · mask. Returns the *pull* (a function that writes the input's gradient): dx = dy · mask.

    Noise takes the place of its input, which gets no gradient.
    """
    name, graph = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    draw = node_draw(tape.source, node)
    if draw is None:
        raise ModelError(f"{describe(node)}: its ratio is computed", expected="a constant")
    axes = mask_axes(tape.source, node)
    dims = tuple(d if axes is None or i in axes else 1 for i, d in enumerate(shape))
    unknown_dims = [d for d in dims if not tape.is_width(d)]  # the board knows its batch and widths only
    if unknown_dims:
        raise ModelError(f"{describe(node)}: its size depends on the samples", got=unknown_dims[0])
    drawn = (dropout_mask_name if draw.kind == MASK else noise_name)(node.name or node.outputs[0])
    graph.add_input(drawn, dims)
    # The board draws the numbers; it finds names and distributions here.
    draws = json.loads(graph.metadata.get(RANDOM_METADATA, "{}"))
    graph.metadata[RANDOM_METADATA] = json.dumps({**draws, drawn: draw.to_json()})
    if draw.kind != MASK:
        tape.enter(node.outputs[0], drawn, shape)
        return None
    tape.enter(node.outputs[0], graph.emit("Mul", x, drawn), shape)
    return lambda dy, *_: tape.add_gradient(name, graph.emit("Mul", dy, drawn))
