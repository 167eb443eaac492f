"""Imports a user's model: an ONNX file, a torch module or the factory of one, or a network of timm."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
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
from fedprune_export.importing.inlining import inline_model
from fedprune_export.importing.lengths import read_shape
from fedprune_export.importing.model_building import as_model_errors, build_model, name_setting_in_errors, tensor_names
from fedprune_export.importing.model_file import parse_model
from fedprune_export.importing.packing import INPUTS_KEY, OUTPUTS_KEY, read_packing
from fedprune_export.importing.prediction_head import choose_output, ends_in_labels
from fedprune_export.importing.quantised import float_file
from fedprune_export.importing.sources import is_folder, name_of, read_source_bytes
from fedprune_export.importing.user_graphs import LOSS_KEY, METRIC_KEY, read_loss, read_metric
from fedprune_export.ir.graph import read_dims
from fedprune_export.model_options import MAX_AXIS, ImportChoices
from fedprune_export.pruning.frozen_base import check_precision
from fedprune_export.pruning.model import Model

NO_CHOICES = ImportChoices()


def with_choices(raw: bytes, choices: ImportChoices) -> bytes:
    """A model's file with a user's choices in it. Raises `ModelError` if they don't fit the model."""
    loss, metric, lora, base = choices.loss, choices.metric, choices.lora, choices.base
    if any(getattr(choices, name) is not None for name in ("output", "class_axis", "parameters", "prefer")):
        raw = _edit_file(raw, lambda proto: _write_choices(proto, choices))
    if isinstance(loss, str) and loss in LOSSES:
        built_in, loss = LOSSES[loss], None
        labels = built_in.labels if built_in.reads_logits else ""
        proto = parse_model(raw, run_checker=False)
        # Training ends elsewhere because of some losses' labels.
        if labels and ends_in_labels(inline_model(proto), labels):
            raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, {metadata.LABELS_KEY: labels}))
        # Only outputs with positions may have their classes elsewhere than on axis 1, unless a convolution makes them.
        makers = {o: n.op_type for n in proto.graph.node for o in n.output}
        outputs = [o for o in proto.graph.output if o.type.HasField("tensor_type") and makers.get(o.name) != "Conv"]
        if labels == "classes" and not all(len(read_dims(o)) in (1, 2) for o in outputs):
            axes = build_model(raw, "model").class_axes
            if len(axes) == 1 and axes != (1,):
                texts = {metadata.CLASS_AXIS_KEY: str(axes[0])}
                raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, texts))
    if loss is not None or metric is not None:
        model = build_model(raw, "model", own_loss=loss is not None)
        output_shape = model.architecture.output_shape
        packed_outputs = read_packing(model.graph.metadata, OUTPUTS_KEY)
        user_graphs = {}
        if loss is not None:
            with name_setting_in_errors("loss"):
                user_graphs[LOSS_KEY] = base64.b64encode(read_loss(loss, output_shape, packed_outputs)).decode()
        if metric is not None:
            with name_setting_in_errors("metric"):
                user_graphs[METRIC_KEY] = base64.b64encode(read_metric(metric, output_shape, packed_outputs)).decode()
        raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, user_graphs))
    if lora is not None:
        raw = with_adapters(build_model(raw, "model"), Lora.parse(lora) if isinstance(lora, str) else lora)
    if base is not None:
        check_precision(base)
        raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, {metadata.BASE_KEY: base}))
    return raw


@as_model_errors()
def _edit_file(raw: bytes, edit: Callable[[onnx.ModelProto], None]) -> bytes:
    proto = parse_model(raw)
    edit(proto)
    edited: bytes = proto.SerializeToString(deterministic=True)
    return edited


def _write_choices(proto: onnx.ModelProto, choices: ImportChoices) -> None:
    """Write the chosen output, parameters and preference into a model."""
    if choices.output is not None:
        choose_output(proto, choices.output, inline_model(proto))
    if choices.parameters is not None:
        listed = check_texts("parameters", choices.parameters, error=ModelError)
        parameters = metadata.check_tensor_names(listed, tensor_names(proto), "the list of parameters")
        metadata.write_properties(proto, {metadata.PARAMETERS_KEY: json.dumps(parameters)})
    if choices.class_axis is not None:
        axis = check_whole("class_axis", choices.class_axis, -MAX_AXIS, MAX_AXIS, error=ModelError)
        metadata.write_properties(proto, {metadata.CLASS_AXIS_KEY: str(axis)})
    if choices.prefer is not None:
        metadata.write_properties(proto, {metadata.PREFER_KEY: choices.prefer})


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
    return _prepare_file(read_source_bytes(source, choices), choices)


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
