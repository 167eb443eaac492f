"""Writes and reads inference graphs with external weights: a board can replace the weights without any ONNX library.

The graph refers to ranges of `weights.safetensors`. The layout of that file depends only on the tensors' names and
shapes, so that new weights of the same widths fit the same graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx

from fedprune.core import tensorfile
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import storage_errors
from fedprune.core.errors import BundleError, path_remedy
from fedprune.runtime.bundle import BASE, INFERENCE, WEIGHTS, Bundle
from fedprune.runtime.precision import RANGES
from fedprune_export.ir.graph import Array, Graph
from fedprune_export.pruning.base_reads import write_base_reads
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model

_MODEL_FILE = "model.onnx"


def inference_model(model: Model, widths: Sequence[int], *, opset: int | None = None) -> bytes:
    """The inference graph at these widths, as ONNX bytes without weights.

    `opset` is by default one that every supported onnxruntime loads. Raises `BundleError` if the widths don't fit the
    architecture, `ModelError` if the graph can't be written at that opset.
    """
    graph = at_widths(model, widths)
    if model.base is not None:
        write_base_reads(graph, model.base)
    proto = graph.to_proto(opset=opset)
    for array in model.architecture.base:
        # An initialiser that is an input, too, is only a default value: no runtime folds it into float32 constants.
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        proto.graph.input.append(onnx.helper.make_tensor_value_info(array.name, kind, array.shape))
    frozen = {b.name: np.zeros(b.shape, b.dtype) for b in model.architecture.base}
    return refer_to_files(proto, {BASE: frozen, WEIGHTS: zero_weights(model, widths)})


def write_model(folder: Path, model: Model, weights: bytes) -> None:
    """Write a global model as `model.onnx` and the weights that it refers to.

    Raises `StorageFullError` if the disk is full, and `StorageError` if the disk fails.
    """
    with storage_errors(f"can't make {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    # The graph last: it never refers to weights that aren't there.
    write_atomically(folder / WEIGHTS, weights)
    if (frozen := model.base_file) is not None:
        write_atomically(folder / BASE, frozen)
    write_atomically(folder / _MODEL_FILE, inference_model(model, model.architecture.sizes))


def refer_to_files(proto: onnx.ModelProto, files: Mapping[str, Mapping[str, Array]]) -> bytes:
    """The bytes of a model whose weights are in files next to it: per file all its tensors, for their types and shapes,
    in the file's order."""
    for file, tensors in files.items():
        offset = len(tensorfile.header_for_tensors(tensors))
        for name, value in tensors.items():
            if name != RANGES:  # a board's measurements, which no graph that predicts reads
                tensor = proto.graph.initializer.add(name=name, dims=value.shape)
                tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(value.dtype)
                tensor.data_location = onnx.TensorProto.EXTERNAL
                for key, text in (("location", file), ("offset", str(offset)), ("length", str(value.nbytes))):
                    tensor.external_data.add(key=key, value=text)
            offset += value.nbytes
    # Deterministic: equal models have equal bytes, and so one digest.
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def zero_weights(model: Model, widths: Sequence[int]) -> dict[str, Array]:
    """Zeros in the shapes of a submodel's weights and statistics, in their order."""
    return {n: np.zeros(s, np.float32) for n, s in model.architecture.shapes(widths).items()}


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
