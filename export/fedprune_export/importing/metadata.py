"""Reads and writes the facts of a model for which ONNX has no field, as texts in the file's metadata."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import onnx

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.model.architecture import Architecture
from fedprune.model.nested_widths import axes_json
from fedprune.strategies.importance.scoring import Ranks
from fedprune_export.ir.graph import check_name, decode_metadata, is_texts
from fedprune_export.pruning.model import ACTIVATION_RANGES_KEY, RANKS_KEY

PARAMETERS_KEY = "fedprune.parameters"  # names of the trainable tensors
FROZEN_KEY = "fedprune.frozen"  # names of the trainable tensors that the author froze
BASE_KEY = "fedprune.base"  # the precision in which frozen weights are stored
UNUSED_KEY = (
    "fedprune.unused"  # names of the author's parameters that the outputs don't depend on: the model lacks them
)
NAMES_KEY = "fedprune.names"  # by a tensor's name here, the author's name, which may be reserved here (`lr`)
TRAINING_NOTES_KEY = "fedprune.training_notes"  # notes on effects of a torch module's training mode that boards lack
TIED_KEY = "fedprune.tied"  # further names of tensors that have several
REPEATED_KEY = "fedprune.repeated"  # tensors that each iteration of a loop reads, a line each; gone after the import
LABELS_KEY = "fedprune.labels"  # the kind of labels that the loss compares with, where the training end depends on it
CLASS_AXIS_KEY = "fedprune.class_axis"  # the axis of the outputs that the classes are on, where it is chosen or settled
FILE_END_KEY = "fedprune.end"  # the head of a file that chooses among all samples of a batch: boards don't run it
PREFER_KEY = "fedprune.prefer"  # which channels to cut where only one kind can be: coarse or fine

_LONGEST_SHOWN = 400  # tf2onnx joins the names of fused operators


def read_properties(model: onnx.ModelProto) -> dict[str, str]:
    """All texts by key."""
    return {p.key: p.value for p in model.metadata_props}


def write_properties(model: onnx.ModelProto, texts: Mapping[str, str]) -> None:
    """Set these texts and leave others."""
    merged = {**read_properties(model), **texts}
    del model.metadata_props[:]
    for key, value in sorted(merged.items()):
        model.metadata_props.add(key=key, value=value)


def read_names(texts: Mapping[str, str], key: str, tensor_names: AbstractSet[str]) -> tuple[str, ...] | None:
    """The tensor names under a key; None without it. Raises `ModelError` if it is no list, or a tensor is missing."""
    listed = decode_metadata(texts, key, None, "a list of tensor names", is_texts)
    return None if listed is None else check_tensor_names(listed, tensor_names, f"metadata {key}")


def unused_parameters(texts: Mapping[str, str]) -> tuple[str, ...]:
    """Parameters that the forward pass doesn't use.

    Raises `ModelError` if it is no list of names, or a name can't be printed.
    """
    return _check_printable(decode_metadata(texts, UNUSED_KEY, [], "a list of names", is_texts))


def original_names(texts: Mapping[str, str]) -> dict[str, str]:
    """The author's names of tensors that were renamed, by their present names.

    Raises `ModelError` if it is something else, or a name can't be printed.
    """
    # Names are printed by commands and reports, so control characters are refused.
    names: dict[str, str] = decode_metadata(
        texts, NAMES_KEY, {}, "names by name", lambda v: isinstance(v, dict) and is_texts([*v.values()])
    )
    _check_printable([*names, *names.values()])
    return names


def training_notes(texts: Mapping[str, str]) -> tuple[str, ...]:
    """Notes on effects of a torch module's training mode that boards lack.

    Raises `ModelError` if it is no list of texts, or one can't be printed.
    """
    return _check_printable(decode_metadata(texts, TRAINING_NOTES_KEY, [], "a list of notes", is_texts))


def activation_ranges(texts: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """The least and greatest number of activations in the quantised file that a model was read from, by their names.

    Raises `ModelError` if it is something else.
    """
    expected = "two numbers by name, the least first"
    ranges: dict[str, list[float]] = decode_metadata(texts, ACTIVATION_RANGES_KEY, {}, expected, _is_ranges)
    return {name: (float(low), float(high)) for name, (low, high) in ranges.items()}


def class_axis(texts: Mapping[str, str]) -> int | None:
    """The axis of the classes, if it is chosen or settled. Raises `ModelError` if it is no whole number."""
    axis: int | None = decode_metadata(texts, CLASS_AXIS_KEY, None, "a whole number", lambda v: type(v) is int)
    return axis


def author_notes(texts: Mapping[str, str]) -> list[str]:
    """Notes for a model's author: on tied tensors, unused parameters, and training mode."""
    notes: list[str] = []
    if tied := [f"{k} is {' and '.join(v[:3])} too" for k, v in sorted(tied_names(texts).items())]:
        notes.append(f"Tensors that have several names are one tensor each: {first_few(tied, max_names=3)}.")
    if unused := unused_parameters(texts):
        notes.append(f"The forward pass doesn't use {shown_names(unused)}: left as they are, and in no bundle.")
    return [*notes, *training_notes(texts)]


def check_tensor_names(listed: Sequence[str], tensor_names: AbstractSet[str], where: str) -> tuple[str, ...]:
    """Make sure that a model has all these tensors. Returns their names. Raises `ModelError` if one is missing."""
    missing = [n for n in listed if n not in tensor_names]
    if missing:
        raise ModelError(f"{where} names a tensor that isn't there", got=value_text(missing[0]))
    return tuple(listed)


def shown_names(listed: Sequence[str]) -> str:
    """The first of these names, for an error: whole, so that they can be given, unless no exporter writes such."""
    return first_few(
        [n if n.isprintable() and len(n) <= _LONGEST_SHOWN else value_text(n) for n in listed], max_names=8
    )


def tied_names(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Further names of tied tensors, by the name that the file has.

    Raises `ModelError` if it is something else, or a name can't be printed.
    """
    names: dict[str, list[str]] = decode_metadata(
        texts, TIED_KEY, {}, "lists of names by name", lambda v: isinstance(v, dict) and all(map(is_texts, v.values()))
    )
    _check_printable([n for first, further in names.items() for n in (first, *further)])
    return names


def ranks_text(architecture: Architecture, ranks: Ranks) -> str:
    return json.dumps({"groups": _groups_digest(architecture), "ranks": [r.tolist() for r in ranks]})


def recorded_ranks(texts: Mapping[str, str], architecture: Architecture) -> Ranks | None:
    """The recorded ranks; None without them, or if they belong to other groups of channels.

    Raises `ModelError` if they are something else.
    """
    recorded = decode_metadata(texts, RANKS_KEY, {}, "each group's channels", lambda v: isinstance(v, dict))
    # The digest covers only the groups, so ranks stay valid when weights change.
    if not recorded or recorded.get("groups") != _groups_digest(architecture):
        return None
    rows, sizes = recorded.get("ranks"), architecture.sizes
    if (
        not isinstance(rows, list)
        or len(rows) != len(sizes)
        or not all(isinstance(row, list) and all(type(c) is int for c in row) for row in rows)
        or any(sorted(row) != list(range(size)) for row, size in zip(rows, sizes, strict=True))
    ):
        raise ModelError(f"metadata {RANKS_KEY}", expected="each group's channels", got=value_text(texts[RANKS_KEY]))
    return tuple(np.array(row, np.int64) for row in rows)


def _groups_digest(architecture: Architecture) -> str:
    return hashlib.sha256(axes_json(architecture).encode()).hexdigest()


def _is_ranges(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(bounds, list)
        and len(bounds) == 2
        and all(isinstance(b, (int, float)) and math.isfinite(b) for b in bounds)
        and bounds[0] <= bounds[1]
        for bounds in value.values()
    )


def _check_printable(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        check_name(name)
    return tuple(names)
