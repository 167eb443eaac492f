"""Replaces inputs of a file by constants, such as the sampling rate of a recording or the first state of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, shape_text, value_text
from fedprune_export.importing.metadata import shown_names
from fedprune_export.importing.node_writer import Names
from fedprune_export.ir.graph import Array, Dim, read_dims


def fix_inputs(proto: onnx.ModelProto, numbers: Mapping[str, float]) -> None:
    """Replace inputs by constants of their types and shapes, which are filled with these numbers, by their names.

    Raises `ModelError` if there is no such input, its type doesn't hold the number, or a size of it is free and no
    other input has it.
    """
    tensors = {t.name for t in proto.graph.initializer}
    inputs = {i.name: i for i in proto.graph.input if i.name not in tensors}
    for name, number in numbers.items():
        if name not in inputs:
            raise ModelError(
                "fix: the model has no such input", expected=shown_names(list(inputs)), got=value_text(name)
            )
        value = inputs.pop(name)
        proto.ir_version = max(proto.ir_version, 4)  # from which on constants need not be inputs, too
        proto.graph.input.remove(value)
        constant = _constant(value, number)
        dims = read_dims(value)
        sizes = [d for d in dims if isinstance(d, int)]
        if len(sizes) == len(dims):
            proto.graph.initializer.append(numpy_helper.from_array(np.full(sizes, constant), name))
        else:
            _expand(proto.graph, name, constant, dims, list(inputs.values()))


def _constant(value: onnx.ValueInfoProto, number: object) -> Array:
    """A number in the type of an input."""
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))
    if isinstance(number, (bool, int, float)) and dtype.kind in "biuf":
        with np.errstate(all="ignore"):
            constant = np.array(number).astype(dtype)
        if dtype.kind == "f" or constant == number:
            return constant
    raise ModelError(
        f"fix: input {value_text(value.name)}", expected=f"a number of type {dtype}", got=value_text(number)
    )


def _expand(
    graph: onnx.GraphProto, name: str, constant: Array, dims: Sequence[Dim], others: Sequence[onnx.ValueInfoProto]
) -> None:
    """Compute a constant whose free sizes are those of other inputs: of the same name, or the batch's."""
    prefix, sizes, nodes = Names(graph).fresh(f"{name}/fixed"), list[str](), list[onnx.NodeProto]()
    axes = [(other.name, axis, dim) for other in others for axis, dim in enumerate(read_dims(other))]
    for axis, dim in enumerate(dims):
        sizes.append(f"{prefix}/{axis}")
        values = {sizes[-1]: dim}
        if not isinstance(dim, int):
            batches = [(i, a) for i, a, d in axes if axis == a == 0 and not isinstance(d, int)]
            sources = [(i, a) for i, a, d in axes if dim and d == dim] or batches
            if not sources:
                raise ModelError(
                    f"fix: input {value_text(name)}",
                    expected="sizes that are fixed, or that another input has",
                    got=shape_text(*(d or "?" for d in dims)),
                    hint="Export the model with that size fixed, or under the name of the batch.",
                )
            shape, index = f"{sizes[-1]}/shape", f"{sizes[-1]}/axis"
            nodes.append(helper.make_node("Shape", [sources[0][0]], [shape]))
            nodes.append(helper.make_node("Gather", [shape, index], [sizes[-1]], axis=0))
            values = {index: sources[0][1]}
        graph.initializer.extend(numpy_helper.from_array(np.array([v]), n) for n, v in values.items())
    graph.initializer.append(numpy_helper.from_array(constant, prefix))
    nodes.append(helper.make_node("Concat", sizes, [f"{prefix}/sizes"], axis=0))
    nodes.append(helper.make_node("Expand", [prefix, f"{prefix}/sizes"], [name]))
    nodes += graph.node
    del graph.node[:]
    graph.node.extend(nodes)
