"""Finds the axis of a model's outputs that its classes are on, and moves them to axis 1, where losses read them."""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.core.errors import ModelError, shape_text
from fedprune.model.step_contract import LOGITS
from fedprune.runtime.prediction_head import HEAD_KEY
from fedprune_export.channels.rule import Channels, apply_channel_rules
from fedprune_export.importing.head_graph import behind_transpose, head_metadata
from fedprune_export.importing.normalise import Normalised
from fedprune_export.importing.training_end import TrainingEnd
from fedprune_export.importing.transpositions import merge_transpositions
from fedprune_export.ir.bypass import drop_identities
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.ir.trace import trace_graph


def find_class_axes(normal: Normalised) -> tuple[int, ...]:
    """The axes of the outputs that may be those of the classes; several where nothing tells.

    The classes are the output channels of the last layer. Where the samples' axes or an embedding's table keep these
    channels, or two axes are channels of layers, sizes tell: those of positions are the samples'.
    """
    dims = normal.trace.dims(LOGITS)
    if len(dims) < 3:
        return (1,)
    channels = Channels(normal.graph, normal.trace, normal.parameters)
    apply_channel_rules(channels)
    units = channels.atoms.units()
    free = tuple(a for a, row in enumerate(channels.rows[LOGITS]) if a and units[row].any())
    if len(free) == 1:
        return free
    sizes = normal.trace.dims(normal.graph.inputs[0].name)[1:]
    positions = {sizes, sizes[1:], sizes[:-1]}
    last = len(dims) - 1
    fitting = tuple(axis for axis, others in ((1, dims[2:]), (last, dims[1:-1])) if others in positions)
    return fitting if len(fitting) == 1 else free or (1, last)


def move_classes(normal: Normalised, axis: int, output: Port, head: Mapping[str, str]) -> Mapping[str, str]:
    """Move the outputs' classes to axis 1. Returns the head that gives the outputs of the file in its own layout.

    `output` is the file's output, `head` what is behind it so far (empty without one). Raises `ModelError` if there is
    no such axis; one below 0 counts from the last.
    """
    graph, dims = normal.graph, normal.trace.dims(LOGITS)
    rank = len(dims)
    if not 0 < (index := axis + rank * (axis < 0)) < rank:
        raise ModelError(
            "the axis of the classes", expected=f"1 to {rank - 1}, of outputs {shape_text('n', *dims[1:])}", got=axis
        )
    if index == 1:
        return head
    layout = graph.fresh(LOGITS)
    graph.rename({LOGITS: layout})
    for node in graph.nodes:
        node.name = layout if node.name == LOGITS else node.name
    others = [a for a in range(1, rank) if a != index]
    graph.emit("Transpose", layout, attrs={"perm": [0, index, *others]}, out=LOGITS)
    merge_transpositions(graph, trace_graph(graph))  # the file may have moved them from there
    drop_identities(graph)
    normal.trace = trace_graph(graph)
    if not head:
        head = head_metadata(Graph(outputs=[output]), TrainingEnd(output.name, (), {}, 1, dims), [])
    kept = "Predictions, and files that to-onnx and export-model write, keep the file's layout, too."
    normal.notes.append(
        f"The classes of the outputs {shape_text('n', *dims[1:])}, on axis {index}, are moved to axis 1."
        + (f" {kept}" if HEAD_KEY in head else "")
    )
    back = [0, *range(2, index + 1), 1, *range(index + 1, rank)]
    return {key: behind_transpose(text, back) for key, text in head.items()}
