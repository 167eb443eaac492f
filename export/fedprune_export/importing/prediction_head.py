"""Separates the end of a file that makes decisions, such as ArgMax, from the values that a model is trained from.

The nodes behind the training end are kept in the model's metadata as an ONNX graph of `logits`, the prediction head.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.model.step_contract import LOGITS
from fedprune.runtime.prediction_head import HEAD_KEY
from fedprune_export.importing import metadata
from fedprune_export.importing.batches.layout import batch_axis
from fedprune_export.importing.graph_writer import file_shapes
from fedprune_export.importing.head_graph import head_graph, head_metadata
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.original import check_rewriting
from fedprune_export.importing.training_end import (
    Dims,
    TrainingEnd,
    can_follow,
    ends_in_suppression,
    find_training_end,
    has_suppression,
    is_single_float,
    may_end,
    needed_nodes,
    nodes_behind,
    training_candidates,
)
from fedprune_export.importing.translation import upgrade_model


def separate_head(
    proto: onnx.ModelProto, raw: bytes, notes: list[str], labels: str = "", *, own_loss: bool = False
) -> tuple[onnx.ModelProto, bytes, dict[str, str], int | None]:
    """Let a model end before its decisions and probabilities, if all its outputs are computed from one value.

    Returns the model, the file that it is compared with, the metadata that holds the head (empty without one), and the
    axis of the classes, if the file's end tells.
    Raises `ModelError` if the model has several outputs, and training could end at several values.

    Args:
        proto: The file's model, without functions and control flow.
        labels: The kind of labels that the loss compares with, where it is known; see `find_training_end`.
        own_loss: Whether the model has a loss of its own. It takes the outputs as they are, if they are numbers that it
            can follow; outputs that aren't are left out.
    """
    head = {k: v for k, v in metadata.read_properties(proto).items() if k in (HEAD_KEY, metadata.FILE_END_KEY) and v}
    outputs = [o.name for o in proto.graph.output]
    if head and outputs[:1] == [LOGITS]:  # a file that fedprune wrote
        end = TrainingEnd(LOGITS, (), {}, 1)
        return end_model(proto, end, None), end_model(parse_model(raw), end, None).SerializeToString(), head, None
    if head and len(outputs) == 1:  # the user has chosen a value within the file
        return proto, raw, head, None
    if own_loss and any(can_follow(proto, o) for o in proto.graph.output):
        for value in [o for o in proto.graph.output if not can_follow(proto, o)]:
            proto.graph.output.remove(value)
            notes.append(f"Output {value_text(value.name)} is left out: it has no gradient that the loss could follow.")
        return proto, raw, {}, None
    # Files without such an end, which are most, needn't be copied and inferred.
    if len(outputs) == 1 and can_follow(proto, proto.graph.output[0]) and not may_end(proto, labels):
        return proto, raw, {}, None
    inlined, proto = proto, upgrade_model(proto)
    shapes = file_shapes(proto)
    found = find_training_end(proto, shapes, labels)
    if found is None or (found.axis not in (1, None) and not _has_batch_first(proto)):
        if len(outputs) > 1 or ends_in_suppression(proto):
            raise _undecided_error(proto, shapes)
        return inlined, raw, {}, None
    file = parse_model(raw, run_checker=False)
    if not _has_nodes(file, found):
        # The end is inside a function or branch of the file.
        file = inlined
        if not _has_nodes(file, found):
            return inlined, raw, {}, None
        check_rewriting(raw, inlined)
    dims = shapes.get(found.value)
    # Shapes were inferred while the model still had the nodes behind the value.
    trunk, original = end_model(proto, found, dims), end_model(file, found, dims)
    head = head_metadata(proto, found, dims or (), notes)
    value = f"{'the logits of ' if found.removed else ''}{value_text(found.value)}"
    notes.append(f"The model is trained from {value}. {_end_text(found, head)}")
    if has_suppression(found.nodes) and not own_loss:
        notes.append(
            "A detector needs a loss of its own, which compares boxes (--loss, docs/export.md#a-loss-of-your-own): the "
            "built-in ones don't."
        )
    return trunk, original.SerializeToString(), head, found.axis


def _end_text(end: TrainingEnd, head: Mapping[str, str]) -> str:
    """The sentence on what becomes of the file's own end."""
    # A ZipMap is none of a head's operators: a note of its own says what becomes of it.
    operators = list(dict.fromkeys(n.op_type for n in end.nodes if n.op_type != "ZipMap"))
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


def ends_in_labels(proto: onnx.ModelProto, labels: str) -> bool:
    """Whether a model ends elsewhere for a loss that compares with labels of this kind than for any other."""
    if not is_single_float(proto) or not may_end(proto, labels):
        return False
    proto = upgrade_model(proto)
    shapes = file_shapes(proto)
    return find_training_end(proto, shapes, labels) != find_training_end(proto, shapes, "")


def choose_output(proto: onnx.ModelProto, output: str, model: onnx.ModelProto) -> None:
    """Make one value the only output: one of several outputs, or an inner value. What follows an inner value stays as
    its head, if it has no weights. Raises `ModelError` if there is no such value, or its shape is unknown.

    `model` is the same model without functions and control flow.
    """
    outputs = {o.name: o for o in proto.graph.output}
    inner = {name for node in proto.graph.node for name in node.output if name}
    if output not in outputs and output not in inner:
        names = metadata.shown_names(list(outputs))
        raise ModelError("the model has no such output", expected=names, got=value_text(output))
    # A value within the model has no declared type; its shape must be inferred.
    shapes = {} if output in outputs else file_shapes(proto)
    if output not in outputs:
        upgraded = upgrade_model(model)
        nodes = nodes_behind(upgraded, output)
        end = TrainingEnd(output, nodes, {}, 1)
        metadata.write_properties(proto, head_metadata(upgraded, end, shapes.get(output) or (), []) if nodes else {})
    _declare_output(proto, output, shapes.get(output))


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


def end_model(proto: onnx.ModelProto, end: TrainingEnd, dims: Dims | None) -> onnx.ModelProto:
    """A copy of a model that ends where training ends, without the nodes that it doesn't need."""
    ended = onnx.ModelProto()
    ended.CopyFrom(proto)
    removed = set(end.removed)
    nodes = [n for n in ended.graph.node if removed.isdisjoint(n.output)]
    for node in nodes:
        node.input[:] = [_source(name, end.removed) for name in node.input]
    live_nodes = needed_nodes(nodes, [end.value])
    del ended.graph.node[:]
    ended.graph.node.extend(live_nodes)
    _declare_output(ended, end.value, dims)
    return ended


def _source(name: str, removed: Mapping[str, str]) -> str:
    while name in removed:
        name = removed[name]
    return name


def _declare_output(proto: onnx.ModelProto, output: str, dims: Dims | None) -> None:
    """Make a value the only output. Raises `ModelError` if it isn't an output already, and its shape is unknown."""
    chosen_output = next((o for o in proto.graph.output if o.name == output), None)
    if chosen_output is None and dims is None:
        raise ModelError(f"value {value_text(output)} can't be the output", expected="a value whose shape is known")
    declared = onnx.ValueInfoProto()
    if chosen_output is not None:
        declared.CopyFrom(chosen_output)
    else:
        sizes: list[int | str | None] = ["N" if i == 0 and d is None else d for i, d in enumerate(dims or ())]
        declared.CopyFrom(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, sizes))
    del proto.graph.output[:]
    proto.graph.output.append(declared)


def _has_nodes(file: onnx.ModelProto, end: TrainingEnd) -> bool:
    """Whether a file computes the value where training ends, and the nodes that are removed before it."""
    made = {o for n in file.graph.node for o in n.output}
    return end.value in made and set(end.removed) <= made


def _has_batch_first(proto: onnx.ModelProto) -> bool:
    """Whether the batch is surely on the first axis of each input: otherwise it may be on that of the classes."""
    tensors = {t.name for t in proto.graph.initializer}
    for value in proto.graph.input:
        dims = value.type.tensor_type.shape.dim
        sizes = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in dims]
        is_series = len(sizes) == 3 and sizes[1] == 1 and isinstance(sizes[0], int) and sizes[0] > 1
        if value.name not in tensors and (is_series or batch_axis(sizes)):
            return False
    return True


def _undecided_error(proto: onnx.ModelProto, shapes: Mapping[str, Dims]) -> ModelError:
    """The error for several outputs that are computed from several values."""
    outputs = [o.name for o in proto.graph.output]
    got = f"1 and {len(outputs)} ({metadata.shown_names(outputs)})"
    nms = next((n for n in proto.graph.node if n.op_type == "NonMaxSuppression"), None)
    if nms is not None:
        got += f", behind NonMaxSuppression {value_text(nms.name or nms.output[0])}, which no loss can follow"
    candidates = [name for name in training_candidates(proto, shapes) if name not in outputs]
    values = f", or which of these values: {metadata.shown_names(candidates)}" if candidates else ""
    return ModelError(
        "the model's inputs and outputs",
        expected="one input, and one output or several that are computed from the same logits",
        got=got,
        hint="Give a loss of your own, which takes all of them (loss=, or --loss), or say which output gives the logits"
        f"{values} (output=, or --output).",
    )
