"""Builds a model from the bytes of an ONNX file: its normalised graph, its channels that can be cut, and its notes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import onnx

from fedprune.core.errors import ModelError, error_reason, value_text
from fedprune.model.lengths import LENGTH_METADATA
from fedprune.runtime.prediction_head import HEAD_KEY
from fedprune_export.channels import analyse
from fedprune_export.importing import metadata
from fedprune_export.importing.adapters import uncut_tensors
from fedprune_export.importing.class_axes import find_class_axes, move_classes
from fedprune_export.importing.draws import rewrite_draws
from fedprune_export.importing.head_graph import class_names
from fedprune_export.importing.inlining import inline_model
from fedprune_export.importing.model_file import check_valid_onnx, parse_model
from fedprune_export.importing.normalise import Normalised, normalise
from fedprune_export.importing.number_types import as_single_precision
from fedprune_export.importing.packing import INPUTS_KEY, OUTPUTS_KEY
from fedprune_export.importing.prediction_head import separate_head
from fedprune_export.importing.refusals import check_input_types
from fedprune_export.importing.translation import read_graph, write_graph
from fedprune_export.importing.user_graphs import LOSS_KEY, METRIC_KEY, import_user_graphs
from fedprune_export.ir.dropout import DRAWS_KEY, DROPOUT_AXES_KEY
from fedprune_export.ir.instance_norms import INSTANCE_NORMS_KEY, instance_means
from fedprune_export.model_options import Prefer
from fedprune_export.pruning.frozen_base import freeze_base
from fedprune_export.pruning.model import ACTIVATION_RANGES_KEY, RANKS_KEY, Model


@contextmanager
def as_model_errors() -> Iterator[None]:
    """Turn unforeseen errors of reading a model into a `ModelError`."""
    try:
        yield
    # onnx, numpy and protobuf raise these for files that break their assumptions. A ModelError passes as it is.
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model can't be understood ({type(error).__name__}: {error_reason(error)})",
            hint="If it runs elsewhere, please report this with the model.",
        ) from error


@as_model_errors()
def build_model(raw: bytes, name: str, *, own_loss: bool = False) -> Model:
    """Build the model of a file, with the choices and facts in the file's metadata.

    `own_loss`: it will have a loss of its own, which takes several outputs (see `normalise`). Raises `ModelError` if
    the file is damaged, or uses what can't be handled.
    """
    file_notes = list[str]()
    graph = read_graph(parse_inlined(raw))
    # Draws first, since a file with random numbers can't be compared with itself in float32.
    if rewrite_draws(graph, file_notes):
        raw = write_graph(graph).SerializeToString()
    single = as_single_precision(raw, graph)
    if single is not None:
        raw, graph = single.raw, read_graph(parse_inlined(single.raw))
    texts, tensors = dict(graph.metadata), graph.initializers.keys()
    listed = metadata.read_names(texts, metadata.PARAMETERS_KEY, tensors)
    frozen = metadata.read_names(texts, metadata.FROZEN_KEY, tensors) or ()
    prefer = _parse_prefer(texts.get(metadata.PREFER_KEY, "coarse"))
    parameters = None if listed is None else frozenset(listed)
    own_loss = own_loss or LOSS_KEY in texts
    labels = texts.get(metadata.LABELS_KEY, "")
    separate = separate_head(graph, raw, file_notes, labels, own_loss=own_loss)
    outputs, head = [replace(port) for port in graph.outputs], separate.texts
    normal = normalise(graph, parameters, separate.raw, own_loss=own_loss)
    chosen_axis = metadata.class_axis(texts)
    class_axis = separate.axis if chosen_axis is None else chosen_axis
    class_axes = find_class_axes(normal) if class_axis is None else (1,)
    if labels == "classes" and len(class_axes) == 1 and class_axes != (1,):
        class_axis, class_axes = class_axes[0], (1,)
    if class_axis is not None:
        head = move_classes(normal, class_axis, outputs[0], head)
    if single is not None:
        compared = [port.name for port in outputs]
        file_notes.append(single.compare(separate.raw, compared, separate.removed, normal.graph))
    frozen_names = tuple(n for n in (normal.names.get(f, f) for f in frozen) if n in normal.parameters)
    precision = texts.get(metadata.BASE_KEY)
    # With adapters, or a frozen base in another precision, frozen weights keep all channels.
    uncut = uncut_tensors(normal.parameters, frozen_names) if precision is None else frozenset(frozen_names)
    analysis = analyse(normal.graph, normal.parameters, normal.trace, name, prefer=prefer, uncut=uncut)
    author_notes = metadata.author_notes(texts)
    notes = tuple(dict.fromkeys([*author_notes, *file_notes, *normal.notes, *analysis.notes]))
    normal.graph.metadata = _model_metadata(texts, normal, frozen_names)
    normal.graph.metadata |= head
    if class_axis is not None:
        normal.graph.metadata[metadata.CLASS_AXIS_KEY] = "1"
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
    loss, metric = import_user_graphs(texts, analysis.architecture.output_shape)
    names = class_names(head.get(HEAD_KEY, ""), architecture.classes)
    model = Model(
        normal.graph,
        architecture,
        notes,
        analysis.values,
        frozen_names,
        base,
        loss,
        metric,
        names,
        ranks=ranks,
        class_axes=class_axes,
    )
    vars(model)["trace"] = normal.trace  # the cached property: nothing is traced twice
    return model


def parse_inlined(raw: bytes) -> onnx.ModelProto:
    """A file's model, checked, without functions, branches and loops."""
    file_model = parse_model(raw, run_checker=False)
    check_input_types(file_model)
    proto = inline_model(file_model)
    # onnx's checker takes long on large files, so it sees each model once: the file, or the inlined model.
    if proto is file_model:
        check_valid_onnx(proto)
        return proto
    try:
        check_valid_onnx(proto)
    except ModelError as error:
        raise ModelError(
            f"writing out the model's functions, branches and loops has made no valid model ({error})",
            hint="Please report this with the model, or export it without them.",
        ) from error
    return proto


def _model_metadata(texts: Mapping[str, str], normal: Normalised, frozen_names: Sequence[str]) -> dict[str, str]:
    """The metadata of an imported model: facts of the file, under the names that its tensors have now."""
    author_names = metadata.original_names(texts)
    # A file that was imported before lists the author's names, which win over those that it has now.
    names = {new: author_names.get(old, old) for old, new in normal.names.items() if new in normal.parameters}
    names |= {new: author for new, author in author_names.items() if new in normal.parameters and new not in names}
    values = {p.name for p in normal.graph.inputs} | {o for n in normal.graph.nodes for o in n.outputs}
    ranges = {normal.names.get(name, name): r for name, r in metadata.activation_ranges(texts).items()}
    facts = {
        metadata.PARAMETERS_KEY: list(normal.parameters),
        metadata.FROZEN_KEY: frozen_names,
        metadata.TIED_KEY: {normal.names.get(k, k): v for k, v in metadata.tied_names(texts).items()},
        INSTANCE_NORMS_KEY: [normal.names.get(n, n) for n in instance_means(texts)],
        metadata.UNUSED_KEY: metadata.unused_parameters(texts),
        metadata.NAMES_KEY: names,
        metadata.TRAINING_NOTES_KEY: metadata.training_notes(texts),
        ACTIVATION_RANGES_KEY: {name: r for name, r in ranges.items() if name in values},
    }
    graph_keys = (INPUTS_KEY, OUTPUTS_KEY, LENGTH_METADATA, DROPOUT_AXES_KEY, DRAWS_KEY)
    return {
        **{key: text for key, text in normal.graph.metadata.items() if key in graph_keys},
        **{key: json.dumps(fact) for key, fact in facts.items() if fact},
        **{key: texts[key] for key in (LOSS_KEY, METRIC_KEY) if key in texts},
    }


def _parse_prefer(text: str) -> Prefer:
    if text == "coarse":
        return "coarse"
    if text == "fine":
        return "fine"
    raise ModelError("which channels to prefer", expected="coarse or fine", got=value_text(text))
