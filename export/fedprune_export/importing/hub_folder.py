"""Reads models in the layout of the Hugging Face hub: a graph, and weights that replace the graph's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from fedprune.core import tensorfile
from fedprune.core.disk import path_exists
from fedprune.core.errors import BundleError, ModelError, shape_text, value_text
from fedprune.core.json_file import read_json
from fedprune_export.importing import metadata
from fedprune_export.importing.model_file import parse_model, read_model_file

HUB_GRAPH_FILE, HUB_WEIGHTS_FILE = "model.onnx", "model.safetensors"
HUB_CONFIG_FILE, HUB_CARD_FILE = "config.json", "README.md"
# Files of a repository on the hub: the graph, torch's state dict, facts for programs, and the model card.
HUB_FILES = (HUB_GRAPH_FILE, HUB_WEIGHTS_FILE, HUB_CONFIG_FILE, HUB_CARD_FILE)

# The counter of torch's batch norms, next to their statistics; a graph has no such tensor.
BATCH_COUNTER = "num_batches_tracked"

# Enough for the names of some 20,000 classes in `id2label`.
_MAX_CONFIG_BYTES = 2**20
_MAX_NAME_LENGTH = 100


def is_hub_folder(path: Path) -> bool:
    return path_exists(path / HUB_GRAPH_FILE, file=True) and path_exists(path / HUB_CONFIG_FILE, file=True)


def read_hub_folder(folder: Path) -> bytes:
    """A model as one ONNX file: `model.onnx` with the weights of `model.safetensors`, where that is there.

    Raises `ModelError` if there is no graph, a file is damaged, or the weights are not the graph's.
    """
    if not path_exists(folder / HUB_GRAPH_FILE, file=True):
        raise ModelError(
            f"{folder} is no model in the layout of the Hugging Face hub",
            expected=f"a folder with {HUB_GRAPH_FILE}",
            got="no such file",
            hint="If there are only weights, load them into their torch module, and give load the module.",
        )
    raw = read_model_file(folder / HUB_GRAPH_FILE)
    if not path_exists(folder / HUB_WEIGHTS_FILE, file=True):
        return raw
    try:
        tensors = tensorfile.map_tensors(folder / HUB_WEIGHTS_FILE)
    except BundleError as error:
        raise ModelError(str(error)) from error
    proto = parse_model(raw)
    _fill_weights(proto, tensors, folder / HUB_WEIGHTS_FILE)
    filled: bytes = proto.SerializeToString(deterministic=True)
    return filled


def model_name(folder: Path, default: str = "") -> str:
    """The model's name in `config.json`; without one, `default`, which is the folder's name unless it is given.

    Raises `ModelError` if the file is damaged, or the name is invalid.
    """
    name = read_config(folder).get("name", default or folder.resolve().name)
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME_LENGTH or not name.isprintable():
        raise ModelError(
            f"{folder / HUB_CONFIG_FILE}: name",
            expected=f"a text of 1 to {_MAX_NAME_LENGTH} characters",
            got=value_text(name),
        )
    return name


def class_names(folder: Path, classes: int) -> tuple[str, ...]:
    """Names of the classes in `id2label` of `config.json`; empty without that. Raises `ModelError` if the file is
    damaged, or doesn't name each class."""
    labels = read_config(folder).get("id2label")
    if not labels:
        return ()
    named = [labels.get(str(i)) for i in range(classes)] if isinstance(labels, dict) else []
    if not named or len(labels) != classes or not all(isinstance(name, str) and name for name in named):
        raise ModelError(
            f"{folder / HUB_CONFIG_FILE}: id2label",
            expected=f"a name for each class from 0 to {classes - 1}",
            got=value_text(labels),
        )
    return tuple(map(str, named))


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json`; empty without such a file. Raises `ModelError` if it is damaged."""
    path = folder / HUB_CONFIG_FILE
    if not path_exists(path, file=True):
        return {}
    body = read_json(path, ModelError, _MAX_CONFIG_BYTES)
    if not isinstance(body, dict):
        raise ModelError(f"{path}", expected="an object", got=value_text(body))
    return body


def _fill_weights(proto: onnx.ModelProto, tensors: dict[str, Any], where: Path) -> None:
    """Set the weights of a graph by name. Raises `ModelError` if names or shapes don't fit it."""
    texts = metadata.read_properties(proto)
    initializers = {t.name: t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    listed = metadata.read_names(texts, metadata.PARAMETERS_KEY, set(initializers))
    # A state dict has tied tensors under each name, and parameters that the forward pass does not use.
    further_names = {name for names in metadata.tied_names(texts).values() for name in names}
    further_names.update(metadata.unused_parameters(texts))
    for name, value in tensors.items():
        if name not in initializers:
            if name in further_names or name.rpartition(".")[2] == BATCH_COUNTER:
                continue
            raise ModelError(
                f"{where} has a tensor {value_text(name)}",
                expected=f"weights of {HUB_GRAPH_FILE} alone",
                hint="Save both again.",
            )
        sizes = tuple(initializers[name].dims)
        if value.shape != sizes or value.dtype != np.float32:
            raise ModelError(
                f"{where}: tensor {value_text(name)}",
                expected=f"float32 {shape_text(*sizes)}",
                got=f"{value.dtype} {shape_text(*value.shape)}",
            )
        initializers[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
    lacking = next((name for name in listed or () if name not in tensors), None)
    if lacking is not None:
        raise ModelError(f"{where}: tensor {lacking}", expected="a weight", got="nothing", hint="Save both again.")
