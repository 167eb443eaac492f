"""Users' strategies, which a job names as `package.module:function`.

An error in a user's method becomes one line that names the strategy, the method, the file and the line. So does an
answer of a wrong type or shape (`fedprune.strategies.answers`).
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import replace
from pathlib import Path
from traceback import walk_tb
from types import ModuleType
from typing import Any, TypeVar

from fedprune.core.errors import (
    ConfigError,
    FedpruneError,
    MissingExtraError,
    StorageError,
    StrategyError,
    did_you_mean,
    error_reason,
)
from fedprune.core.imports import import_user_module
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.aggregators import Aggregator
from fedprune.strategies.allocation import Allocator
from fedprune.strategies.answers import CHECKS, Check, UnfitError
from fedprune.strategies.strategy import Strategy

T = TypeVar("T")

_INSTALL_FOLDERS = {"site-packages", "dist-packages"}

_PACKAGE = "fedprune"

# In these methods our own errors are about the update at hand, and are raised unchanged.
_UPDATE_METHODS = ("reconstruct", "add")

_PAGE_HINT = "docs/write-a-strategy.md describes what each method takes and returns."


def user_strategy(job: Job) -> Strategy:
    """Compose a user's own strategy, whose answers are checked at every call. Raises `ConfigError` if
    there is no such function, it fails, or it returns no strategy; or an option is wrong."""
    strategy, user_code = _compose_unchecked(job)
    return _guard_strategy(strategy, job.strategy, user_code)


def user_code_digest(job: Job) -> str:
    """Digest of the files that define a user's own strategy, with the modules next to them that they use; empty for
    presets. Raises `ConfigError` as `user_strategy`."""
    if ":" not in job.strategy:
        return ""
    strategy, _ = _compose_unchecked(job)
    parts_of_strategy = (strategy, strategy.aggregator, strategy.allocator)
    names = {type(instance).__module__ for instance in parts_of_strategy if instance is not None}
    names.add(job.strategy.partition(":")[0])
    digest = hashlib.sha256()
    for file in sorted(_user_files(names)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _user_files(names: Collection[str]) -> set[Path]:
    """Files of a user's modules, and of those in the same package or folder that they import, and so on."""
    pending = [n for n in names if not _is_shipped(n) and n in sys.modules]
    packages = {n.partition(".")[0] for n in pending}
    folders = {Path(file).resolve().parent for n in pending if (file := sys.modules[n].__file__) is not None}
    visited, files = set(pending), set[Path]()
    while pending:
        module = sys.modules.get(pending.pop())
        file = getattr(module, "__file__", None)
        # Built-in and namespace modules have no file whose digest could change.
        if module is None or file is None:
            continue
        path = Path(file).resolve()
        # A virtual environment may be in the user's folder; what is installed has versions.
        is_user_file = not folders.isdisjoint(path.parents) and _INSTALL_FOLDERS.isdisjoint(path.parts)
        if not is_user_file and module.__name__.partition(".")[0] not in packages:
            continue
        files.add(path)
        for value in list(vars(module).values()):
            name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
            if isinstance(name, str) and name not in visited and not _is_shipped(name):
                visited.add(name)
                pending.append(name)
    return files


def _is_shipped(module: str) -> bool:
    return module.partition(".")[0] == _PACKAGE


def _compose_unchecked(job: Job) -> tuple[Strategy, _UserCode]:
    module_name, _, name = job.strategy.partition(":")
    try:
        module = import_user_module(module_name)
        compose = getattr(module, name)
    except FedpruneError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{job.strategy} {_failure(error)}", path=("job", "strategy"), hint=_not_found_hint(error, module_name)
        ) from error
    user_code = _UserCode(module_name, getattr(module, "__file__", None))
    try:
        strategy = compose(job)
    except FedpruneError:
        raise
    except Exception as error:
        raise StrategyError(
            f"{job.strategy} {_failure(error, user_code.error_location(error))}",
            path=("job", "strategy"),
            hint=_PAGE_HINT,
        ) from error
    if not isinstance(strategy, Strategy):
        raise StrategyError(("job", "strategy"), expected="a Strategy", got=type(strategy).__name__)
    return strategy, user_code


def _guard_strategy(strategy: Strategy, name: str, origin: _UserCode) -> Strategy:
    kinds = {"aggregator": Aggregator, "allocator": Allocator, "schedule": Schedule}
    checked_parts: dict[str, Any] = {}
    for part, kind in kinds.items():
        part_object = getattr(strategy, part)
        if part_object is None and part != "aggregator":
            continue
        if not isinstance(part_object, kind):
            expected, got = f"of class {kind.__name__}", type(part_object).__name__
            raise StrategyError(f"strategy {name}: {part}", expected=expected, got=got, hint=_PAGE_HINT)
        checked_parts[part] = _guard_instance(part_object, f"strategy {name}: {part}", CHECKS.get(kind, {}), origin)
    return replace(_guard_instance(strategy, f"strategy {name}:", CHECKS[Strategy], origin), **checked_parts)


class _UserCode:
    """Where a user's code is: its packages and the folders of its files."""

    def __init__(self, module: str, file: str | None) -> None:
        self.packages = {module.partition(".")[0]} - {_PACKAGE}
        self.folders = set() if file is None else {Path(file).parent}

    def with_class(self, kind: type) -> _UserCode:
        """This code and the module of a class."""
        extended = _UserCode(kind.__module__, None)
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


def _guard_instance(instance: T, what: str, checks: Mapping[str, Check], origin: _UserCode) -> T:
    """A copy of an instance, of a subclass that checks the answers of the user's methods."""
    kind = type(instance)
    definers = {method: next(ancestor for ancestor in kind.__mro__ if method in vars(ancestor)) for method in checks}
    user_methods = {method for method, definer in definers.items() if not _is_shipped(definer.__module__)}
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


def _guarding_method(kind: type, method: str, what: str, check: Check, origin: _UserCode) -> Callable[..., Any]:
    """A method that calls that of the class, names the place of an error, and checks the answer."""
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
        except (StorageError, MissingExtraError, StrategyError, MemoryError):
            raise
        except Exception as error:
            # What the reader raised is no fault of the user's code, even if it passed through it.
            if error in reader_errors or (isinstance(error, FedpruneError) and method in _UPDATE_METHODS):
                raise
            raise StrategyError(f"{what} {_failure(error, origin.error_location(error) or definition_line)}") from error
        try:
            check(answer, arguments)
        except UnfitError as unfit:
            expected, got = unfit.expected, unfit.got
            raise StrategyError(
                f"{what} at {definition_line}: answer{unfit.part}", expected=expected, got=got, hint=_PAGE_HINT
            ) from unfit
        return answer

    return call


def _note_errors(read: Callable[[], Iterator[Any]], reader_errors: list[BaseException]) -> Callable[[], Iterator[Any]]:
    """A reader of updates that notes its own errors, which are not the caller's."""

    def read_and_note() -> Iterator[Any]:
        try:
            yield from read()
        except Exception as error:
            reader_errors.append(error)
            raise

    return read_and_note


def _failure(error: Exception, location: str = "") -> str:
    kind = "" if isinstance(error, FedpruneError) else f"{type(error).__name__}: "
    return f"failed{f' at {location}' if location else ''} ({kind}{error_reason(error)})"


def _not_found_hint(error: Exception, module: str) -> str:
    """The hint for a strategy that wasn't found."""
    if isinstance(error, ModuleNotFoundError):
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return "Start the command in the folder of the file, or install the package that has it."
        return f"Install {error.name}."
    loaded = sys.modules.get(module)
    if isinstance(error, AttributeError) and loaded is not None:
        functions = [n for n, v in vars(loaded).items() if inspect.isfunction(v) and v.__module__ == module]
        name = str(getattr(error, "name", "") or "")
        return f"Its functions are {', '.join(functions) or 'none'}{did_you_mean(name, functions)}."
    return ""


def _file_and_line(file: str, line: int) -> str:
    path = Path(file)
    with suppress(ValueError):  # it is elsewhere
        path = path.relative_to(Path.cwd())
    return f"{path}:{line}"
