"""Writes and reads prediction heads: ONNX graphs from `logits` to the outputs of a user's file, in base64."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, value_text
from fedprune.model.step_contract import LOGITS, X
from fedprune.runtime.prediction_head import HEAD_KEY, PredictionHead
from fedprune_export.importing import metadata
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.training_end import TrainingEnd, constant_values, has_suppression
from fedprune_export.importing.translation import lower_reductions
from fedprune_export.importing.value_inference import file_shapes
from fedprune_export.ir.graph import Array, Graph, Node, Port

# Samples on which a head is tried: all at once, and one by one.
_TRIED_SAMPLES = 3
# The numbers that a value of it may have: those of a large picture's classes.
_MAX_NUMBERS = 2**27
# Operators whose outputs may be of any size, whatever their inputs are.
_GROWING_OPERATORS = frozenset({"ConstantOfShape", "Expand", "OneHot", "Range", "Tile"})
# What stands for a free size, such as a length.
_FREE_SIZE = 4


def head_graph(text: str) -> onnx.ModelProto:
    return parse_model(metadata.decode_file(HEAD_KEY, text), run_checker=False)


def class_names(text: str, classes: int) -> tuple[str, ...]:
    """The names of classes that a head tells instead of numbers; empty without any."""
    for tensor in head_graph(text).graph.initializer if text else ():
        names = numpy_helper.to_array(tensor).reshape(-1) if tensor.data_type == onnx.TensorProto.STRING else ()
        if len(names) == classes:
            return tuple(name.decode() if isinstance(name, bytes) else str(name) for name in names)
    return ()


def head_metadata(graph: Graph, end: TrainingEnd, notes: list[str]) -> dict[str, str]:
    """The head behind the end of training, in base64, by its key: that of a prediction head, or, if boxes are chosen
    among those of all samples, that of what only files keep. Empty if it can't be computed for several samples, or
    computes something else for them than sample by sample.

    ZipMap, whose outputs are maps, is left out: its numbers are the output.
    """
    try:
        head = _head(graph, end, notes)
    except ModelError:  # a reduction whose axes are computed, which opset 17 has no form of
        return {}
    sizes = [_FREE_SIZE if d is None else d for d in end.dims[1:]]
    head.inputs[0].shape = (_TRIED_SAMPLES, *sizes)
    if not _is_small(head):
        return {}
    head.inputs[0].shape = ("N", *(None for _ in sizes))
    values = _values_of_batches(head, sizes)
    axes = {name: _batch_axis(*pair) for name, pair in values.items()}
    chooses = has_suppression(head.nodes)
    if not values or (None in axes.values() and not chooses):
        return {}
    for port in head.outputs:
        rank, axis = values[port.name][0].ndim, axes[port.name]
        port.shape = port.shape if len(port.shape) == rank else (None,) * rank
        # The file's batch may be a fixed one.
        if not chooses and axis is not None and isinstance(port.shape[axis], int):
            port.shape = (*port.shape[:axis], "N", *port.shape[axis + 1 :])
    return {metadata.FILE_END_KEY if chooses else HEAD_KEY: _text(head.to_proto())}


def behind_transpose(text: str, order: Sequence[int]) -> str:
    """The head of a text for logits whose axes have to be put into this order before."""
    head = head_graph(text)
    for node in head.graph.node:
        node.input[:] = ["head/~logits" if i == LOGITS else i for i in node.input]
    head.graph.node.insert(0, helper.make_node("Transpose", [LOGITS], ["head/~logits"], perm=order))
    return _text(head)


def _text(head: onnx.ModelProto) -> str:
    return base64.b64encode(head.SerializeToString(deterministic=True)).decode()


def _head(graph: Graph, end: TrainingEnd, notes: list[str]) -> Graph:
    """The nodes behind the end of training, and those of the constants that they read, under names of their own."""
    head, constants = graph.copy_without_nodes(), constant_values(graph)
    head.name, head.metadata = "head", {}
    head.nodes = [n.copy() for n in graph.nodes if constants.issuperset(o for o in n.outputs if o)]
    head.nodes += [n.copy() for n in end.nodes]
    for node in head.nodes:
        if node.op == "ZipMap":
            node.op, node.domain, node.attrs = "Identity", "", {}
            name = value_text(node.outputs[0])
            notes.append(f"Output {name} is a tensor of probabilities [n, classes] in place of ZipMap's maps.")
    # The training end may be an output itself: it keeps its name, too.
    outputs = {p.name for p in head.outputs}
    if end.value in outputs and not any(end.value in n.outputs for n in end.nodes):
        head.nodes.append(Node("Identity", [end.value], [end.value]))
    head.prune()
    if end.dims and end.dims[0] is not None:
        _free_batch(head, end.dims[0])
    lower_reductions(head)
    # Names mustn't clash with those of the trained part, which the import may change, or with its ports.
    inner = [*head.initializers, *(o for n in head.nodes for o in n.outputs if o)]
    names = {name: f"head/{name}" for name in inner}
    names |= {name: f"{name}_" if name in (X, LOGITS) else name for name in outputs}
    head.initializers = {names[name]: value for name, value in head.initializers.items()}
    for node in head.nodes:
        node.name = ""
        node.inputs = [LOGITS if i == end.value else names.get(i, i) for i in node.inputs]
        node.outputs = [names.get(o, o) for o in node.outputs]
    for port in head.outputs:
        port.name = names[port.name]
    head.inputs = [Port(LOGITS, np.dtype(np.float32), ())]
    return head


def _free_batch(head: Graph, size: int) -> None:
    """Let reshapes to a batch of this size take any other."""
    for node in head.nodes:
        shape = head.initializers.get(node.inputs[1]) if node.op == "Reshape" else None
        sizes = [] if shape is None else shape.reshape(-1).tolist()
        if sizes and sizes[0] == size:
            node.inputs[1] = head.ints(0 if -1 in sizes else -1, *sizes[1:])


def _without_output_shapes(head: Graph) -> onnx.ModelProto:
    """A head as a model. A file may leave the shapes of its outputs out, or declare them for a batch of its own."""
    proto = head.to_proto()
    for value in proto.graph.output:
        value.type.tensor_type.ClearField("shape")
    return proto


def _is_small(head: Graph) -> bool:
    """Whether no value of a head is huge: onnxruntime allocates whatever a file asks for, here and on boards."""
    counts = [math.prod(max(d or 0, 1) for d in dims) for dims in file_shapes(_without_output_shapes(head)).values()]
    grows = any(n.op in _GROWING_OPERATORS for n in head.nodes)
    return not grows and max(counts, default=0) <= _MAX_NUMBERS


def _values_of_batches(head: Graph, sizes: Sequence[int]) -> dict[str, tuple[Array, list[Array]]]:
    """What a head computes for several samples, and for each of them; empty if onnxruntime doesn't run it on both."""
    x = np.random.default_rng(0).standard_normal((_TRIED_SAMPLES, *sizes)).astype(np.float32)
    try:
        session = PredictionHead(_text(_without_output_shapes(head)))
        together = session.outputs(x)
        single = [session.outputs(x[i : i + 1]) for i in range(_TRIED_SAMPLES)]
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
