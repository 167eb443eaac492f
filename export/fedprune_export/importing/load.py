"""Imports a user's model: an ONNX file, a torch module or the factory of one, or a network of timm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import NoneType
from typing import Any

import onnx

from fedprune.core.errors import ModelError, shape_text
from fedprune.core.validation import check_instance, check_texts, check_whole
from fedprune.model.lengths import upper_shape
from fedprune.model.losses import LOSSES
from fedprune_export.importing import metadata
from fedprune_export.importing.adapters import Lora, with_adapters
from fedprune_export.importing.hub_folder import class_names
from fedprune_export.importing.lengths import read_shape
from fedprune_export.importing.model_building import as_model_errors, build_model, parse_inlined
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.packing import INPUTS_KEY, OUTPUTS_KEY, read_packing
from fedprune_export.importing.prediction_head import choose_output
from fedprune_export.importing.quantised import float_file
from fedprune_export.importing.sources import is_folder, name_of, read_source_bytes
from fedprune_export.importing.translation import read_graph
from fedprune_export.importing.user_graphs import LOSS_KEY, METRIC_KEY, embed_user_graph
from fedprune_export.ir.graph import read_dims
from fedprune_export.model_options import MAX_AXIS, ImportChoices
from fedprune_export.pruning.frozen_base import check_precision
from fedprune_export.pruning.model import Model

NO_CHOICES = ImportChoices()


@as_model_errors()
def with_choices(raw: bytes, choices: ImportChoices) -> bytes:
    """A model's file with a user's choices in it. Raises `ModelError` if they don't fit the model."""
    loss, metric, lora, base = choices.loss, choices.metric, choices.lora, choices.base
    labels = ""
    if isinstance(loss, str) and loss in LOSSES:
        labels, loss = LOSSES[loss].labels if LOSSES[loss].reads_logits else "", None
    raw = _with_settings(raw, choices, labels)
    if loss is not None or metric is not None:
        model = build_model(raw, "model", own_loss=loss is not None)
        output_shape = model.architecture.output_shape
        packed_outputs = read_packing(model.graph.metadata, OUTPUTS_KEY)
        functions = {key: source for key, source in ((LOSS_KEY, loss), (METRIC_KEY, metric)) if source is not None}
        user_graphs = {key: embed_user_graph(key, f, output_shape, packed_outputs) for key, f in functions.items()}
        raw = _with_texts(parse_model(raw, run_checker=False), user_graphs)
    if lora is not None:
        raw = with_adapters(build_model(raw, "model"), Lora.parse(lora) if isinstance(lora, str) else lora)
    if base is not None:
        check_precision(base)
        raw = _with_texts(parse_model(raw, run_checker=False), {metadata.BASE_KEY: base})
    return raw


def _with_settings(raw: bytes, choices: ImportChoices, labels: str) -> bytes:
    """A file with the chosen output, parameters, axis of classes and preference, and the labels of the loss."""
    texts = dict[str, str]()
    if choices.parameters is not None:
        parameters = check_texts("parameters", choices.parameters, error=ModelError)
        texts[metadata.PARAMETERS_KEY] = json.dumps(list(parameters))
    if choices.class_axis is not None:
        axis = check_whole("class_axis", choices.class_axis, -MAX_AXIS, MAX_AXIS, error=ModelError)
        texts[metadata.CLASS_AXIS_KEY] = str(axis)
    if choices.prefer is not None:
        texts[metadata.PREFER_KEY] = choices.prefer
    if not texts and choices.output is None and labels not in ("classes", "multi"):
        return raw
    proto = parse_model(raw, run_checker=False)
    if choices.output is not None:
        choose_output(proto, choices.output, read_graph(parse_inlined(raw)))
    # Where training ends and the classes are depends on these labels, of classes only if outputs have positions.
    if labels == "multi" or (labels == "classes" and any(len(read_dims(o)) not in (1, 2) for o in proto.graph.output)):
        texts[metadata.LABELS_KEY] = labels
    return _with_texts(proto, texts) if texts or choices.output is not None else raw


def _with_texts(proto: onnx.ModelProto, texts: Mapping[str, str]) -> bytes:
    metadata.write_properties(proto, texts)
    file: bytes = proto.SerializeToString(deterministic=True)
    return file


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
        return import_onnx(read_source_bytes(source, chosen, name), name, chosen)
    name = name or name_of(str(source))
    raw = read_source_bytes(source, chosen)
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
    return with_choices(float_file(read_source_bytes(source, choices)), choices)


def import_onnx(raw: bytes, name: str, choices: ImportChoices = NO_CHOICES) -> Model:
    """Import an ONNX model from memory, as `load` does; the same bytes and name always give the same architecture.

    Models below opset 13 are raised by onnx, which may name values another way in another version: then the same
    architecture is only sure with the same version of onnx. Raises `ModelError` if it is damaged, or uses what can't be
    handled.
    """
    return build_model(with_choices(float_file(raw), choices), name)
