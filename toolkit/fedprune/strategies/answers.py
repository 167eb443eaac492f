"""Checks of the type and shape of what a user's methods return; shipped ones are tested instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import FedpruneError, shape_text, value_text
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.allocation import Allocator, Fleet
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Ranking, RoundClosing, Scene, Submodel

# Checks an answer, given the arguments of the call.
Check = Callable[[Any, Sequence[Any]], None]

_BOOL_TYPES = (bool, np.bool_)

# Kinds of numbers that a collection of tensors may hold.
_NUMBER_KINDS = "fiub"


@dataclass(eq=False)
class UnfitError(Exception):
    """An answer of another type or shape: in a part of it, such as `.ranks`, or in all of it (empty)."""

    part: str
    expected: str
    got: str


def _check_ranking(answer: Any, arguments: Sequence[Any]) -> None:
    scene: Scene = arguments[0]
    sizes = scene.architecture.sizes
    _check_type(Ranking, answer)
    if not isinstance(answer.ranks, (tuple, list)) or len(answer.ranks) != len(sizes):
        raise UnfitError(".ranks", f"a tuple with an array for each of {len(sizes)} groups", _type_text(answer.ranks))
    for group, rank in zip(scene.architecture.groups, answer.ranks, strict=True):
        channels = np.asarray(rank)
        if channels.dtype.kind not in "iu" or not np.array_equal(np.sort(channels, axis=None), np.arange(group.size)):
            expected = f"every channel from 0 to {group.size - 1} once, as whole numbers"
            raise UnfitError(f".ranks of group {group.name}", expected, _type_text(rank))
    # An order may leave tensors out: their elements are never masked.
    if answer.order is not None:
        shapes = {t.name: t.shape for t in scene.architecture.tensors}
        _check_tensors(answer.order, shapes, ".order", missing=True, exact=False)


def _check_memories(answer: Any, part: str) -> None:
    _check_type(Mapping, answer, part, "a dict of named collections of tensors")
    for name, collection in answer.items():
        path = f"{part}[{value_text(name)}]"
        if not isinstance(name, str) or not name:
            raise UnfitError(f"{part}: a collection's name", "a text", value_text(name))
        _check_type(Mapping, collection, path, "a dict of arrays by name")
        for key, value in collection.items():
            # Strings and objects would need pickle to be stored.
            is_numeric = isinstance(value, np.ndarray) and value.dtype.kind in _NUMBER_KINDS
            if not isinstance(key, str) or not is_numeric:
                raise UnfitError(f"{path}[{value_text(key)}]", "an array of numbers, by a text", _type_text(value))


def _check_submodel(answer: Any, architecture: Architecture, *, missing: bool) -> None:
    _check_type(Submodel, answer)
    _check_type(Selection, answer.selection, ".selection")
    if answer.selection.architecture.digest != architecture.digest:
        raise UnfitError(".selection", "one of the job's model", "one of another model")
    shapes = answer.selection.shapes()
    _check_tensors(answer.tensors, shapes, ".tensors", missing=missing)
    _check_tensors(answer.drift, {t.name: shapes[t.name] for t in architecture.trainable}, ".drift", missing=True)
    _check_type(Mapping, answer.mask, ".mask", "arrays of bool by tensor")
    for name, active in answer.mask.items():
        if not isinstance(active, np.ndarray) or active.dtype != np.bool_ or active.shape != shapes.get(name):
            expected = f"an array of bool {shape_text(*shapes[name])}" if name in shapes else "no such tensor"
            raise UnfitError(f".mask of {value_text(name)}", expected, _type_text(active))


def _check_closing(answer: Any, arguments: Sequence[Any]) -> None:
    scene: Scene = arguments[1]
    _check_type(RoundClosing, answer)
    _check_model(answer.model, scene.architecture, ".model")
    _check_memories(answer.memories, ".memories")
    _check_type(Mapping, answer.rejected, ".rejected", "a dict of reasons by device")


def _check_start(answer: Any, arguments: Sequence[Any]) -> None:
    if answer is None:
        return
    if not isinstance(answer, tuple) or len(answer) != 2:
        raise UnfitError("", "a model and memories, or None", _type_text(answer))
    _check_model(answer[0], arguments[0].architecture, "[0]")
    _check_memories(answer[1], "[1]")


def _check_model(answer: Any, architecture: Architecture, part: str) -> None:
    _check_tensors(answer, {t.name: t.shape for t in architecture.tensors}, part, missing=False)


def _check_admission(answer: Any, arguments: Sequence[Any]) -> None:
    fleet: Fleet = arguments[0]
    device = fleet.state.devices[arguments[1]]
    # An allocator that refuses a device owes it neither density nor widths.
    if device.excluded:
        return
    if not isinstance(device.density, (int, float)) or not 0 < device.density <= 1:
        raise UnfitError(f": density of {arguments[1]}", "a number above 0 and at most 1", value_text(device.density))
    try:
        fleet.architecture.check_widths(device.widths)
    except FedpruneError as error:
        raise UnfitError(f": widths of {arguments[1]}", "channels per group of the model", str(error)) from error


# The methods that a user may write, each with the check of its answer.
CHECKS: dict[type, dict[str, Check]] = {
    Strategy: {
        "begin": lambda answer, arguments: _check_model(answer, arguments[0], ""),
        "start_core": _check_start,
        "rank": _check_ranking,
        "learn": lambda answer, arguments: _check_memories(answer, ""),
        "extract": lambda answer, arguments: _check_submodel(answer, arguments[0].scene.architecture, missing=False),
        "reconstruct": lambda answer, arguments: _check_submodel(
            answer, arguments[0].cut.scene.architecture, missing=True
        ),
        "recipe": lambda answer, arguments: _check_type(Recipe, answer),
        "close": _check_closing,
    },
    Aggregator: {
        "fold": lambda answer, arguments: _check_type(Fold, answer),
        "add": lambda answer, arguments: None,
        "close": _check_closing,
    },
    Allocator: {
        "admit": _check_admission,
        **dict.fromkeys(
            ("open", "review", "done"), lambda answer, arguments: _check_type(_BOOL_TYPES, answer, "", "true or false")
        ),
        "learn": lambda answer, arguments: None,
    },
}


def _check_type(kind: type | tuple[type, ...], answer: Any, part: str = "", expected: str = "") -> None:
    if not isinstance(answer, kind):
        name = "" if isinstance(kind, tuple) else kind.__name__
        raise UnfitError(part, expected or f"a {name}", _type_text(answer))


def _check_tensors(
    answer: Any, shapes: Mapping[str, tuple[int, ...]], part: str, *, missing: bool, exact: bool = True
) -> None:
    """Check that tensors have these shapes and no others and, if `exact`, are finite float32 numbers."""
    _check_type(Mapping, answer, part, "a dict of arrays by tensor")
    for name, value in answer.items():
        if name not in shapes:
            raise UnfitError(f"{part}[{value_text(name)}]", "a tensor of the model", "no such tensor")
        fits = isinstance(value, np.ndarray) and value.shape == shapes[name]
        if not fits or (value.dtype != np.float32 if exact else value.dtype.kind not in _NUMBER_KINDS):
            expected_type = "float32" if exact else "numbers"
            raise UnfitError(
                f"{part}[{name!r}]", f"an array of {expected_type} {shape_text(*shapes[name])}", _type_text(value)
            )
        # A single NaN would spread to every device in the next round.
        if exact and not np.isfinite(value).all():
            raise UnfitError(f"{part}[{name!r}]", "finite numbers", "some that aren't")
    for name in shapes:
        if not missing and name not in answer:
            raise UnfitError(f"{part}[{name!r}]", f"an array {shape_text(*shapes[name])}", "nothing")


def _type_text(value: object) -> str:
    """A short description of a value."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {shape_text(*value.shape)}"
    if isinstance(value, (list, tuple, Mapping)) or value is None or isinstance(value, (bool, int, float, str)):
        return value_text(value)
    return f"a {type(value).__name__}"
