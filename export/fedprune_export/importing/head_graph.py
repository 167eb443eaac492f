"""Writes and reads prediction heads: ONNX graphs from `logits` to the outputs of a user's file, in base64."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, value_text
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.prediction_head import HEAD_KEY, PredictionHead
from fedprune_export.importing import metadata
from fedprune_export.importing.graph_writer import file_shapes
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.training_end import Dims, TrainingEnd, constant_values, has_suppression
from fedprune_export.ir.graph import NORMAL_OPSET, Array

_Named = TypeVar("_Named", onnx.ValueInfoProto, onnx.TensorProto)

# The version of the format that goes with opset 17: runtimes of boards refuse later ones.
_IR_VERSION = 8
# Samples on which a head is tried: all at once, and one by one.
_TRIED_SAMPLES = 3
# The numbers that a value of it may have: those of a large picture's classes.
_MAX_NUMBERS = 2**27
# Operators whose outputs may be of any size, whatever their inputs are.
_GROWING_OPERATORS = frozenset({"ConstantOfShape", "Expand", "OneHot", "Range", "Tile"})
# What stands for a free size, such as a length.
_FREE_SIZE = 4


def head_graph(text: str) -> onnx.ModelProto:
    return parse_model(base64.b64decode(text), run_checker=False)


def class_names(text: str, classes: int) -> tuple[str, ...]:
    """The names of classes that a head tells instead of numbers; empty without any."""
    for tensor in _constants(head_graph(text).graph).values() if text else ():
        names = numpy_helper.to_array(tensor).reshape(-1) if tensor.data_type == onnx.TensorProto.STRING else ()
        if len(names) == classes:
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return ()


def head_metadata(proto: onnx.ModelProto, end: TrainingEnd, dims: Dims, notes: list[str]) -> dict[str, str]:
    """The head behind the end of training, in base64, by its key: that of a prediction head, or, if boxes are chosen
    among those of all samples, that of what only files keep. Empty if it can't be computed for several samples, or
    computes something else for them than sample by sample. `dims` are those of the end's value.

    ZipMap, whose outputs are maps, is left out: its numbers are the output.
    """
    head = _written_head(proto, end, dims, notes)
    sizes = [_FREE_SIZE if d is None else d for d in dims[1:]]
    if not _is_small(head, sizes):
        return {}
    values = _values_of_batches(_text(head), sizes)
    if has_suppression(end.nodes):
        return {metadata.FILE_END_KEY: _text(head)} if values else {}
    axes = {name: _batch_axis(*pair) for name, pair in values.items()}
    if not values or None in axes.values():
        return {}
    for output in head.graph.output:
        sizes_of_output, axis = output.type.tensor_type.shape.dim, axes[output.name]
        if axis is not None and axis < len(sizes_of_output) and sizes_of_output[axis].HasField("dim_value"):
            sizes_of_output[axis].dim_param = "N"  # the file's batch may be a fixed one
    return {HEAD_KEY: _text(head)}


def behind_transpose(text: str, order: Sequence[int]) -> str:
    """The head of a text for logits whose axes have to be put into this order before."""
    head = head_graph(text)
    for node in head.graph.node:
        node.input[:] = ["head/~logits" if i == LOGITS else i for i in node.input]
    head.graph.node.insert(0, helper.make_node("Transpose", [LOGITS], ["head/~logits"], perm=order))
    return _text(head)


def _text(head: onnx.ModelProto) -> str:
    return base64.b64encode(head.SerializeToString(deterministic=True)).decode()


def _written_head(proto: onnx.ModelProto, end: TrainingEnd, dims: Dims, notes: list[str]) -> onnx.ModelProto:
    value, outputs = end.value, {o.name: o for o in proto.graph.output}
    nodes = [_without_maps(node, outputs, notes) for node in end.nodes]
    # The training end may be an output itself: it keeps its name, too.
    if value in outputs and not any(value in n.output for n in nodes):
        nodes.append(helper.make_node("Identity", [value], [value]))
    nodes = [*_constant_nodes(proto, nodes), *nodes]
    read = {i for n in nodes for i in n.input}
    tensors = [t for t in proto.graph.initializer if t.name in read]
    # Names mustn't clash with those of the trained part, which the import may change, or with its ports.
    inner = [*(t.name for t in tensors), *(o for n in nodes for o in n.output if o)]
    names = {name: f"head/{name}" for name in inner}
    names |= {name: f"{name}_" if name in (X, LOGITS) else name for name in outputs}
    written = list[onnx.NodeProto]()
    for node in nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = f"head/{node.name}" if node.name else ""
        copy.input[:] = [LOGITS if i == value else names.get(i, i) for i in node.input]
        copy.output[:] = [names.get(o, o) for o in node.output]
        written.append(copy)
    graph = helper.make_graph(
        written,
        "head",
        [helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, None)],
        [_with_name(o, names) for o in outputs.values()],
        [_with_name(t, names) for t in tensors],
    )
    if dims and dims[0] is not None:
        _free_batch(graph, dims[0])
    _lower_reductions(graph)
    # That of graphs: after `_lower_reductions` the head's operators have the same forms in it.
    limits = {"": NORMAL_OPSET, "ai.onnx": NORMAL_OPSET}
    opsets = [
        helper.make_opsetid(o.domain, min(o.version, limits.get(o.domain, o.version))) for o in proto.opset_import
    ]
    return helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)


def _lower_reductions(graph: onnx.GraphProto) -> None:
    """Give reductions their axes as an attribute, as up to opset 17."""
    tensors = _constants(graph)
    for node in graph.node:
        axes = tensors.get(node.input[1]) if node.op_type in ("ReduceMax", "ReduceMin") and node.input[1:] else None
        if axes is not None:
            node.attribute.append(helper.make_attribute("axes", numpy_helper.to_array(axes).reshape(-1).tolist()))
            del node.input[1:]


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    constants = [n for n in graph.node if n.op_type == "Constant"]
    values = {n.output[0]: a.t for n in constants for a in n.attribute if a.name == "value"}
    return {t.name: t for t in graph.initializer} | values


def _without_maps(node: onnx.NodeProto, outputs: dict[str, onnx.ValueInfoProto], notes: list[str]) -> onnx.NodeProto:
    if node.op_type != "ZipMap":
        return node
    name = node.output[0]
    outputs[name] = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [None, None])
    notes.append(f"Output {value_text(name)} is a tensor of probabilities [n, classes] in place of ZipMap's maps.")
    return helper.make_node("Identity", [node.input[0]], [name])


def _constant_nodes(proto: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes that compute the constants which some nodes read, in order."""
    constants, read = constant_values(proto), {i for n in nodes for i in n.input}
    needed = list[onnx.NodeProto]()
    for node in reversed(proto.graph.node):
        if not read.isdisjoint(node.output) and constants.issuperset(o for o in node.output if o):
            needed.append(node)
            read.update(node.input)
    return needed[::-1]


def _with_name(proto: _Named, names: Mapping[str, str]) -> _Named:
    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.name = names[proto.name]
    return copy


def _free_batch(graph: onnx.GraphProto, size: int) -> None:
    """Let reshapes to a batch of this size take any other."""
    tensors = _constants(graph)
    for node in graph.node:
        shape = tensors.get(node.input[1]) if node.op_type == "Reshape" else None
        sizes = [] if shape is None else numpy_helper.to_array(shape).reshape(-1).tolist()
        if not sizes or sizes[0] != size:
            continue
        free = np.array([0 if -1 in sizes else -1, *sizes[1:]], np.int64)
        name = f"{node.output[0]}/shape"
        graph.initializer.append(numpy_helper.from_array(free, name))
        node.input[1] = name


def _is_small(head: onnx.ModelProto, sizes: Sequence[int]) -> bool:
    """Whether no value of a head is huge: onnxruntime allocates whatever a file asks for, here and on boards."""
    shaped = onnx.ModelProto()
    shaped.CopyFrom(head)
    shape = [_TRIED_SAMPLES, *sizes]
    shaped.graph.input[0].CopyFrom(helper.make_tensor_value_info(LOGITS, onnx.TensorProto.FLOAT, shape))
    for value in shaped.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    counts = [math.prod(max(d or 0, 1) for d in dims) for dims in file_shapes(shaped).values()]
    grows = any(n.op_type in _GROWING_OPERATORS for n in head.graph.node)
    return not grows and max(counts, default=0) <= _MAX_NUMBERS


def _values_of_batches(text: str, sizes: Sequence[int]) -> dict[str, tuple[Array, list[Array]]]:
    """What a head computes for several samples, and for each of them; empty if onnxruntime doesn't run it on both."""
    x = np.random.default_rng(0).standard_normal((_TRIED_SAMPLES, *sizes)).astype(np.float32)
    try:
        head = PredictionHead(text)
        together = head.outputs(x)
        single = [head.outputs(x[i : i + 1]) for i in range(_TRIED_SAMPLES)]
    except ModelError:  # such as a reshape to a fixed batch
        return {}
    return {name: (value, [outputs[name] for outputs in single]) for name, value in together.items()}


def _batch_axis(together: Array, single: Sequence[Array]) -> int | None:
    """The axis along which a value is that of single samples, one after the other; None if it isn't."""
    for axis in range(together.ndim):
        try:
            rows = np.concatenate(single, axis)
        except ValueError:
            continue
        if rows.shape != together.shape:
            continue
        if np.allclose(rows, together, 1e-4, 1e-6) if rows.dtype.kind == "f" else np.array_equal(rows, together):
            return axis
    return None
