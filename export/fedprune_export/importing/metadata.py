"""Reads and writes the facts of a model for which ONNX has no field, as texts in the file's metadata."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import numpy as np
import onnx
from msgspec import Struct

from fedprune.core.errors import ModelError, value_text
from fedprune.core.text import first_few
from fedprune.model.architecture import Architecture
from fedprune.model.nested_widths import axes_json
from fedprune.strategies.importance.scoring import Ranks
from fedprune_export.ir.graph import decode_metadata
from fedprune_export.pruning.model import ACTIVATION_RANGES_KEY, RANKS_KEY

PARAMETERS_KEY = "fedprune.parameters"  # names of the trainable tensors
FROZEN_KEY = "fedprune.frozen"  # names of the trainable tensors that the author froze
BASE_KEY = "fedprune.base"  # the precision in which frozen weights are stored
UNUSED_KEY = "fedprune.unused"  # names of the author's parameters that the outputs don't depend on
NAMES_KEY = "fedprune.names"  # by a tensor's name here, the author's name, which may be reserved here (`lr`)
TRAINING_NOTES_KEY = "fedprune.training_notes"  # notes on effects of a torch module's training mode that boards lack
TIED_KEY = "fedprune.tied"  # further names of tensors that have several
REPEATED_KEY = "fedprune.repeated"  # tensors that each iteration of a loop reads, a line each; gone after the import
CONSTANTS_KEY = "fedprune.constants"  # values of a file's Constant nodes, a line each; gone after the import
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
    listed = decode_metadata(texts, key, tuple[str, ...], "a list of tensor names")
    missing = [name for name in listed or () if name not in tensor_names]
    if missing:
        raise ModelError(f"the list in metadata {key} names a tensor that isn't there", got=value_text(missing[0]))
    return listed


def decode_file(key: str, text: str) -> bytes:
    """The ONNX file in the text of a key. Raises `ModelError` if it is something else than base64."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ModelError(f"metadata {key}", expected="an ONNX file in base64", got="something else") from error


# These raise `ModelError` if the text is something else, or holds what can't be printed.


def unused_parameters(texts: Mapping[str, str]) -> tuple[str, ...]:
    """Parameters that the forward pass doesn't use."""
    return decode_metadata(texts, UNUSED_KEY, tuple[str, ...], "a list of names") or ()


def original_names(texts: Mapping[str, str]) -> dict[str, str]:
    """The author's names of tensors that were renamed, by their present names."""
    return decode_metadata(texts, NAMES_KEY, dict[str, str], "names by name") or {}


def tied_names(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Further names of tied tensors, by the name that the file has."""
    return decode_metadata(texts, TIED_KEY, dict[str, list[str]], "lists of names by name") or {}


def training_notes(texts: Mapping[str, str]) -> tuple[str, ...]:
    """Notes on effects of a torch module's training mode that boards lack."""
    return decode_metadata(texts, TRAINING_NOTES_KEY, tuple[str, ...], "a list of notes") or ()


def class_axis(texts: Mapping[str, str]) -> int | None:
    """The axis of the classes, if it is chosen or settled."""
    return decode_metadata(texts, CLASS_AXIS_KEY, int, "a whole number")


def activation_ranges(texts: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """The least and greatest number of activations in the quantised file that a model was read from, by their names."""
    expected = "two numbers by name, the least first"
    ranges = decode_metadata(texts, ACTIVATION_RANGES_KEY, dict[str, tuple[float, float]], expected) or {}
    if any(low > high for low, high in ranges.values()):
        raise ModelError(f"metadata {ACTIVATION_RANGES_KEY}", expected=expected)
    return ranges


def author_notes(texts: Mapping[str, str]) -> list[str]:
    """Notes for a model's author: on tied tensors, unused parameters, and training mode."""
    notes: list[str] = []
    if tied := [f"{k} is {' and '.join(v[:3])} too" for k, v in sorted(tied_names(texts).items())]:
        notes.append(f"Tensors that have several names are one tensor each: {first_few(tied, max_names=3)}.")
    if unused := unused_parameters(texts):
        notes.append(f"The forward pass doesn't use {shown_names(unused)}: left as they are, and in no bundle.")
    return [*notes, *training_notes(texts)]


def shown_names(listed: Sequence[str]) -> str:
    """The first of these names, for an error: whole, so that they can be given, unless no exporter writes such."""
    return first_few(
        [n if n.isprintable() and len(n) <= _LONGEST_SHOWN else value_text(n) for n in listed], max_names=8
    )


class _RecordedRanks(Struct):
    groups: str = ""
    ranks: list[list[int]] = []


def ranks_text(architecture: Architecture, ranks: Ranks) -> str:
    return json.dumps({"groups": _groups_digest(architecture), "ranks": [r.tolist() for r in ranks]})


def recorded_ranks(texts: Mapping[str, str], architecture: Architecture) -> Ranks | None:
    """The recorded ranks; None without them, or if they belong to other groups of channels.

    Raises `ModelError` if they are something else.
    """
    expected = "each group's channels"
    recorded = decode_metadata(texts, RANKS_KEY, _RecordedRanks, expected)
    # The digest covers only the groups, so ranks stay valid when weights change.
    if recorded is None or recorded.groups != _groups_digest(architecture):
        return None
    if [sorted(row) for row in recorded.ranks] != [list(range(size)) for size in architecture.sizes]:
        raise ModelError(f"metadata {RANKS_KEY}", expected=expected, got=value_text(texts[RANKS_KEY]))
    return tuple(np.array(row, np.int64) for row in recorded.ranks)


def _groups_digest(architecture: Architecture) -> str:
    return hashlib.sha256(axes_json(architecture).encode()).hexdigest()
