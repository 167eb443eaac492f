"""The inference graph of a bundle or a board with its weights inside, and the model that a bundle was cut from."""

from __future__ import annotations

from pathlib import Path

import onnx

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.runtime.bundle import INFERENCE, WEIGHTS, Bundle
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.model import Model


def inference_graph(folder: Path) -> Graph:
    """An inference graph of ours; its weights are initialisers under their tensor names.

    Args:
        folder: A bundle's or a served model's, whose files have been checked.

    Raises:
        BundleError: The graph is damaged, or wants weights that the folder lacks or that have another shape.
        ModelError: The graph has what fedprune never writes.
    """
    path = folder / INFERENCE
    try:
        proto = onnx.load_model_from_string(path.read_bytes())
    except OSError as error:
        raise BundleError(f"can't read {path}: {error.strerror}") from error
    except Exception as error:
        raise BundleError(f"{path} is no ONNX model", hint="Export the bundle again.") from error
    tensors = tensorfile.load(folder / WEIGHTS)
    outside = [t for t in proto.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    inside = [t for t in proto.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    for wanted in outside:
        found = tensors.get(wanted.name)
        if found is None or found.shape != tuple(wanted.dims):
            raise BundleError(
                f"{path} and the weights don't belong together: {wanted.name}",
                expected=tuple(wanted.dims),
                got="nothing" if found is None else found.shape,
            )
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inside)
    try:
        graph = Graph.from_proto(proto)
        graph.to_bytes()  # what protobuf lets in and doesn't let out again, such as text that is none
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise BundleError(
            f"{path} is damaged ({type(error).__name__}: {error})", hint="Export the bundle again."
        ) from error
    graph.initializers = {**{t.name: tensors[t.name] for t in outside}, **graph.initializers}
    return graph


def check_origin(bundle: Bundle, model: Model) -> None:
    """Make sure that a bundle was cut from a model.

    Raises:
        BundleError: It belongs to another architecture.
    """
    if bundle.architecture.digest != model.architecture.digest:
        raise BundleError(
            f"{bundle.folder} was not cut from {model.architecture.name} as it was imported here",
            expected=f"architecture {bundle.architecture.digest[:12]}",
            got=model.architecture.digest[:12],
            hint="Give the model of the export, with the same --output, --parameters and --prefer.",
        )
