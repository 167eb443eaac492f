"""Types and shapes of values that onnx infers; of onnxruntime's own operators, which onnx doesn't know, onnxruntime."""

from __future__ import annotations

import math
from contextlib import suppress

import onnx
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.fused_operators import EARLY_NORMS, is_fused
from fedprune_export.ir.graph import Graph, Port, read_dims, read_opset
from fedprune_export.ir.opset_lowering import COMPOSITES
from fedprune_export.ir.shape_inference import InferredShapes, infer_node, set_value

_MAX_SIZES = 512  # a tensor of more numbers holds no sizes, so that its shape says all
_MAX_SIZE_TENSOR_BYTES = 8 * _MAX_SIZES


def file_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """The shapes that onnx infers; None for sizes that are free."""
    out: dict[str, list[int | None]] = {}
    for value in _inferred_values(model):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            out[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return out


def graph_shapes(graph: Graph) -> dict[str, list[int | None]]:
    """The shapes that onnx infers of a graph's values, as by `file_shapes`."""
    return file_shapes(_without_weights(graph))


def value_types(graph: Graph) -> dict[str, int]:
    """The types of a graph's values that onnx infers, as numbers of `onnx.TensorProto`."""
    values = _inferred_values(_without_weights(graph))
    return {v.name: v.type.tensor_type.elem_type for v in values if v.type.HasField("tensor_type")}


def _without_weights(graph: Graph) -> onnx.ModelProto:
    """A graph as a model whose large tensors are declared as inputs, so that none is copied."""
    bare = graph.copy()
    large = {name: value for name, value in graph.initializers.items() if value.nbytes > _MAX_SIZE_TENSOR_BYTES}
    bare.inputs += [Port(name, value.dtype, value.shape) for name, value in large.items()]
    bare.initializers = {name: value for name, value in graph.initializers.items() if name not in large}
    _fold_sizes(bare)
    model = bare.to_unlowered_proto()
    for value, port in zip(model.graph.output, graph.outputs, strict=True):
        if not port.shape:  # a file may leave it out
            value.type.tensor_type.ClearField("shape")
    return model


def _fold_sizes(graph: Graph) -> None:
    """Compute the few numbers that follow from constants, such as axes: onnx's inference reads stored ones alone."""
    inferred = InferredShapes()
    for name, value in graph.initializers.items():
        set_value(inferred, name, value)
    for node in graph.nodes:
        if any(node.inputs) and all(i in inferred.numbers for i in node.inputs if i):
            with suppress(ModelError):  # it may be dead; what isn't is refused where it is traced
                infer_node(graph, inferred, node, [o for o in node.outputs if o])
    graph.nodes = [n for n in graph.nodes if not all(o in inferred.numbers for o in n.outputs if o)]
    graph.initializers |= inferred.numbers


def _inferred_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs, inner values and outputs, with what onnx and onnxruntime infer of them."""
    # Inference serialises the model, which takes long with its weights, and fails from 2 GiB on.
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        # Shape inference reads a tensor's values only if they are sizes.
        if len(tensor.raw_data) > _MAX_SIZE_TENSOR_BYTES:
            tensor.ClearField("raw_data")
    for node in bare.graph.node:
        # onnx infers no shapes of these.
        if node.op_type in COMPOSITES and node.domain in ("", "ai.onnx"):
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
    try:
        graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    # onnx can fail on files that run; then only what the file states is known.
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
        graph = model.graph
    return [*graph.input, *_runtime_values(model), *graph.value_info, *graph.output]


def _runtime_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The values of a model with operators of onnxruntime, with their types, and shapes of one or more axes.

    Without such operators, or if onnxruntime doesn't load the model, it is empty.
    """
    if not any(is_fused(node, read_opset(model)) for node in model.graph.node):
        return []
    probe = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    graph, tensors = probe.graph, {t.name: t for t in model.graph.initializer}
    graph.name = "probe"
    graph.node.extend(model.graph.node)
    for node in graph.node:
        node.ClearField("name")  # may be duplicate
        node.domain = "" if node.op_type in EARLY_NORMS else node.domain  # where the kernels are
    # Weights are inputs, so that none is copied.
    graph.initializer.extend(t for t in tensors.values() if math.prod(t.dims) <= _MAX_SIZES)
    kinds = {t.name: (t.data_type, tuple(t.dims)) for t in tensors.values()}
    kinds |= {v.name: (v.type.tensor_type.elem_type, read_dims(v)) for v in model.graph.input if v.name not in tensors}
    small = {t.name for t in graph.initializer}
    graph.input.extend(helper.make_tensor_value_info(n, *kind) for n, kind in kinds.items() if n not in small)
    graph.output.extend(onnx.ValueInfoProto(name=o) for node in graph.node for o in node.output if o)
    try:
        types = OnnxSession(probe.SerializeToString(), exact=True).output_types
    except ModelError:
        return []
    return [
        # onnxruntime gives a number, and what it knows no shape of, the same empty one.
        helper.make_tensor_value_info(name, onnx.TensorProto.DataType.Value(kind[7:-1].upper()), shape or None)
        for name, (kind, shape) in types.items()
        if kind.startswith("tensor(")
    ]
