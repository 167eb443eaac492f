"""Reads the model that a source names, as the bytes of an ONNX file.

A source is an ONNX file, a folder in the layout of the Hugging Face hub, `package.module:factory` for a torch module,
or `timm:NAME`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedprune.core.disk import path_exists
from fedprune.core.errors import ModelError, shape_text
from fedprune.model.lengths import Shape, free_axis
from fedprune_export.importing.garbage_collection import pause_collection
from fedprune_export.importing.hub_folder import model_name, read_hub_folder
from fedprune_export.importing.lengths import read_shape
from fedprune_export.importing.model_file import parse_model, read_model_file
from fedprune_export.importing.sample_shapes import bind_shape
from fedprune_export.importing.timm_models import TIMM_PREFIX, timm_model, timm_name
from fedprune_export.importing.torch_export import export_torch
from fedprune_export.importing.torch_loading import factory_product


@pause_collection()
def read_source_bytes(source: str | Path, input_shape: Sequence[int | str] | None, *, token_ids: bool) -> bytes:
    """The ONNX bytes of any source: torch modules are exported. The arguments are fields of `ImportChoices`."""
    text = str(source)
    shape: Shape | None = None if input_shape is None else read_shape(input_shape)
    has_free_axis = shape is not None and free_axis(shape) is not None
    if _is_timm(text):
        if shape is not None and has_free_axis:
            raise ModelError(f"{text}: input_shape", expected="sizes", got=shape_text(*shape))
        sizes = None if shape is None else [size for size in shape if isinstance(size, int)]
        module, input_size = timm_model(timm_name(text), sizes)
        return export_torch(module, input_shape=input_size, name=text)
    if _is_factory(text):
        return export_torch(factory_product(text), input_shape=shape, token_ids=token_ids, name=text)
    raw = read_hub_folder(Path(source)) if is_folder(source) else read_model_file(Path(source))
    if shape is None:
        return raw
    proto = parse_model(raw)
    bind_shape(proto, shape)
    bound: bytes = proto.SerializeToString(deterministic=True)
    return bound


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


def _is_timm(text: str) -> bool:
    return text.startswith(TIMM_PREFIX) or bool(timm_name(text))


def _is_factory(text: str) -> bool:
    module, colon, function = text.rpartition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))
