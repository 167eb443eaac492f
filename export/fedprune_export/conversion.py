"""Weights and graphs out of fedprune: a torch state dict, or one ONNX file with the weights inside."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune import tensorfile
from fedprune.architecture import Architecture, TensorKind
from fedprune.bundle import WEIGHTS, Bundle
from fedprune.disk import write_whole
from fedprune.errors import BundleError, MissingExtraError, UsageError
from fedprune_export.bundle_graph import check_origin, inference_graph
from fedprune_export.drafts import NORMAL_OPSET
from fedprune_export.graph import Graph
from fedprune_export.imported import Model
from fedprune_export.importing import import_onnx
from fedprune_export.importing.metadata import PARAMETERS_KEY, tied

Array = npt.NDArray[Any]

_COUNTER = "num_batches_tracked"
"""What torch's batch norms count beside their statistics; a strict `load_state_dict` misses it."""


def with_weights(model: Model, tensors: Mapping[str, Array], where: str) -> Model:
    """A model with other weights, such as the server's global ones.

    Args:
        model: The whole model.
        tensors: All its tensors by name; further ones, such as torch's counters, are left out.
        where: Where they come from, for messages.

    Raises:
        BundleError: The tensors are not the model's.
    """
    for spec in model.architecture.tensors:
        value = tensors.get(spec.name)
        if value is None or value.shape != spec.shape or value.dtype != np.float32:
            raise BundleError(
                f"{where} holds no weights of {model.architecture.name}: tensor {spec.name}",
                expected=f"float32 {spec.shape}",
                got="nothing" if value is None else f"{value.dtype} {value.shape}",
                hint="A submodel's weights are in its bundle: give that instead.",
            )
    graph = model.graph.copy()
    graph.initializers.update({t.name: tensors[t.name] for t in model.architecture.tensors})
    return replace(model, graph=graph)


def bundle_onnx(bundle: Bundle, opset: int | None = None) -> bytes:
    """The submodel of a bundle as one ONNX file, which can be imported again.

    Args:
        bundle: A bundle whose files have been checked.
        opset: The opset of the file; by default that of the bundle.

    Raises:
        ModelError: The graph can't be written at that opset.
    """
    graph = inference_graph(bundle)
    if opset not in (None, graph.opset) and graph.opset != NORMAL_OPSET:
        graph = import_onnx(graph.to_bytes(), bundle.architecture.name).graph
    return _onnx(graph, bundle.architecture, opset)


def model_onnx(model: Model, opset: int | None = None) -> bytes:
    """A whole model as one ONNX file, which can be imported again.

    Args:
        model: The model.
        opset: The opset of the file; by default one that every supported onnxruntime loads.

    Raises:
        ModelError: The graph can't be written at that opset.
    """
    return _onnx(model.graph, model.architecture, opset)


def _onnx(graph: Graph, architecture: Architecture, opset: int | None) -> bytes:
    """A graph as a file that says which of its tensors are weights and statistics."""
    proto = graph.to_proto(opset=opset)
    listed = {p.key: p.value for p in proto.metadata_props}
    listed[PARAMETERS_KEY] = json.dumps([t.name for t in architecture.tensors])
    onnx.helper.set_model_props(proto, listed)
    raw: bytes = proto.SerializeToString(deterministic=True)
    return raw


def bundle_tensors(bundle: Bundle, into: Model | None = None) -> dict[str, Array]:
    """The tensors of a bundle by their original names.

    Args:
        bundle: A bundle whose files have been checked.
        into: The whole model, to scatter them into at their places; otherwise they have the submodel's shapes.

    Raises:
        BundleError: The bundle is not one of that model's.
    """
    tensors = tensorfile.load(bundle.path(WEIGHTS))
    if into is None:
        return dict(tensors)
    check_origin(bundle, into)
    return dict(bundle.selection.scatter(tensors, into.tensors))


def state_dict(
    architecture: Architecture, tensors: Mapping[str, Array], graph: Graph | None = None
) -> dict[str, Array]:
    """Tensors as a torch module's state dict has them: with the counters of its batch norms, and all names of each.

    Args:
        architecture: The model.
        tensors: Its tensors, or a submodel's.
        graph: A graph of the model, which says what other names tensors have.

    Raises:
        ModelError: What it says is damaged.
    """
    out: dict[str, Array] = {}
    others = tied({} if graph is None else graph.metadata)
    for name, value in tensors.items():
        out |= dict.fromkeys((name, *others.get(name, ())), value)
        spec = architecture.by_name.get(name)
        if spec is not None and spec.kind is TensorKind.STAT_VAR and name.endswith("running_var"):
            out[name.removesuffix("running_var") + _COUNTER] = np.zeros((), np.int64)
    return out


def write_state_dict(path: Path, state: Mapping[str, Array]) -> int:
    """Write a state dict; returns the file's size.

    Args:
        path: A name that ends in `.safetensors`, or in `.pt` or `.pth` for `torch.load(..., weights_only=True)`.
        state: Tensors by name.

    Raises:
        UsageError: The name ends in something else.
        MissingExtraError: torch is needed and not installed.
        StorageError: The file can't be written.
    """
    if path.suffix == ".safetensors":
        raw = tensorfile.encode(state)
        write_whole(path, raw)
        return len(raw)
    if path.suffix not in (".pt", ".pth"):
        raise UsageError(f"{path}", expected="a file name that ends in .safetensors, .pt or .pth")
    torch = _torch()
    buffer = io.BytesIO()
    torch.save({n: torch.from_numpy(np.array(v)) for n, v in state.items()}, buffer)
    raw = buffer.getvalue()
    write_whole(path, raw)
    return len(raw)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError(
            "a .pt file needs torch, which is not installed",
            hint="Write a .safetensors file, or pip install 'fedprune[torch]'.",
        ) from error
    return torch
