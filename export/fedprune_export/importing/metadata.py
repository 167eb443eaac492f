"""Facts of a model that ONNX has no field for, as texts in the file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet

import onnx

from fedprune.core.errors import ModelError, shown
from fedprune.core.text import some
from fedprune_export.ir.graph import check_name

PARAMETERS_KEY = "fedprune.parameters"  # lists the trainable tensors

FROZEN_KEY = "fedprune.frozen"  # lists those of them that the author froze

BASE_KEY = "fedprune.base"  # the precision in which frozen weights are stored

UNUSED_KEY = "fedprune.unused"
"""Names of the author's parameters that the forward pass doesn't use, and which the model therefore lacks."""

TIED_KEY = "fedprune.tied"  # further names of tensors that have several

PREFER_KEY = "fedprune.prefer"  # which channels to cut where only one kind can be: coarse or fine


def read(model: onnx.ModelProto) -> dict[str, str]:
    """All texts by key."""
    return {p.key: p.value for p in model.metadata_props}


def write(model: onnx.ModelProto, texts: Mapping[str, str]) -> None:
    """Set these texts and leave others."""
    merged = {**read(model), **texts}
    del model.metadata_props[:]
    for key, value in sorted(merged.items()):
        model.metadata_props.add(key=key, value=value)


def names(texts: Mapping[str, str], key: str, held: AbstractSet[str]) -> tuple[str, ...] | None:
    """A list of tensor names, or None. Raises `ModelError` if it is no list of names, or a tensor isn't held."""
    if key not in texts:
        return None
    found = _parsed(texts[key])
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
        raise ModelError(f"metadata {key}", expected="a list of tensor names", got=shown(texts[key]))
    return checked(found, held, f"metadata {key}")


def unused(texts: Mapping[str, str]) -> tuple[str, ...]:
    """Parameters that the forward pass doesn't use.

    Raises `ModelError` if it is no list of names, or a name can't be printed.
    """
    found = _parsed(texts[UNUSED_KEY]) if UNUSED_KEY in texts else []
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
        raise ModelError(f"metadata {UNUSED_KEY}", expected="a list of names", got=shown(texts[UNUSED_KEY]))
    for name in found:
        check_name(name)
    return tuple(found)


def note_of_unused(names: Sequence[str]) -> list[str]:
    """A note on parameters that the forward pass doesn't use."""
    said = f"The forward pass doesn't use {shown_names(names)}: left as they are, and in no bundle."
    return [said] if names else []


def checked(listed: Sequence[str], held: AbstractSet[str], where: str) -> tuple[str, ...]:
    """The list, if a model holds all these tensors. Raises `ModelError` if it doesn't."""
    missing = [n for n in listed if n not in held]
    if missing:
        raise ModelError(f"{where} names a tensor that isn't there", got=shown(missing[0]))
    return tuple(listed)


def shown_names(listed: Sequence[str]) -> str:
    """The first of these names, for an error."""
    return some([n[:60] if n.isprintable() else shown(n) for n in listed], most=8)


def tied(texts: Mapping[str, str]) -> dict[str, list[str]]:
    """Further names of tensors that have several, by the name that is theirs here.

    Raises `ModelError` if it is something else, or a name can't be printed.
    """
    found = _parsed(texts[TIED_KEY]) if TIED_KEY in texts else {}
    if not isinstance(found, dict) or not all(
        isinstance(v, list) and all(isinstance(n, str) for n in v) for v in found.values()
    ):
        raise ModelError(f"metadata {TIED_KEY}", expected="lists of names by name", got=shown(texts[TIED_KEY]))
    for name in (n for first, further in found.items() for n in (first, *further)):
        check_name(name)
    return found


def note_of_tied(names: Mapping[str, Sequence[str]]) -> list[str]:
    """A note on tensors that had several names."""
    said = [f"{k} is {' and '.join(v[:3])} too" for k, v in sorted(names.items())]
    return [f"Tensors that have several names are one tensor each: {some(said, most=3)}."] if said else []


def _parsed(text: str) -> object:
    try:
        out: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return out
