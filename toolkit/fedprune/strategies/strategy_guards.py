"""Wraps a user's strategy, so that errors in its methods name the place, and wrong answers are refused.

Each checked class becomes a subclass with the same methods. These call the user's method, turn an exception into one
line with the strategy, method, file and line, and check the answer (`fedprune.strategies.answers`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from traceback import walk_tb
from typing import Any, TypeVar

from fedprune.core import errors
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.allocation import Allocator
from fedprune.strategies.answers import CHECKS, Check, UnfitError
from fedprune.strategies.shared_core import SharedCore
from fedprune.strategies.strategy import Strategy

T = TypeVar("T")

_PACKAGE = "fedprune"

# In these methods our own errors are about the update at hand, and are raised unchanged.
_UPDATE_METHODS = ("reconstruct", "add")

PAGE_HINT = "docs/write-a-strategy.md describes what each method takes and returns."


def is_shipped(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def guard_strategy(strategy: Strategy, name: str, origin: UserCode) -> Strategy:
    """A copy of a user's strategy, and of its aggregator, allocator, schedule and core, that checks every answer."""
    kinds = {"aggregator": Aggregator, "allocator": Allocator, "schedule": Schedule, "core": SharedCore}
    checked_parts: dict[str, Any] = {}
    for part, kind in kinds.items():
        part_object = getattr(strategy, part)
        if part_object is None and part != "aggregator":
            continue
        if not isinstance(part_object, kind):
            expected, got = f"of class {kind.__name__}", type(part_object).__name__
            raise errors.StrategyError(f"strategy {name}: {part}", expected=expected, got=got, hint=PAGE_HINT)
        checked_parts[part] = _guard_instance(part_object, f"strategy {name}: {part}", CHECKS.get(kind, {}), origin)
    return replace(_guard_instance(strategy, f"strategy {name}:", CHECKS[Strategy], origin), **checked_parts)


class UserCode:
    """Where a user's code is: its packages and the folders of its files."""

    def __init__(self, module: str, file: str | None) -> None:
        self.packages = {module.partition(".")[0]} - {_PACKAGE}
        self.folders = set() if file is None else {Path(file).parent}

    def with_class(self, kind: type) -> UserCode:
        """This code and the module of a class."""
        extended = UserCode(kind.__module__, None)
        extended.packages |= self.packages
        extended.folders |= self.folders
        return extended

    def error_location(self, error: BaseException) -> str:
        """File and line of this code that an error came from; empty if from elsewhere."""
        location = ""
        for frame, line in walk_tb(error.__traceback__):
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if package in self.packages or Path(frame.f_code.co_filename).parent in self.folders:
                location = _file_and_line(frame.f_code.co_filename, line)
        return location


def _guard_instance(instance: T, what: str, checks: Mapping[str, Check], origin: UserCode) -> T:
    """A copy of an instance, of a subclass that checks the answers of the user's methods."""
    kind = type(instance)
    definers = {method: next(ancestor for ancestor in kind.__mro__ if method in vars(ancestor)) for method in checks}
    user_methods = {method for method, definer in definers.items() if not is_shipped(definer.__module__)}
    if not user_methods:
        return instance
    origin = origin.with_class(kind)
    # Without slots of its own the subclass has the layout of its parent, which assigning `__class__` demands. It keeps
    # the user's name, which errors and `Strategy.name` show.
    class_body: dict[str, Any] = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    for method in user_methods:
        class_body[method] = _guarding_method(kind, method, f"{what} {kind.__name__}.{method}", checks[method], origin)
    guarded = copy(instance)
    checked: type = type(kind.__name__, (kind,), class_body)
    # A copy keeps what the user's `__init__` made; constructing the subclass would run it once more.
    object.__setattr__(guarded, "__class__", checked)
    return guarded


def _guarding_method(kind: type, method: str, what: str, check: Check, origin: UserCode) -> Callable[..., Any]:
    """A method that calls the user's, names the place of an error, and checks the answer. An aggregator's method gets a
    function that reads the round's updates. An error in reading is not the user's fault, even if it passes through the
    user's code, and is raised unchanged."""
    # A decorated method is shown where the user wrote it, not in the decorator.
    code = getattr(inspect.unwrap(getattr(kind, method)), "__code__", None)
    definition_line = kind.__module__ if code is None else _file_and_line(code.co_filename, code.co_firstlineno)

    def call(self: Any, *arguments: Any, **keywords: Any) -> Any:
        reader_errors: list[BaseException] = []
        passed_arguments = [
            _note_errors(argument, reader_errors) if callable(argument) else argument for argument in arguments
        ]
        try:
            answer = getattr(super(type(self), self), method)(*passed_arguments, **keywords)
        # The machine's faults, and errors that name the place already.
        except (errors.StorageError, errors.MissingExtraError, errors.StrategyError, MemoryError):
            raise
        except Exception as error:
            # What the reader raised is no fault of the user's code, even if it passed through it.
            if error in reader_errors or (isinstance(error, errors.FedpruneError) and method in _UPDATE_METHODS):
                raise
            location = origin.error_location(error) or definition_line
            raise errors.StrategyError(f"{what} {failure_text(error, location)}") from error
        try:
            check(answer, arguments)
        except UnfitError as unfit:
            expected, got = unfit.expected, unfit.got
            raise errors.StrategyError(
                f"{what} at {definition_line}: answer{unfit.part}", expected=expected, got=got, hint=PAGE_HINT
            ) from unfit
        return answer

    return call


def _note_errors(read: Callable[[], Iterator[Any]], reader_errors: list[BaseException]) -> Callable[[], Iterator[Any]]:
    """A reader of updates that notes its errors in `reader_errors`."""

    def read_and_note() -> Iterator[Any]:
        try:
            yield from read()
        except Exception as error:
            reader_errors.append(error)
            raise

    return read_and_note


def failure_text(error: Exception, location: str = "") -> str:
    kind = "" if isinstance(error, errors.FedpruneError) else f"{type(error).__name__}: "
    return f"failed{f' at {location}' if location else ''} ({kind}{errors.error_reason(error)})"


def _file_and_line(file: str, line: int) -> str:
    path = Path(file)
    with suppress(ValueError):  # it is elsewhere
        path = path.relative_to(Path.cwd())
    return f"{path}:{line}"
