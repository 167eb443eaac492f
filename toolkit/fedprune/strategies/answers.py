"""Checks of the type and shape of what a user's methods return; shipped ones are tested instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import FedpruneError, shape_text, shown
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.allocation import Allocator, Fleet
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Closing, Ranking, Scene, Submodel

# Checks an answer, given the arguments of the call.
Check = Callable[[Any, Sequence[Any]], None]

_TRUTH = (bool, np.bool_)

# Kinds of numbers that a collection of tensors may hold.
_STORED = "fiub"


class UnfitError(Exception):
    """An answer of another type or shape.

    Attributes:
        part: Which part of the answer, such as `.ranks`; empty for all of it.
        expected: What it should be.
        got: What it is.
    """

    def __init__(self, part: str, expected: str, got: str) -> None:
        super().__init__(part, expected, got)
        self.part = part
        self.expected = expected
        self.got = got


def _ranked(answer: Any, arguments: Sequence[Any]) -> None:
    scene: Scene = arguments[0]
    sizes = scene.architecture.sizes
    _of(Ranking, answer)
    if not isinstance(answer.ranks, (tuple, list)) or len(answer.ranks) != len(sizes):
        raise UnfitError(".ranks", f"a tuple with an array for each of {len(sizes)} groups", _kind(answer.ranks))
    for group, rank in zip(scene.architecture.groups, answer.ranks, strict=True):
        channels = np.asarray(rank)
        if channels.dtype.kind not in "iu" or not np.array_equal(np.sort(channels, axis=None), np.arange(group.size)):
            expected = f"every channel from 0 to {group.size - 1} once, as whole numbers"
            raise UnfitError(f".ranks of group {group.name}", expected, _kind(rank))
    # An order may leave tensors out: their elements are never masked.
    if answer.order is not None:
        shapes = {t.name: t.shape for t in scene.architecture.tensors}
        _tensors(answer.order, shapes, ".order", missing=True, exact=False)


def _memories(answer: Any, part: str) -> None:
    _of(Mapping, answer, part, "a dict of named collections of tensors")
    for name, collection in answer.items():
        collection_path = f"{part}[{shown(name)}]"
        if not isinstance(name, str) or not name:
            raise UnfitError(f"{part}: a collection's name", "a text", shown(name))
        _of(Mapping, collection, collection_path, "a dict of arrays by name")
        for key, value in collection.items():
            # Strings and objects would need pickle to be stored.
            is_numeric = isinstance(value, np.ndarray) and value.dtype.kind in _STORED
            if not isinstance(key, str) or not is_numeric:
                raise UnfitError(f"{collection_path}[{shown(key)}]", "an array of numbers, by a text", _kind(value))


def _submodel(answer: Any, architecture: Architecture, *, missing: bool) -> None:
    _of(Submodel, answer)
    _of(Selection, answer.selection, ".selection")
    if answer.selection.architecture.digest != architecture.digest:
        raise UnfitError(".selection", "one of the job's model", "one of another model")
    shapes = answer.selection.shapes()
    _tensors(answer.tensors, shapes, ".tensors", missing=missing)
    _of(Mapping, answer.mask, ".mask", "arrays of bool by tensor")
    for name, active in answer.mask.items():
        if not isinstance(active, np.ndarray) or active.dtype != np.bool_ or active.shape != shapes.get(name):
            expected = f"an array of bool {shape_text(*shapes[name])}" if name in shapes else "no such tensor"
            raise UnfitError(f".mask of {shown(name)}", expected, _kind(active))


def _closed(answer: Any, arguments: Sequence[Any]) -> None:
    scene: Scene = arguments[1]
    _of(Closing, answer)
    _model(answer.model, scene.architecture, ".model")
    _memories(answer.memories, ".memories")
    _of(Mapping, answer.rejected, ".rejected", "a dict of reasons by device")


def _model(answer: Any, architecture: Architecture, part: str) -> None:
    _tensors(answer, {t.name: t.shape for t in architecture.tensors}, part, missing=False)
    # A single NaN would spread to every device in the next round.
    for name, value in answer.items():
        if not np.isfinite(value).all():
            raise UnfitError(f"{part}[{name!r}]", "finite numbers", "some that aren't")


def _admitted(answer: Any, arguments: Sequence[Any]) -> None:
    fleet: Fleet = arguments[0]
    device = fleet.state.devices[arguments[1]]
    # An allocator that refuses a device owes it neither density nor widths.
    if device.excluded:
        return
    if not isinstance(device.density, (int, float)) or not 0 < device.density <= 1:
        raise UnfitError(f": density of {arguments[1]}", "a number above 0 and at most 1", shown(device.density))
    try:
        fleet.architecture.check_widths(device.widths)
    except FedpruneError as error:
        raise UnfitError(f": widths of {arguments[1]}", "channels per group of the model", str(error)) from error


# The methods that a user may write, each with the check of its answer.
CHECKS: dict[type, dict[str, Check]] = {
    Strategy: {
        "begin": lambda answer, arguments: _model(answer, arguments[0], ""),
        "rank": _ranked,
        "learn": lambda answer, arguments: _memories(answer, ""),
        "extract": lambda answer, arguments: _submodel(answer, arguments[0].scene.architecture, missing=False),
        "reconstruct": lambda answer, arguments: _submodel(answer, arguments[0].cut.scene.architecture, missing=True),
        "recipe": lambda answer, arguments: _of(Recipe, answer),
        "close": _closed,
    },
    Aggregator: {
        "fold": lambda answer, arguments: _of(Fold, answer),
        "add": lambda answer, arguments: None,
        "close": _closed,
    },
    Allocator: {
        "admit": _admitted,
        **dict.fromkeys(("open", "review", "done"), lambda answer, arguments: _of(_TRUTH, answer, "", "true or false")),
        "learn": lambda answer, arguments: None,
    },
}


def _of(kind: type | tuple[type, ...], answer: Any, part: str = "", expected: str = "") -> None:
    if not isinstance(answer, kind):
        name = "" if isinstance(kind, tuple) else kind.__name__
        raise UnfitError(part, expected or f"a {name}", _kind(answer))


def _tensors(
    answer: Any, shapes: Mapping[str, tuple[int, ...]], part: str, *, missing: bool, exact: bool = True
) -> None:
    """Check that tensors have these shapes and no others, and are float32 if `exact`."""
    _of(Mapping, answer, part, "a dict of arrays by tensor")
    for name, value in answer.items():
        if name not in shapes:
            raise UnfitError(f"{part}[{shown(name)}]", "a tensor of the model", "no such tensor")
        fits = isinstance(value, np.ndarray) and value.shape == shapes[name]
        if not fits or (value.dtype != np.float32 if exact else value.dtype.kind not in _STORED):
            expected_type = "float32" if exact else "numbers"
            raise UnfitError(
                f"{part}[{name!r}]", f"an array of {expected_type} {shape_text(*shapes[name])}", _kind(value)
            )
    for name in shapes:
        if not missing and name not in answer:
            raise UnfitError(f"{part}[{name!r}]", f"an array {shape_text(*shapes[name])}", "nothing")


def _kind(value: object) -> str:
    """A short description of a value."""
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {shape_text(*value.shape)}"
    if isinstance(value, (list, tuple, Mapping)) or value is None or isinstance(value, (bool, int, float, str)):
        return shown(value)
    return f"a {type(value).__name__}"
