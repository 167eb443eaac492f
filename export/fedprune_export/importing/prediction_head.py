"""Separates the end of a file that makes decisions, such as ArgMax, from the values that a model is trained from.

The nodes behind the training end are kept in the model's metadata as an ONNX graph of `logits`, the prediction head.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.prediction_head import HEAD_KEY
from fedprune_export.importing import metadata
from fedprune_export.importing.graph_writer import file_shapes
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.translation import upgrade_model

# A model is trained from before the first of these: they decide, or make probabilities, which losses do themselves.
_ENDS = frozenset({"ArgMax", "ArgMin", "TopK", "Softmax", "LogSoftmax", "Sigmoid"})
# Further operators that may stand in a head; all other operators belong to the trained part.
_FOLLOWERS = frozenset(
    {"ArrayFeatureExtractor", "Cast", "Flatten", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "Reshape"}
    | {"Squeeze", "Transpose", "Unsqueeze", "ZipMap"}
)
# Ends over an axis, with the axis that they take by default.
_AXES = {"ArgMax": 0, "ArgMin": 0, "TopK": -1, "Softmax": -1, "LogSoftmax": -1}
_FLOAT_TYPES = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class _Path:
    """The way from an output back to where training ends: that value, and the nodes that have to be in the head."""

    value: str
    nodes: tuple[onnx.NodeProto, ...]


def separate_head(proto: onnx.ModelProto, raw: bytes, notes: list[str]) -> tuple[onnx.ModelProto, bytes, str]:
    """Let a model end before its decisions, if all its outputs are computed from one value.

    A model with one output of floats stays as it is. Returns the model, the file that it is compared with, and the head
    in base64 (empty without one).
    """
    head = metadata.read_properties(proto).get(HEAD_KEY, "")
    outputs = [o.name for o in proto.graph.output]
    if head and outputs[:1] == [LOGITS]:  # a file that fedprune wrote
        return _ended_at(proto, LOGITS), _ended_at(parse_model(raw), LOGITS).SerializeToString(), head
    if len(outputs) == 1 and proto.graph.output[0].type.tensor_type.elem_type in _FLOAT_TYPES:
        return proto, raw, ""
    proto = upgrade_model(proto)
    paths = [_path(proto, name) for name in outputs]
    values = {path.value for path in paths}
    value = next(iter(values), "")
    file = parse_model(raw, run_checker=False)
    is_inner = any(value in node.output for node in file.graph.node)
    head_nodes = {id(node): node for path in paths for node in path.nodes}
    # The loss takes classes on axis 1; a head along another axis leaves the choice to the user.
    if len(values) != 1 or not is_inner or not head_nodes or not _are_free(outputs, value):
        return proto, raw, ""
    dims = file_shapes(proto).get(value)
    if dims is None or not all(_takes_classes(n, len(dims)) for n in head_nodes.values() if n.input[0] == value):
        return proto, raw, ""
    operators = first_few(list(dict.fromkeys(n.op_type for n in proto.graph.node if id(n) in head_nodes)))
    head = _head_text(proto, value, set(head_nodes), notes)
    # Shapes are inferred while the model still has the nodes behind the value.
    trunk = _ended_at(proto, value)
    notes.append(
        f"The model is trained from {value_text(value)}. Predictions, and files that to-onnx and export-model write, "
        f"keep the file's own end ({operators}), too."
    )
    return trunk, _ended_at(file, value).SerializeToString(), head


def choose_output(proto: onnx.ModelProto, output: str) -> None:
    """Make one value the only output: one of several outputs, or an inner value. Raises `ModelError` if there is no
    such value, or its shape is unknown."""
    outputs = {o.name: o for o in proto.graph.output}
    inner = {name for node in proto.graph.node for name in node.output if name}
    if output not in outputs and output not in inner:
        names = metadata.shown_names(list(outputs))
        raise ModelError("the model has no such output", expected=names, got=value_text(output))
    value = outputs.get(output)
    if value is None:
        # A value within the model has no declared type; its shape must be inferred.
        dims = file_shapes(proto).get(output)
        if dims is None:
            raise ModelError(f"value {value_text(output)} can't be the output", expected="a value whose shape is known")
        sizes: list[int | str | None] = ["N" if i == 0 and d is None else d for i, d in enumerate(dims)]
        value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, sizes)
    chosen_output = onnx.ValueInfoProto()
    chosen_output.CopyFrom(value)
    del proto.graph.output[:]
    proto.graph.output.append(chosen_output)


def attach_head(proto: onnx.ModelProto, text: str) -> None:
    """Add a head in base64 to a model with the output `logits`: its outputs are further outputs of the model."""
    head = parse_model(base64.b64decode(text), run_checker=False)
    proto.graph.node.extend(head.graph.node)
    proto.graph.initializer.extend(head.graph.initializer)
    proto.graph.output.extend(head.graph.output)
    domains = {o.domain for o in proto.opset_import}
    proto.opset_import.extend(o for o in head.opset_import if o.domain not in domains | {"", "ai.onnx"})


def _path(proto: onnx.ModelProto, output: str) -> _Path:
    """Follow an output back through operators of a head; it ends before the first one that decides."""
    makers = {o: n for n in proto.graph.node for o in n.output}
    constants = _constants(proto)
    value, name = output, output
    nodes: list[onnx.NodeProto] = []
    pending: list[onnx.NodeProto] = []
    while (node := makers.get(name)) is not None and node.op_type in _ENDS | _FOLLOWERS:
        sources = [i for i in node.input if i and i not in constants]
        if len(sources) != 1:
            break
        name = sources[0]
        pending.append(node)
        if node.op_type in _ENDS:
            value, nodes, pending = name, [*nodes, *pending], []
    return _Path(value, tuple(nodes))


def _are_free(outputs: list[str], value: str) -> bool:
    """Whether no output of the file has a name that the model's input or its training end gets."""
    return X not in outputs and (LOGITS not in outputs or value == LOGITS)


def _constants(proto: onnx.ModelProto) -> set[str]:
    return {t.name for t in proto.graph.initializer} | {
        o for n in proto.graph.node if n.op_type == "Constant" for o in n.output
    }


def _takes_classes(node: onnx.NodeProto, rank: int) -> bool:
    """Whether a node works along axis 1, or along none."""
    axis = next((a.i for a in node.attribute if a.name == "axis"), _AXES.get(node.op_type))
    return node.op_type not in _AXES or (axis is not None and rank > 1 and axis % rank == 1)


def _ended_at(proto: onnx.ModelProto, value: str) -> onnx.ModelProto:
    """A copy of a model that ends at a value, without the nodes that it doesn't need."""
    ended = onnx.ModelProto()
    ended.CopyFrom(proto)
    choose_output(ended, value)
    makers = {o: i for i, n in enumerate(ended.graph.node) for o in n.output}
    pending, needed = [value], set[int]()
    while pending:
        index = makers.get(pending.pop())
        if index is None or index in needed:
            continue
        needed.add(index)
        node = ended.graph.node[index]
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            return ended  # sub-graphs read further values
        pending += node.input
    nodes = [n for i, n in enumerate(ended.graph.node) if i in needed]
    del ended.graph.node[:]
    ended.graph.node.extend(nodes)
    return ended


def _head_text(proto: onnx.ModelProto, value: str, chosen: set[int], notes: list[str]) -> str:
    """The head as an ONNX file in base64. ZipMap, whose outputs are maps, is left out: its numbers are the output."""
    outputs = {o.name: o for o in proto.graph.output if o.name != value}
    nodes: list[onnx.NodeProto] = []
    inputs, constants = set[str](), _constants(proto)
    for node in proto.graph.node:
        if id(node) not in chosen:
            continue
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        if node.op_type == "ZipMap":
            copy = onnx.helper.make_node("Identity", [node.input[0]], [node.output[0]])
            outputs[node.output[0]] = onnx.helper.make_tensor_value_info(
                node.output[0], onnx.TensorProto.FLOAT, [None, None]
            )
            notes.append(
                f"ZipMap was left out: {value_text(node.output[0])} is a tensor of probabilities [n, classes]."
            )
        nodes.append(copy)
        inputs.update(node.input)
    # Names of the head don't clash with those of the trained part, which the import may change.
    names: Mapping[str, str] = {value: LOGITS, **_inner_names(nodes, inputs & constants, {*outputs, value})}
    for node in nodes:
        node.name = f"head/{node.name}" if node.name else ""
        node.input[:] = [names.get(i, i) for i in node.input]
        node.output[:] = [names.get(o, o) for o in node.output]
    tensors = []
    for tensor in [*proto.graph.initializer, *(_constant(n) for n in proto.graph.node if n.op_type == "Constant")]:
        if tensor is not None and tensor.name in inputs:
            renamed = onnx.TensorProto()
            renamed.CopyFrom(tensor)
            renamed.name = names[tensor.name]
            tensors.append(renamed)
    if value != LOGITS and value in (o.name for o in proto.graph.output):
        # The training end is an output itself: it keeps its name, too.
        nodes.append(onnx.helper.make_node("Identity", [LOGITS], [value]))
        outputs[value] = next(o for o in proto.graph.output if o.name == value)
    logits = onnx.helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph(nodes, "head", [logits], list(outputs.values()), tensors)
    model = onnx.helper.make_model(graph, opset_imports=list(proto.opset_import), ir_version=proto.ir_version)
    return base64.b64encode(model.SerializeToString(deterministic=True)).decode()


def _inner_names(nodes: list[onnx.NodeProto], constants: set[str], kept: set[str]) -> dict[str, str]:
    inner = {*constants, *(o for n in nodes for o in n.output if o)} - kept
    return {name: f"head/{name}" for name in inner}


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """A Constant node's tensor under the name of its output; None if its numbers are no tensor."""
    tensor = next((a.t for a in node.attribute if a.name == "value"), None)
    if tensor is None:
        return None
    named = onnx.TensorProto()
    named.CopyFrom(tensor)
    named.name = node.output[0]
    return named
