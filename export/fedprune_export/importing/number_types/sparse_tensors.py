"""Stores the sparse tensors of a file densely: a training moves all their numbers."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import numpy_helper

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune_export.ir.graph import read_tensor
from fedprune_export.ir.shape_inference import MAX_ELEMENTS


def store_densely(graph: onnx.GraphProto, notes: list[str]) -> None:
    """Make dense tensors of a graph's sparse initialisers and Constant nodes. `notes` gets a sentence that names them.

    Raises `ModelError` if one is too large.
    """
    names: list[str] = []
    for sparse in graph.sparse_initializer:
        graph.initializer.append(_dense(sparse, sparse.values.name))
        names.append(sparse.values.name)
    del graph.sparse_initializer[:]
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        for attribute in node.attribute:
            if attribute.name == "sparse_value":
                # Nobody writes a number of his code sparsely: it is a weight, as an initialiser is.
                graph.initializer.append(_dense(attribute.sparse_tensor, node.output[0]))
                names.append(node.output[0])
                graph.node.remove(node)
                break
    if names:
        notes.append(f"Stored sparse, and trained with their zeros: {first_few(names, max_names=3)}.")


def _dense(sparse: onnx.SparseTensorProto, name: str) -> onnx.TensorProto:
    """A sparse tensor with all its numbers. onnx's checker has compared its indices with its sizes."""
    sizes = list(sparse.dims)
    if math.prod(sizes) > MAX_ELEMENTS:
        what = f"numbers of sparse tensor {value_text(name)}"
        raise ModelError(what, expected=f"at most {MAX_ELEMENTS}", got=math.prod(sizes))
    values, indices = read_tensor(sparse.values).reshape(-1), read_tensor(sparse.indices)
    dense = np.zeros(math.prod(sizes), values.dtype)
    # Indices are into the flat tensor [n], or one per axis [n, axes].
    dense[indices if indices.ndim < 2 else np.ravel_multi_index(tuple(indices.T), sizes)] = values
    return numpy_helper.from_array(dense.reshape(sizes), name)
