"""Imports a user's model: an ONNX file, a torch module or the factory of one, or a network of timm."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

import onnx

from fedprune.core.errors import ModelError, shape_text
from fedprune.core.validation import check_instance, check_texts
from fedprune.model.lengths import upper_shape
from fedprune.model.losses import LOSSES
from fedprune_export.channels.choices import Prefer
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
from fedprune_export.importing.torch_export import export_torch
from fedprune_export.importing.user_graphs import LOSS_KEY, METRIC_KEY, read_loss, read_metric
from fedprune_export.pruning.frozen_base import check_precision
from fedprune_export.pruning.model import Model


@dataclass(frozen=True, kw_only=True)
class ImportChoices:
    """A user's choices for an import. Those that shape the graph are stored in the model's file.

    Attributes:
        input_shape: One sample's shape, if a torch module doesn't say it in `input_shape`. It gives the
            free sizes of an ONNX file, whose other sizes it must repeat. One free size may be the bounds of a length,
            such as "400:16000".
        token_ids: Whether a torch module takes token ids (int64), if it doesn't say it in `input_dtype`.
        output: The output that gives the logits, if the model has several; or the inner value at which the model ends.
            What follows it in the file stays for predictions, if it has no weights.
        parameters: Names of the trainable tensors; by default those that the file lists, or all that are used as
            weights.
        prefer: Which channels to cut if only one kind can be: "coarse" (whole heads and groups) or "fine".
        loss: The name of the recipe's loss, such as "bce", which contains a Sigmoid at the model's end. Or a loss of
            your own, for recipes with loss "custom": a torch function or module of outputs and labels,
            `package.module:function`, or an ONNX file. It gives one number per sample [n]. Labels are like outputs,
            unless its attributes `target_shape` (of one sample) and `target_dtype` ("int64") say otherwise.
        metric: A metric of your own, for recipes with metric "custom", given as a loss is. Its numbers per sample [n]
            are averaged; or they are rows [n, k] and its attribute `value` is a function of their sums [k]. More is
            better.
        lora: Adapters to train, as a `Lora` or its text, such as "8:*.q.weight,*.v.weight". The weights are frozen.
        base: The precision in which frozen weights are stored, sent and loaded: "float16", or "int8" with a scale per
            output channel; by default they are tensors like all others.
    """

    input_shape: Sequence[int | str] | None = None
    token_ids: bool = False
    output: str | None = None
    parameters: Sequence[str] | None = None
    prefer: Prefer | None = None
    loss: object = None
    metric: object = None
    lora: Lora | str | None = None
    base: str | None = None


NO_CHOICES = ImportChoices()


def with_choices(raw: bytes, choices: ImportChoices) -> bytes:
    """A model's file with a user's choices in it. Raises `ModelError` if they don't fit the model."""
    loss, metric, lora, base = choices.loss, choices.metric, choices.lora, choices.base
    if not (choices.output is choices.parameters is choices.prefer is None):
        raw = _edit_file(raw, lambda proto: _write_choices(proto, choices))
    if isinstance(loss, str) and loss in LOSSES:
        built_in, loss = LOSSES[loss], None
        labels = built_in.labels if built_in.reads_logits else ""
        # Training ends elsewhere because of some losses' labels.
        if labels and ends_in_labels(inline_model(parse_model(raw, run_checker=False)), labels):
            raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, {metadata.LABELS_KEY: labels}))
    if loss is not None or metric is not None:
        model = build_model(raw, "model", own_loss=loss is not None)
        outputs = model.architecture.output_shape
        packed_outputs = read_packing(model.graph.metadata, OUTPUTS_KEY)
        texts = {}
        if loss is not None:
            with name_setting_in_errors("loss"):
                texts[LOSS_KEY] = base64.b64encode(read_loss(loss, outputs, packed_outputs)).decode()
        if metric is not None:
            with name_setting_in_errors("metric"):
                texts[METRIC_KEY] = base64.b64encode(read_metric(metric, outputs, packed_outputs)).decode()
        raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, texts))
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
