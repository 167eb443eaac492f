"""Writes and reads inference graphs with external weights: a board can replace the weights without any ONNX library.

The graph refers to ranges of `weights.safetensors`. The layout of that file depends only on the tensors' names and
shapes, so that new weights of the same widths fit the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors
from fedprune.core.errors import BundleError, path_remedy
from fedprune.runtime.bundle import BASE, INFERENCE, WEIGHTS, Bundle
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.base_reads import write_base_reads
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

# The file of weights that an inference graph refers to.
WEIGHTS_FILE = "weights.safetensors"
_MODEL_FILE = "model.onnx"


def inference_model(model: Model, widths: Sequence[int], *, opset: int | None = None) -> bytes:
    """The inference graph at these widths, as ONNX bytes without weights.

    `opset` is by default one that every supported onnxruntime loads. Raises `BundleError` if the widths don't fit the
    architecture, `ModelError` if the graph can't be written at that opset.
    """
    graph = at_widths(model, widths)
    if model.base is not None:
        write_base_reads(graph, model.base)
    proto = graph.to_proto() if opset is None else graph.to_proto(opset=opset)
    offset = len(tensorfile.header_for_specs([(b.name, b.code, b.shape) for b in model.architecture.base]))
    for array in model.architecture.base:
        offset = add_external(proto, array.name, array.dtype, array.shape, BASE, offset)
        # An initialiser that is an input, too, is only a default value: no runtime folds it into float32 constants.
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(array.name, kind, array.shape))
    return refer_to_weights(proto, model.architecture.shapes(widths))


def write_model(folder: Path, model: Model, weights: bytes) -> None:
    """Write a global model as `model.onnx` and the weights that it refers to.

    Raises `StorageFullError` if the disk is full, and `StorageError` if the disk fails.
    """
    with storage_errors(f"can't make {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    # The graph last: it never refers to weights that aren't there.
    write_atomically(folder / WEIGHTS_FILE, weights)
    if (frozen := model.base_file) is not None:
        write_atomically(folder / BASE, frozen)
    write_atomically(folder / _MODEL_FILE, inference_model(model, model.architecture.sizes))


def refer_to_weights(proto: onnx.ModelProto, shapes: Mapping[str, Sequence[int]]) -> bytes:
    """The bytes of a model whose weights are in `WEIGHTS_FILE`. `shapes`: all tensors of the file, in its order."""
    offset = len(tensorfile.header_for_specs([(n, "F32", s) for n, s in shapes.items()]))
    for name, shape in shapes.items():
        offset = add_external(proto, name, np.dtype(np.float32), shape, WEIGHTS_FILE, offset)
    # Deterministic: equal models have equal bytes, and so one digest.
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def add_external(
    proto: onnx.ModelProto, name: str, dtype: np.dtype[Any], shape: Sequence[int], file: str, offset: int
) -> int:
    """Add an initialiser that is stored in a file next to the model.

    `offset` is the byte of the file at which the tensor begins. Returns the byte at which it ends.
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


def inference_graph(folder: Path) -> Graph:
    """Load the inference graph of a bundle or served model; its weights become initialisers under their tensor names.

    Raises `BundleError` if the graph is damaged, or refers to weights that the folder lacks or that have another shape;
    `ModelError` if the graph has something that fedprune never writes.
    """
    path = folder / INFERENCE
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    except Exception as error:
        raise BundleError(f"{path} is no ONNX model", hint="Export the bundle again.") from error
    tensors = tensorfile.load_tensors(folder / WEIGHTS)
    if (folder / BASE).is_file():
        tensors |= tensorfile.load_tensors(folder / BASE)
    outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for initialiser in outside:
        tensor = tensors.get(initialiser.name)
        if tensor is None or tensor.shape != tuple(initialiser.dims):
            raise BundleError(
                f"{path} and the weights don't belong together: {initialiser.name}",
                expected=tuple(initialiser.dims),
                got="nothing" if tensor is None else tensor.shape,
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inside)
    try:
        graph = Graph.from_proto(proto)
        graph.to_bytes()  # raises for what protobuf parses but can't serialise, such as invalid text
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BundleError(
            f"{path} is damaged ({type(error).__name__}: {error})", hint="Export the bundle again."
        ) from error
    graph.initializers = {**{t.name: tensors[t.name] for t in outside}, **graph.initializers}
    return graph


def check_origin(bundle: Bundle, model: Model) -> None:
    """Make sure that a bundle was cut from a model. Raises `BundleError` if it belongs to another architecture."""
    if bundle.architecture.digest != model.architecture.digest:
        raise BundleError(
            f"{bundle.folder} was not cut from the given model as it was imported here",
            expected=f"architecture {bundle.architecture.digest[:12]} of {bundle.architecture.name}",
            got=model.architecture.digest[:12],
            hint="Give the model of the export, with the same --output, --parameters and --prefer.",
        )
