"""Types and shapes that onnxruntime infers: it knows its own operators, of which onnx knows none."""

from __future__ import annotations

import math

import onnx
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune.runtime.session import OnnxSession
from fedprune_export.importing.fused_operators import EARLY_NORMS, is_fused
from fedprune_export.ir.graph import read_dims, read_opset

_MAX_SIZES = 512  # a tensor of more numbers holds no sizes, so that its shape says all


def runtime_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
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
