"""Inference graphs whose weights lie beside them in a file that a board can replace without any ONNX library.

The graph refers to ranges of `weights.safetensors`. Canonical tensor files put tensors of given names and shapes at
given offsets, so new weights of the same widths fit the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from fedprune.core import tensorfile
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

WEIGHTS_FILE = "weights.safetensors"
"""The file that an inference graph expects beside it."""


def inference_model(model: Model, widths: Sequence[int], *, opset: int | None = None) -> bytes:
    """The inference graph at these widths, as ONNX bytes without weights.

    Args:
        model: The whole model.
        widths: Kept channels per group.
        opset: The opset of what is written; by default one that every supported onnxruntime loads.

    Raises:
        BundleError: The widths don't fit the architecture.
        ModelError: The graph can't be written at that opset.
    """
    graph = at_widths(model, widths)
    proto = graph.to_proto() if opset is None else graph.to_proto(opset=opset)
    return with_weights(proto, model.architecture.shapes(widths))


def with_weights(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The bytes of a model whose weights lie in `WEIGHTS_FILE`.

    Args:
        proto: The model without them.
        shapes: All tensors of the file, in its order.
    """
    offset = len(tensorfile.header([(n, "F32", s) for n, s in shapes.items()]))
    for name, shape in shapes.items():
        offset = add_external(proto, name, np.dtype(np.float32), shape, WEIGHTS_FILE, offset)
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def add_external(
    proto: onnx.ModelProto, name: str, dtype: np.dtype[Any], shape: Sequence[int], file: str, offset: int
) -> int:
    """Add an initialiser that lies in a file beside the model.

    Args:
        proto: The model.
        name: The initialiser's name.
        dtype: Its type.
        shape: Its shape.
        file: The file's name.
        offset: Where in it the tensor begins, in bytes.

    Returns:
        Where it ends.
    """
    length = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    tensor = proto.graph.initializer.add()
    tensor.name = name
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    tensor.dims.extend(shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return offset + length
