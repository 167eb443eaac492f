"""Separates the end of a file that makes decisions, such as ArgMax, from the values that a model is trained from.

The nodes behind the training end are kept in the model's metadata as an ONNX graph of `logits`, the prediction head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.model.step_contract import LOGITS
from fedprune.runtime.prediction_head import HEAD_KEY
from fedprune_export.importing import metadata
from fedprune_export.importing.batches.layout import batch_axis
from fedprune_export.importing.checks import check_rewriting
from fedprune_export.importing.head_graph import head_graph, head_metadata
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.raw_file import bypass_nodes
from fedprune_export.importing.training_end import (
    TrainingEnd,
    can_follow,
    find_training_end,
    has_suppression,
    is_behind_suppression,
    nodes_behind,
    training_candidates,
)
from fedprune_export.importing.translation import write_graph
from fedprune_export.importing.value_inference import graph_shapes
from fedprune_export.ir.graph import Graph, Port, node_label


@dataclass(frozen=True)
class SeparateHead:
    """What becomes of a file's end.

    Attributes:
        raw: The file that the trained part is compared with.
        texts: The metadata that holds the head; empty without one.
        axis: The axis of the classes, if the file's end tells.
        removed: Nodes that the file is left without, as in `TrainingEnd`.
    """

    raw: bytes
    texts: Mapping[str, str] = field(default_factory=dict)
    axis: int | None = None
    removed: Mapping[str, str] = field(default_factory=dict)


def separate_head(
    graph: Graph, raw: bytes, notes: list[str], labels: str = "", *, own_loss: bool = False
) -> SeparateHead:
    """Let a graph end before its decisions and probabilities, if all its outputs are computed from one value.

    Raises `ModelError` if the model has several outputs, and training could end at several values.

    Args:
        graph: The file's graph, which is changed.
        labels: The kind of labels that the loss compares with, where it is known; see `find_training_end`.
        own_loss: Whether the model has a loss of its own. It takes the outputs as they are, if they are numbers that it
            can follow; outputs that aren't are left out.
    """
    head = {k: v for k, v in graph.metadata.items() if k in (HEAD_KEY, metadata.FILE_END_KEY) and v}
    # A file that fedprune wrote, or in which the user has chosen a value.
    if head and (len(graph.outputs) == 1 or [p.name for p in graph.outputs[:1]] == [LOGITS]):
        del graph.outputs[1:]
        graph.prune()
        return SeparateHead(raw, head)
    if own_loss and any(can_follow(graph, port) for port in graph.outputs):
        for port in [port for port in graph.outputs if not can_follow(graph, port)]:
            graph.outputs.remove(port)
            notes.append(f"Output {value_text(port.name)} is left out: it has no gradient that the loss could follow.")
        return SeparateHead(raw)
    end = find_training_end(graph, labels)
    if end is None or (end.axis not in (1, None) and not _has_batch_first(graph)):
        if len(graph.outputs) > 1 or any(is_behind_suppression(graph, port) for port in graph.outputs):
            raise _undecided_error(graph)
        return SeparateHead(raw)
    file = parse_model(raw, run_checker=False)
    # The end may be inside a function or branch of the file.
    if not {end.value, *end.removed} <= {o for node in file.graph.node for o in node.output}:
        written = write_graph(graph)
        check_rewriting(raw, written)
        file, raw = written, written.SerializeToString()
    if end.removed:
        raw = bypass_nodes(file, end.removed)
    texts = head_metadata(graph, end, notes)
    _end_graph(graph, end)
    value = f"{'the logits of ' if end.removed else ''}{value_text(end.value)}"
    notes.append(f"The model is trained from {value}. {_end_text(end, texts)}")
    if has_suppression(end.nodes) and not own_loss:
        notes.append(
            "A detector needs a loss of its own, which compares boxes (--loss, docs/export.md#a-loss-of-your-own): the "
            "built-in ones don't."
        )
    return SeparateHead(raw, texts, end.axis, end.removed)


def _end_graph(graph: Graph, end: TrainingEnd) -> None:
    """Let a graph end where training ends, without the nodes that it doesn't need."""
    for node in graph.nodes:
        node.inputs = [end.removed.get(name, name) for name in node.inputs]
    shape = ["N" if i == 0 and d is None else d for i, d in enumerate(end.dims)]
    port = Port(end.value, np.dtype(np.float32), tuple(shape))
    graph.outputs = [next((p for p in graph.outputs if p.name == end.value), port)]
    graph.prune()


def _end_text(end: TrainingEnd, head: Mapping[str, str]) -> str:
    """The sentence on what becomes of the file's own end."""
    # A ZipMap is none of a head's operators: a note of its own says what becomes of it.
    operators = list(dict.fromkeys(n.op for n in end.nodes if n.op != "ZipMap"))
    own_end = "the file's own end" + (f" ({first_few(operators)})" if operators else "")
    if metadata.FILE_END_KEY in head:
        return (
            f"Files that to-onnx and export-model write keep {own_end}, too; predictions lack it: boxes are chosen "
            "among those of all samples of a batch."
        )
    if head:
        return f"Predictions, and files that to-onnx and export-model write, keep {own_end}, too."
    return (
        f"Predictions lack {own_end}, as do files that to-onnx and export-model write: it can't be computed for each "
        "of several samples."
    )


def choose_output(proto: onnx.ModelProto, output: str, graph: Graph) -> None:
    """Make one value the only output: one of several outputs, or an inner value. What follows an inner value stays as
    its head, if it has no weights. Raises `ModelError` if there is no such value, or its shape is unknown.

    `graph` is what was read from the model.
    """
    outputs = {o.name: o for o in proto.graph.output}
    inner = {name for node in proto.graph.node for name in node.output if name}
    if output not in outputs and output not in inner:
        names = metadata.shown_names(list(outputs))
        raise ModelError("the model has no such output", expected=names, got=value_text(output))
    for other in [o for o in proto.graph.output if o.name != output]:
        proto.graph.output.remove(other)
    if output in outputs:
        return
    # A value within the model has no declared type; its shape must be inferred.
    dims = graph_shapes(graph).get(output)
    if dims is None:
        raise ModelError(f"value {value_text(output)} can't be the output", expected="a value whose shape is known")
    end = TrainingEnd(output, nodes_behind(graph, output), {}, 1, dims)
    metadata.write_properties(proto, head_metadata(graph, end, []) if end.nodes else {})
    sizes: list[int | str | None] = ["N" if i == 0 and d is None else d for i, d in enumerate(dims)]
    proto.graph.output.append(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, sizes))


def attach_head(proto: onnx.ModelProto, texts: Mapping[str, str]) -> None:
    """Add the head in a model's metadata to it, if it has one: its outputs follow the output `logits`."""
    head = _file_end(texts)
    # The import may have renamed a value to what the head calls an output.
    renamed = {o.name: f"{o.name}~inner" for o in head.graph.output}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(i, i) for i in node.input]
        node.output[:] = [renamed.get(o, o) for o in node.output]
    proto.graph.node.extend(head.graph.node)
    proto.graph.initializer.extend(head.graph.initializer)
    proto.graph.output.extend(head.graph.output)
    domains = {o.domain for o in proto.opset_import}
    proto.opset_import.extend(o for o in head.opset_import if o.domain not in domains | {"", "ai.onnx"})


def own_outputs(texts: Mapping[str, str]) -> tuple[str, ...]:
    """The names of outputs that the head in a model's metadata computes."""
    return tuple(output.name for output in _file_end(texts).graph.output)


def _file_end(texts: Mapping[str, str]) -> onnx.ModelProto:
    text = texts.get(HEAD_KEY) or texts.get(metadata.FILE_END_KEY)
    return head_graph(text) if text else onnx.ModelProto()


def _has_batch_first(graph: Graph) -> bool:
    """Whether the batch is surely on the first axis of each input: otherwise it may be on that of the classes."""
    for shape in (port.shape for port in graph.inputs):
        is_series = len(shape) == 3 and shape[1] == 1 and isinstance(shape[0], int) and shape[0] > 1
        if is_series or batch_axis(shape):
            return False
    return True


def _undecided_error(graph: Graph) -> ModelError:
    """The error for several outputs that are computed from several values."""
    outputs = [port.name for port in graph.outputs]
    got = f"1 and {len(outputs)} ({metadata.shown_names(outputs)})"
    nms = next((n for n in graph.nodes if n.op == "NonMaxSuppression"), None)
    if nms is not None:
        got += f", behind {node_label(nms)}, which no loss can follow"
    candidates = [name for name in training_candidates(graph) if name not in outputs]
    values = f", or which of these values: {metadata.shown_names(candidates)}" if candidates else ""
    return ModelError(
        "the model's inputs and outputs",
        expected="one input, and one output or several that are computed from the same logits",
        got=got,
        hint="Give a loss of your own, which takes all of them (loss=, or --loss), or say which output gives the logits"
        f"{values} (output=, or --output).",
    )
