"""Reads the model that a source names, as the bytes of an ONNX file, and compares it with an earlier read.

A source is an ONNX file, a folder in the layout of the Hugging Face hub, `package.module:factory` for a torch module,
or `timm:NAME`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.core.disk import path_exists
from fedprune.core.errors import ModelError, shape_text
from fedprune.model.lengths import Shape, free_axis
from fedprune_export.importing.fixed_inputs import fix_inputs
from fedprune_export.importing.hub_folder import model_name, read_hub_folder
from fedprune_export.importing.lengths import read_shape
from fedprune_export.importing.model_file import parse_model, read_model_file
from fedprune_export.importing.sample_shapes import bind_shape
from fedprune_export.importing.timm_models import TIMM_PREFIX, timm_model, timm_name
from fedprune_export.importing.torch_export import export_torch
from fedprune_export.importing.torch_loading import factory_product, pause_collection
from fedprune_export.importing.user_graphs import LOSS_KEY, METRIC_KEY
from fedprune_export.model_options import ImportChoices

_USER_GRAPH_KEYS = (LOSS_KEY, METRIC_KEY)


@dataclass(frozen=True)
class ModelChanges:
    """What differs between two reads of a model.

    Attributes:
        graph: Whether operators, shapes, names or choices differ.
        tensors: Names of tensors with other values.
        loss: Whether the later read has another loss of the user's own; none isn't another one.
        metric: As `loss`.
    """

    graph: bool
    tensors: frozenset[str]
    loss: bool
    metric: bool


@pause_collection()
def read_source_bytes(source: object, choices: ImportChoices, name: str = "model") -> bytes:
    """The ONNX bytes of any source, with fixed inputs and sizes in them. Torch modules are exported: one that is given
    itself under `name`."""
    text, input_shape = str(source) if isinstance(source, (str, Path)) else "", choices.input_shape
    shape: Shape | None = None if input_shape is None else read_shape(input_shape)
    if not text or _is_factory(text) or _is_timm(text):
        raw = _export(source, text or name, shape, choices)
        shape = None
    else:
        path = Path(text)
        raw = read_hub_folder(path) if is_folder(path) else read_model_file(path)
    if shape is None and not choices.fix:
        return raw
    proto = parse_model(raw)
    fix_inputs(proto, choices.fix or {})
    if shape is not None:
        bind_shape(proto, shape)
    written: bytes = proto.SerializeToString(deterministic=True)
    return written


def _export(source: object, name: str, shape: Shape | None, choices: ImportChoices) -> bytes:
    if not isinstance(source, (str, Path)):
        return export_torch(source, input_shape=shape, token_ids=choices.token_ids, name=name)
    if not _is_timm(name):  # `timm:NAME` has the form of a factory, too
        return export_torch(factory_product(name), input_shape=shape, token_ids=choices.token_ids, name=name)
    sizes = None if shape is None else [size for size in shape if isinstance(size, int)]
    if shape is not None and free_axis(shape) is not None:
        raise ModelError(f"{name}: input_shape", expected="sizes", got=shape_text(*shape))
    module, input_size = timm_model(timm_name(name), sizes)
    return export_torch(module, input_shape=input_size, name=name)


def name_of(source: str) -> str:
    """The name of a source's model by default: that of the factory, network, folder or file."""
    if _is_factory(source) or source.startswith(TIMM_PREFIX):
        return source.rpartition(":")[2]
    return model_name(Path(source)) if is_folder(source) else Path(source).stem


def is_folder(source: str | Path) -> bool:
    return path_exists(Path(source)) and Path(source).is_dir()


def is_factory_source(source: str) -> bool:
    """Whether a model's source is a factory or a network of timm, which make a new module at every call."""
    return _is_factory(source) or _is_timm(source)


@pause_collection()
def torch_module(source: str) -> Any:
    """A new instance of the torch module that a source names; None for an ONNX file.

    Raises `ModelError` if there is no such module; `MissingExtraError` if torch or timm is needed and not installed.
    """
    if _is_timm(source):
        return timm_model(timm_name(source), None)[0]
    if not _is_factory(source):
        return None
    product = factory_product(source)
    return product[0] if isinstance(product, tuple) else product


def compare_models(before: bytes, after: bytes) -> ModelChanges:
    """The differences between two files of a model, each as `read_source` returns it."""
    (old, old_tensors, old_user_graphs), (new, new_tensors, new_user_graphs) = _split_file(before), _split_file(after)
    common = old_tensors.keys() & new_tensors.keys()
    tensors = frozenset(n for n in common if old_tensors[n].tobytes() != new_tensors[n].tobytes())
    changed = (key in new_user_graphs and new_user_graphs[key] != old_user_graphs.get(key) for key in _USER_GRAPH_KEYS)
    return ModelChanges(old != new, tensors, *changed)


def drawn_tensors(source: str, raw: bytes, names: frozenset[str], read: Callable[[], bytes]) -> frozenset[str]:
    """Tensors whose values a factory draws at random in every call, such as untrained weights.

    `raw` is the model's file after one call of the factory `source`, and `names` are the tensors in question. `read`
    exports the file again, which takes longer than one more call of the factory.
    """
    state, tensors = torch_module(source).state_dict(), _split_file(raw)[1]
    drawn = frozenset(n for n in names & state.keys() if not np.array_equal(_numpy_values(state[n]), tensors[n]))
    # Tensors that are no parameters or buffers have no name outside the file.
    return drawn if drawn == names else drawn | (names & compare_models(raw, read()).tensors)


def _is_timm(text: str) -> bool:
    return text.startswith(TIMM_PREFIX) or bool(timm_name(text))


def _is_factory(text: str) -> bool:
    module, colon, function = text.rpartition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))


def _numpy_values(tensor: Any) -> npt.NDArray[Any]:
    values: npt.NDArray[Any] = (tensor.float() if tensor.is_floating_point() else tensor).detach().cpu().numpy()
    return values


def _split_file(raw: bytes) -> tuple[bytes, dict[str, npt.NDArray[Any]], dict[str, str]]:
    """A model's file in parts: everything but values, the values of its tensors, and loss and metric."""
    proto = parse_model(raw, run_checker=False)
    user_graphs = {p.key: p.value for p in proto.metadata_props if p.key in _USER_GRAPH_KEYS}
    other_properties = [p for p in proto.metadata_props if p.key not in _USER_GRAPH_KEYS]
    del proto.metadata_props[:]
    proto.metadata_props.extend(other_properties)
    tensors = {}
    for tensor in proto.graph.initializer:
        tensors[tensor.name] = onnx.numpy_helper.to_array(tensor)
        shape, kind, name = list(tensor.dims), tensor.data_type, tensor.name
        # The rest of the file must be equal bytes if only values differ.
        tensor.CopyFrom(onnx.TensorProto(name=name, dims=shape, data_type=kind))
    graph: bytes = proto.SerializeToString(deterministic=True)
    return graph, tensors, user_graphs
