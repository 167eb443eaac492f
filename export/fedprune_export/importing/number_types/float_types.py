"""Finds the types other than float32 in which a file computes what depends on its inputs or weights."""

from __future__ import annotations

import math

import onnx
from onnx import TensorProto

from fedprune_export.importing.graph_writer import value_types
from fedprune_export.ir.operators import REARRANGEMENTS

# Significant bits of the types that are computed in float32 instead, the leading one included.
SIGNIFICANT_BITS: dict[int, int] = {TensorProto.FLOAT16: 11, TensorProto.BFLOAT16: 8, TensorProto.DOUBLE: 53}

# Attributes that name a type.
TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"})


def computed_types(proto: onnx.ModelProto) -> set[int]:
    """The types of `SIGNIFICANT_BITS` that a model without functions computes in.

    A value that depends on neither inputs nor weights doesn't count: it is folded in the type that the file gives it.
    Neither does a weight of 16 bits that is only rearranged before it is cast (`stored_weights`).
    """
    graph = proto.graph
    stored = [(tensor.name, tensor) for tensor in graph.initializer]
    constants = [node for node in graph.node if node.op_type == "Constant"]
    stored += [(node.output[0], a.t) for node in constants for a in node.attribute if a.name == "value"]
    declared = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
    declared.update(tensor.data_type for _, tensor in stored)
    declared.update(a.i for n in graph.node for a in n.attribute if a.name in TYPE_ATTRIBUTES)
    if not declared & SIGNIFICANT_BITS.keys():
        return set()
    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    from_weights = {name for name, tensor in stored if tensor.data_type in halves and math.prod(tensor.dims) > 1}
    initializer_names = {tensor.name for tensor in graph.initializer}
    values = {v.name for v in graph.input if v.name not in initializer_names}
    for node in graph.node:
        if values.intersection(node.input):
            values.update(node.output)
        elif from_weights.intersection(node.input):
            from_weights.update(node.output)
            # Arithmetic on weights is trained through, so it has to be in float32.
            if node.op_type not in REARRANGEMENTS:
                values.update(node.output)
    types = value_types(proto)
    return {types[name] for name in values if types.get(name) in SIGNIFICANT_BITS}
