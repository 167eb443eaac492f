"""Imports a user's model: an ONNX file, a torch module or the factory of one, or a network of timm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

from fedprune.core.errors import ModelError, shape_text
from fedprune.core.validation import check_instance
from fedprune.model.lengths import upper_shape
from fedprune_export.importing.choices import NO_CHOICES, ImportChoices, with_choices
from fedprune_export.importing.hub_folder import class_names
from fedprune_export.importing.lengths import read_shape
from fedprune_export.importing.model_building import as_model_errors, build_model
from fedprune_export.importing.packing import INPUTS_KEY
from fedprune_export.importing.quantised import float_file
from fedprune_export.importing.sources import is_folder, name_of, read_source_bytes
from fedprune_export.importing.torch_export import export_torch
from fedprune_export.pruning.model import Model


def load(source: str | Path | object, *, name: str | None = None, **choices: Any) -> Model:
    """Import a model.

    Raises `ModelError` if there is no such model, it is damaged, or it uses what can't be handled; `MissingExtraError`
    if torch or timm is needed and not installed.

    Args:
        source: An ONNX file; a folder in the Hugging Face hub's layout; a torch module; `package.module:factory` of
            one; or `timm:NAME`.
        name: The architecture's name; by default that of the file, factory, network or module's class.
        choices: Fields of `ImportChoices`, such as `input_shape=(3, 32, 32)` or `lora="8"`.
    """
    check_instance("name", name, (str, NoneType), "a text", error=ModelError)
    chosen = ImportChoices(**choices)
    if not isinstance(source, (str, Path)):
        name = name or type(source).__name__
        raw = export_torch(source, input_shape=chosen.input_shape, token_ids=chosen.token_ids, name=name)
        return import_onnx(raw, name, chosen)
    name = name or name_of(str(source))
    raw = read_source_bytes(source, chosen.input_shape, token_ids=chosen.token_ids)
    try:
        model = import_onnx(raw, name, chosen)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    check_input(str(source), model, chosen.input_shape)
    # Only folders of the hub list names of classes.
    if is_folder(source):
        return replace(model, class_names=class_names(Path(source), model.architecture.classes))
    return model


def check_input(source: str, model: Model, input_shape: Sequence[int | str] | None) -> None:
    """Raise `ModelError` unless a model takes samples of the requested shape: an ONNX file has its own."""
    model_shape = model.architecture.input_shape
    # Several inputs are packed into one row, whose shape means nothing to a user.
    if input_shape is None or INPUTS_KEY in model.graph.metadata:
        return
    if upper_shape(read_shape(input_shape)) != model_shape:
        raise ModelError(
            f"{source}: the shape of one sample",
            expected=shape_text(*model_shape),
            got=shape_text(*input_shape),
            hint="Leave --input-shape (input_shape) out, or export the ONNX file for that shape.",
        )


def read_source(source: str | Path, choices: ImportChoices = NO_CHOICES) -> bytes:
    """A model as the bytes of one ONNX file, which `import_onnx` takes; choices are written into it.

    Raises `ModelError` if there is no such model or it is damaged; `MissingExtraError` if torch or timm is needed and
    not installed.
    """
    return _prepare_file(read_source_bytes(source, choices.input_shape, token_ids=choices.token_ids), choices)


def import_onnx(raw: bytes, name: str, choices: ImportChoices = NO_CHOICES) -> Model:
    """Import an ONNX model from memory, as `load` does; the same bytes and name always give the same architecture.

    Models below opset 13 are raised by onnx, which may name values another way in another version: then the same
    architecture is only sure with the same version of onnx. Raises `ModelError` if it is damaged, or uses what can't be
    handled.
    """
    return build_model(_prepare_file(raw, choices), name)


@as_model_errors()
def _prepare_file(raw: bytes, choices: ImportChoices) -> bytes:
    """A file of floats with a user's choices in it. Raises `ModelError` if they don't fit, or it can't be one."""
    return with_choices(float_file(raw), choices)
