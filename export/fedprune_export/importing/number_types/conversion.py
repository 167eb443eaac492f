"""Writes a file with another type of floats in float32: its tensors, its values, and attributes that name a type."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from fedprune_export.importing.number_types.float_types import SIGNIFICANT_BITS, TYPE_ATTRIBUTES
from fedprune_export.ir.graph import read_tensor

_MAX_FLOAT32 = np.finfo(np.float32).max


def convert_to_float32(model: onnx.ModelProto) -> None:
    """Write every float of a model as float32, also in functions and sub-graphs. Whole numbers keep their types.

    Numbers beyond float32, such as the lowest float64 in a mask, become its largest. Raises `ModelError` if a tensor is
    damaged.
    """
    _convert_graph(model.graph)
    for function in model.functions:
        _convert_nodes(function.node)
        _convert_attributes(function.attribute_proto)
        del function.value_info[:]


def _convert_graph(graph: onnx.GraphProto) -> None:
    # Types of inner values are inferred again.
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        _convert_type(value.type)
    for tensor in (*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)):
        _convert_tensor(tensor)
    _convert_nodes(graph.node)


def _convert_type(declared: onnx.TypeProto) -> None:
    kind = declared.WhichOneof("value")
    if kind == "tensor_type" and declared.tensor_type.elem_type in SIGNIFICANT_BITS:
        declared.tensor_type.elem_type = TensorProto.FLOAT
    elif kind in ("sequence_type", "optional_type"):
        _convert_type(getattr(declared, kind).elem_type)


def _convert_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        _convert_attributes(node.attribute)


def _convert_attributes(attributes: Iterable[onnx.AttributeProto]) -> None:
    for attribute in attributes:
        if attribute.name in TYPE_ATTRIBUTES and attribute.i in SIGNIFICANT_BITS:
            attribute.i = TensorProto.FLOAT
        if attribute.HasField("t"):
            _convert_tensor(attribute.t)
        if attribute.HasField("sparse_tensor"):
            _convert_tensor(attribute.sparse_tensor.values)
        for tensor in attribute.tensors:
            _convert_tensor(tensor)
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            _convert_graph(graph)


def _convert_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_type not in SIGNIFICANT_BITS:
        return
    value = read_tensor(tensor)
    if tensor.data_type == TensorProto.DOUBLE:
        value = np.where(np.isfinite(value), np.clip(value, -_MAX_FLOAT32, _MAX_FLOAT32), value)
    tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
