"""Reading a user's model: an ONNX file, a torch module or the factory of one, or a network of timm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import onnx

from fedprune.core.disk import path_exists
from fedprune.core.errors import ModelError, error_reason, shape_text, value_text
from fedprune.core.validation import check_instance, check_texts
from fedprune.model.lengths import LENGTH_METADATA, Shape, free_axis, upper_shape
from fedprune_export.channels import analyse
from fedprune_export.importing import metadata
from fedprune_export.importing.adapters import Lora, uncut_tensors, with_adapters
from fedprune_export.importing.graph_writer import file_shapes
from fedprune_export.importing.hub_folder import class_names, model_name, read_hub_folder
from fedprune_export.importing.inlining import inline_model
from fedprune_export.importing.lengths import bind_length, read_shape
from fedprune_export.importing.model_file import check_valid_onnx, parse_model, read_model_file
from fedprune_export.importing.normalise import Normalised, normalise
from fedprune_export.importing.packing import INPUTS_KEY, OUTPUTS_KEY, read_packing
from fedprune_export.importing.timm_models import TIMM_PREFIX, timm_model, timm_name
from fedprune_export.importing.torch_export import export_torch, factory_product
from fedprune_export.importing.user_graphs import (
    LOSS_KEY,
    METRIC_KEY,
    check_labels,
    embed_user_graph,
    embedded_user_graph,
    import_loss,
    import_metric,
    read_loss,
    read_metric,
)
from fedprune_export.ir.dropout import DROPOUT_AXES_KEY
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.frozen_base import check_precision, freeze_base
from fedprune_export.pruning.model import RANKS_KEY, Model

__all__ = [
    "ImportChoices",
    "check_input",
    "import_onnx",
    "is_factory_source",
    "load",
    "read_source",
    "torch_module",
    "with_choices",
]

Prefer = Literal["coarse", "fine"]


@dataclass(frozen=True, kw_only=True)
class ImportChoices:
    """A user's choices for an import. Those that shape the graph are stored in the model's file.

    Attributes:
        input_shape: One sample's shape, where a torch module doesn't say it in `input_shape`; of an ONNX file it must
            be the file's own. One size may be the bounds of a length, such as "400:16000": of an ONNX file that of a
            free axis.
        token_ids: Whether a torch module takes token ids (int64), where it doesn't say it in `input_dtype`.
        output: Which output gives the logits, where the model has several, or by which value within the model it ends.
        parameters: Names of the trainable tensors; by default what the file says, else all that are used as weights.
        prefer: Which channels to cut where only one kind can be: "coarse" (whole heads and groups) or "fine".
        loss: A loss of your own, for recipes with loss "custom": a torch function or module of outputs and labels,
            `package.module:function`, or an ONNX file. It gives one number per sample [n]; labels are like outputs,
            unless its attributes `target_shape` (of one sample) and `target_dtype` ("int64") say something else.
        metric: A metric of your own, for recipes with metric "custom", given as a loss is. Its numbers per sample [n]
            are averaged; or they are rows [n, k] and its attribute `value` is a function of their sums [k]. More is
            better.
        lora: Adapters to train; the weights are frozen: a `Lora`, or its text, such as
            "8:*.q.weight,*.v.weight".
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
    text = str(source)
    default = _name_of(text)
    raw = _read_file(source, chosen)
    try:
        model = import_onnx(raw, name or default, chosen)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error
    check_input(text, model, chosen.input_shape)
    # Only folders of the hub list names of classes.
    if _is_folder(source):
        return replace(model, class_names=class_names(Path(source), model.architecture.classes))
    return model


def check_input(source: str, model: Model, input_shape: Sequence[int | str] | None) -> None:
    """Make sure that a model takes samples of the requested shape, since an ONNX file has its own.

    Raises `ModelError` if it takes another.
    """
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
    return with_choices(_read_file(source, choices), choices)


def _read_file(source: str | Path, choices: ImportChoices) -> bytes:
    text = str(source)
    network = timm_name(text)
    shape: Shape | None = None if choices.input_shape is None else read_shape(choices.input_shape)
    if network or text.startswith(TIMM_PREFIX):
        sizes = None if shape is None else [size for size in shape if isinstance(size, int)]
        if shape is not None and free_axis(shape) is not None:
            raise ModelError(f"{text}: input_shape", expected="sizes", got=shape_text(*shape))
        module, input_size = timm_model(network, sizes)
        return export_torch(module, input_shape=input_size, name=text)
    if _is_factory(text):
        return export_torch(factory_product(text), input_shape=shape, token_ids=choices.token_ids, name=text)
    raw = read_hub_folder(Path(source)) if _is_folder(source) else read_model_file(Path(source))
    if shape is None or free_axis(shape) is None:
        return raw
    proto = parse_model(raw)
    bind_length(proto, shape)
    bound: bytes = proto.SerializeToString(deterministic=True)
    return bound


def _name_of(source: str) -> str:
    if _is_factory(source) or source.startswith(TIMM_PREFIX):
        return source.rpartition(":")[2]
    return model_name(Path(source)) if _is_folder(source) else Path(source).stem


def _is_folder(source: str | Path) -> bool:
    return path_exists(Path(source)) and Path(source).is_dir()


def with_choices(raw: bytes, choices: ImportChoices) -> bytes:
    """A model's file with a user's choices in it. Raises `ModelError` if they don't fit the model."""
    loss, metric, lora, base = choices.loss, choices.metric, choices.lora, choices.base
    if not (choices.output is choices.parameters is choices.prefer is None):
        raw = _edit_file(raw, lambda proto: _write_choices(proto, choices))
    if loss is not None or metric is not None:
        model = _import_file(raw, "model", own_loss=loss is not None)
        outputs = model.architecture.output_shape
        packed_outputs = read_packing(model.graph.metadata, OUTPUTS_KEY)
        if loss is not None:
            with _name_setting_in_errors("loss"):
                raw = embed_user_graph(raw, LOSS_KEY, read_loss(loss, outputs, packed_outputs))
        if metric is not None:
            with _name_setting_in_errors("metric"):
                raw = embed_user_graph(raw, METRIC_KEY, read_metric(metric, outputs, packed_outputs))
    if lora is not None:
        raw = with_adapters(_import_file(raw, "model"), Lora.parse(lora) if isinstance(lora, str) else lora)
    if base is not None:
        check_precision(base)
        raw = _edit_file(raw, lambda proto: metadata.write_properties(proto, {metadata.BASE_KEY: base}))
    return raw


@contextmanager
def _name_setting_in_errors(setting: str) -> Iterator[None]:
    """Let errors name the setting of a user's function, because the model's file may be correct."""
    try:
        yield
    except ModelError as error:
        raise error.with_subject(error.what, ("model", setting)) from error.__cause__


def _edit_file(raw: bytes, edit: Callable[[onnx.ModelProto], None]) -> bytes:
    with _as_model_errors():
        proto = parse_model(raw)
        edit(proto)
        edited: bytes = proto.SerializeToString(deterministic=True)
        return edited


def is_factory_source(source: str) -> bool:
    """Whether a model's source is a factory or a network of timm, which make a new module at every call."""
    return _is_factory(source) or source.startswith(TIMM_PREFIX) or bool(timm_name(source))


def torch_module(source: str) -> Any:
    """A new instance of the torch module that a source names; None for an ONNX file.

    Raises `ModelError` if there is no such module; `MissingExtraError` if torch or timm is needed and not installed.
    """
    network = timm_name(source)
    if network or source.startswith(TIMM_PREFIX):
        return timm_model(network, None)[0]
    if not _is_factory(source):
        return None
    product = factory_product(source)
    return product[0] if isinstance(product, tuple) else product


def import_onnx(raw: bytes, name: str, choices: ImportChoices = NO_CHOICES) -> Model:
    """Import an ONNX model from memory, as `load` does; the same bytes and name always give the same architecture.

    Models below opset 13 are raised by onnx, which may name values another way in another version: then the same
    architecture is only sure with the same version of onnx. Raises `ModelError` if it is damaged, or uses what can't be
    handled.
    """
    return _import_file(with_choices(raw, choices), name)


def _import_file(raw: bytes, name: str, *, own_loss: bool = False) -> Model:
    with _as_model_errors():
        return _build_model(raw, name, own_loss)


@contextmanager
def _as_model_errors() -> Iterator[None]:
    """Turn unforeseen errors of reading a model into a `ModelError`."""
    try:
        yield
    # onnx, numpy and protobuf raise these for files that break their assumptions. A ModelError passes as it is.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model can't be understood ({type(error).__name__}: {error_reason(error)})",
            hint="If it runs elsewhere, please report this with the model.",
        ) from error


def _build_model(raw: bytes, name: str, own_loss: bool) -> Model:
    file_model = parse_model(raw, run_checker=False)
    proto = inline_model(file_model)
    # onnx's checker takes long on large files, so it sees each model once: the file, or what was made of it.
    if proto is file_model:
        check_valid_onnx(raw)
    else:
        _check_prepared(proto)
    texts, tensor_names = metadata.read_properties(proto), _tensors(proto)
    listed = metadata.read_names(texts, metadata.PARAMETERS_KEY, tensor_names)
    frozen = metadata.read_names(texts, metadata.FROZEN_KEY, tensor_names) or ()
    prefer = _parse_prefer(texts.get(metadata.PREFER_KEY, "coarse"))
    parameter_names = None if listed is None else frozenset(listed)
    normal = normalise(proto, parameter_names, raw, own_loss=own_loss or LOSS_KEY in texts)
    frozen_names = tuple(n for n in (normal.names.get(f, f) for f in frozen) if n in normal.parameters)
    precision = texts.get(metadata.BASE_KEY)
    # With adapters, or a frozen base in another precision, frozen weights keep all channels.
    uncut = uncut_tensors(normal.parameters, frozen_names) if precision is None else frozenset(frozen_names)
    analysis = analyse(normal.graph, normal.parameters, normal.trace, name, prefer=prefer, uncut=uncut)
    all_notes = (
        *metadata.note_of_tied(metadata.tied_names(texts)),
        *metadata.note_of_unused(metadata.unused_parameters(texts)),
        *metadata.training_notes(texts),
        *normal.notes,
        *analysis.notes,
    )
    notes = tuple(dict.fromkeys(all_notes))
    normal.graph.metadata = _model_metadata(texts, normal, frozen_names)
    if prefer != "coarse":
        normal.graph.metadata[metadata.PREFER_KEY] = prefer
    ranks = metadata.recorded_ranks(texts, analysis.architecture)
    if ranks is not None:
        normal.graph.metadata[RANKS_KEY] = texts[RANKS_KEY]
    # Ranks hold for the groups that they were trained with; another version may group channels in another way.
    elif RANKS_KEY in texts:
        notes += ("The recorded ranks are of other groups of channels, and don't count.",)
    architecture, base = analysis.architecture, None
    if precision is not None:
        base, architecture = freeze_base(normal.graph, architecture, frozen_names, precision)
        normal.graph.metadata[metadata.BASE_KEY] = precision
    loss, metric = _import_user_graphs(texts, analysis.architecture.output_shape)
    model = Model(normal.graph, architecture, notes, analysis.values, frozen_names, base, loss, metric, ranks=ranks)
    vars(model)["trace"] = normal.trace  # the cached property: nothing is traced twice
    return model


def _model_metadata(texts: Mapping[str, str], normal: Normalised, frozen_names: Sequence[str]) -> dict[str, str]:
    """The metadata of an imported model: facts of the file, under the names that its tensors have now."""
    author_names = metadata.original_names(texts)
    # A file that was imported before lists the author's names, which win over those that it has now.
    names = {new: author_names.get(old, old) for old, new in normal.names.items() if new in normal.parameters}
    names |= {new: author for new, author in author_names.items() if new in normal.parameters and new not in names}
    facts = {
        metadata.PARAMETERS_KEY: list(normal.parameters),
        metadata.FROZEN_KEY: frozen_names,
        metadata.TIED_KEY: {normal.names.get(k, k): v for k, v in metadata.tied_names(texts).items()},
        metadata.UNUSED_KEY: metadata.unused_parameters(texts),
        metadata.NAMES_KEY: names,
        metadata.TRAINING_NOTES_KEY: metadata.training_notes(texts),
    }
    graph_keys = (INPUTS_KEY, OUTPUTS_KEY, LENGTH_METADATA, DROPOUT_AXES_KEY)
    return {
        **{key: text for key, text in normal.graph.metadata.items() if key in graph_keys},
        **{key: json.dumps(fact) for key, fact in facts.items() if fact},
        **{key: texts[key] for key in (LOSS_KEY, METRIC_KEY) if key in texts},
    }


def _import_user_graphs(texts: Mapping[str, str], outputs: Sequence[int]) -> tuple[Model | None, Graph | None]:
    """The loss and metric in a file's metadata. Raises `ModelError` if one is damaged or they don't fit each other."""
    graphs = {key: embedded_user_graph(key, texts[key]) for key in (LOSS_KEY, METRIC_KEY) if key in texts}
    with _name_setting_in_errors("loss"):
        loss = import_loss(graphs[LOSS_KEY], outputs) if LOSS_KEY in graphs else None
    with _name_setting_in_errors("metric"):
        metric = import_metric(graphs[METRIC_KEY], outputs) if METRIC_KEY in graphs else None
        check_labels(loss, metric)
    return loss, metric


def _check_prepared(proto: onnx.ModelProto) -> None:
    try:
        check_valid_onnx(proto)
    except ModelError as error:
        raise ModelError(
            f"writing out the model's functions, branches and loops has made no valid model ({error})",
            hint="Please report this with the model, or export it without them.",
        ) from error


def _tensors(proto: onnx.ModelProto) -> set[str]:
    """Names of a model's tensors, also of those that are written as Constant nodes."""
    constants = (o for n in proto.graph.node if n.op_type == "Constant" for o in n.output)
    return {*(t.name for t in proto.graph.initializer), *constants}


def _parse_prefer(text: str) -> Prefer:
    if text == "coarse":
        return "coarse"
    if text == "fine":
        return "fine"
    raise ModelError("which channels to prefer", expected="coarse or fine", got=value_text(text))


def _write_choices(proto: onnx.ModelProto, choices: ImportChoices) -> None:
    """Write the chosen output, parameters and preference into a model."""
    if choices.output is not None:
        _choose_output(proto, choices.output)
    if choices.parameters is not None:
        tensor_names = _tensors(proto)
        listed = check_texts("parameters", choices.parameters, error=ModelError)
        parameters = metadata.check_tensor_names(listed, tensor_names, "the list of parameters")
        metadata.write_properties(proto, {metadata.PARAMETERS_KEY: json.dumps(parameters)})
    if choices.prefer is not None:
        metadata.write_properties(proto, {metadata.PREFER_KEY: choices.prefer})


def _choose_output(proto: onnx.ModelProto, output: str) -> None:
    """Make one value the only output: one of several outputs, or an inner value."""
    listed = {o.name: o for o in proto.graph.output}
    inner = {name for node in proto.graph.node for name in node.output if name}
    if output not in listed and output not in inner:
        raise ModelError(
            "the model has no such output", expected=metadata.shown_names(list(listed)), got=value_text(output)
        )
    # A value within the model has no declared type; its shape must be inferred.
    value = listed.get(output)
    if value is None:
        dims = file_shapes(proto).get(output)
        if dims is None:
            raise ModelError(f"value {value_text(output)} can't be the output", expected="a value whose shape is known")
        sizes: list[int | str | None] = ["N" if i == 0 and d is None else d for i, d in enumerate(dims)]
        value = onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, sizes)
    chosen_output = onnx.ValueInfoProto()
    chosen_output.CopyFrom(value)
    del proto.graph.output[:]
    proto.graph.output.append(chosen_output)


def _is_factory(text: str) -> bool:
    module, colon, function = text.rpartition(":")
    return bool(colon) and function.isidentifier() and all(p.isidentifier() for p in module.split("."))
