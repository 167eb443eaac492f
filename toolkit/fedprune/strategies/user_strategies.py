"""Strategies of a user's own: found as `package.module:function`, and asked with care.

What fails in a role that isn't ours ends as one line that says which strategy, role and method it was, and at which
line of which file; so does an answer of another type or shape than the role's (`fedprune.strategies.answers`).
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import walk_tb
from typing import Any

from fedprune.core.errors import (
    ConfigError,
    FedpruneError,
    MissingExtraError,
    StorageError,
    StrategyError,
    meant,
    reason,
    shown,
)
from fedprune.core.user_modules import own_module
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.strategies.answers import ROLES, UnfitError
from fedprune.strategies.strategy import Strategy

_OURS = "fedprune"

_MAY_BE_NONE = ("starter", "allocator")

_ATTRIBUTES: dict[str, tuple[str, type, str]] = {
    "scorer": ("observes", bool, "true or false"),
    "aggregator": ("weighting", str, "samples or uniform"),
}
"""What roles say of themselves."""

_ABOUT_AN_UPDATE = ("reconstruct", "share", "add")
"""In these our own errors are verdicts on the update that is looked at, and stay what they are."""

_PAGE = "docs/write-a-strategy.md says what each role is asked and what it answers."


def own_strategy(job: Job) -> Strategy:
    """Compose what a user's function says.

    Raises:
        ConfigError: There is no such function, it fails, or what it makes is no strategy; or an option is wrong.
    """
    strategy, own = _composed(job)
    return _guarded(strategy, job.strategy, own)


def own_code(job: Job) -> str:
    """Digest of the files that define a user's own strategy and its roles; empty for presets.

    Raises:
        ConfigError: As `own_strategy`.
    """
    if ":" not in job.strategy:
        return ""
    strategy, _ = _composed(job)
    roles = [getattr(strategy, role) for role in ROLES]
    modules = {type(r).__module__ for r in roles if r is not None} | {job.strategy.partition(":")[0]}
    files = [getattr(sys.modules.get(m), "__file__", None) for m in sorted(modules) if not m.startswith(_OURS + ".")]
    digest = hashlib.sha256()
    for file in filter(None, files):
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def _composed(job: Job) -> tuple[Strategy, _Origin]:
    module_name, _, name = job.strategy.partition(":")
    try:
        module = own_module(module_name)
        compose = getattr(module, name)
    except FedpruneError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(f"job: strategy {job.strategy} {_failed(error)}", hint=_remedy(error, module_name)) from error
    own = _Origin(module_name, getattr(module, "__file__", None))
    try:
        strategy = compose(job)
    except FedpruneError:
        raise
    except Exception as error:
        raise StrategyError(f"job: strategy {job.strategy} {_failed(error, own.place(error))}", hint=_PAGE) from error
    if not isinstance(strategy, Strategy):
        raise StrategyError(f"job: strategy {job.strategy}", expected="a Strategy", got=type(strategy).__name__)
    return strategy, own


def _guarded(strategy: Strategy, name: str, own: _Origin) -> Strategy:
    roles: dict[str, Any] = {}
    for role, methods in ROLES.items():
        found = getattr(strategy, role)
        if found is None and role in _MAY_BE_NONE:
            continue
        lacking = [m for m in methods if not callable(getattr(found, m, None))]
        if lacking:
            raise StrategyError(
                f"strategy {name}: {role}",
                expected=f"an object with {' and '.join(f'{m}()' for m in methods)}",
                got=f"{type(found).__name__}, which lacks {lacking[0]}()",
                hint=_PAGE,
            )
        guard = _Guard(name, role, found, own)
        guard.attributes()
        if type(found).__module__.partition(".")[0] != _OURS:
            roles[role] = guard
    if not (strategy.schedule is None or isinstance(strategy.schedule, Schedule)):
        raise StrategyError(f"strategy {name}: schedule", expected="a Schedule", got=type(strategy.schedule).__name__)
    return replace(strategy, **roles)


class _Origin:
    """Where somebody's code lies: a module's package, and the folders of files that are known."""

    def __init__(self, module: str, file: str | None) -> None:
        self.packages = {module.partition(".")[0]} - {_OURS}
        self.folders = set() if file is None else {Path(file).parent}

    def also(self, kind: type) -> _Origin:
        """With the module of a role's class, too."""
        out = _Origin(kind.__module__, None)
        out.packages |= self.packages
        out.folders |= self.folders
        return out

    def place(self, error: BaseException) -> str:
        """Where an error came out of this code: file and line; empty if it didn't."""
        found = ""
        for frame, line in walk_tb(error.__traceback__):
            package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
            if package in self.packages or Path(frame.f_code.co_filename).parent in self.folders:
                found = _line(frame.f_code.co_filename, line)
        return found


class _Guard:
    """A role of somebody's own: it is asked as the role is, and answers what the role answers."""

    def __init__(self, strategy: str, role: str, own: object, origin: _Origin) -> None:
        self._strategy = strategy
        self._role = role
        self._own = own
        self._origin = origin.also(type(own))
        for method in ROLES[role]:
            setattr(self, method, partial(self._ask, method))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._own, name)

    def attributes(self) -> None:
        """Check what a role says of itself.

        Raises:
            StrategyError: It lacks something, or that is of another type.
        """
        name, kind, text = _ATTRIBUTES.get(self._role, ("", object, ""))
        if name and not isinstance(getattr(self._own, name, None), kind):
            raise StrategyError(
                f"strategy {self._strategy}: {self._role} {type(self._own).__name__}.{name}",
                expected=text,
                got=shown(getattr(self._own, name, None)),
                hint=_PAGE,
            )

    def _ask(self, method: str, *asked: Any, **named: Any) -> Any:
        theirs: list[BaseException] = []
        handed = [_marked(a, theirs) if callable(a) else a for a in asked]
        what = f"strategy {self._strategy}: {self._role} {type(self._own).__name__}.{method}"
        try:
            answer = getattr(self._own, method)(*handed, **named)
        except (StorageError, MissingExtraError, StrategyError, MemoryError):
            raise
        except Exception as error:
            if error in theirs or (isinstance(error, FedpruneError) and method in _ABOUT_AN_UPDATE):
                raise
            place = self._origin.place(error) or self._defined(method)
            raise StrategyError(f"{what} {_failed(error, place)}") from error
        try:
            ROLES[self._role][method](answer, asked)
        except UnfitError as unfit:
            raise StrategyError(
                f"{what} at {self._defined(method)}: answer{unfit.part}",
                expected=unfit.expected,
                got=unfit.got,
                hint=_PAGE,
            ) from unfit
        return answer

    def _defined(self, method: str) -> str:
        found = inspect.unwrap(getattr(self._own, method))
        code = getattr(found, "__code__", None)
        return type(self._own).__module__ if code is None else _line(code.co_filename, code.co_firstlineno)


def _marked(read: Callable[[], Iterator[Any]], theirs: list[BaseException]) -> Callable[[], Iterator[Any]]:
    """What reads updates for a role; what fails in reading them isn't the role's fault, and is noted."""

    def reading() -> Iterator[Any]:
        try:
            yield from read()
        except Exception as error:
            theirs.append(error)
            raise

    return reading


def _failed(error: Exception, place: str = "") -> str:
    kind = "" if isinstance(error, FedpruneError) else f"{type(error).__name__}: "
    return f"failed{f' at {place}' if place else ''} ({kind}{reason(error)})"


def _remedy(error: Exception, module: str) -> str:
    """What to do where a strategy wasn't found."""
    if isinstance(error, ModuleNotFoundError):
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            return "Start the command in the folder of the file, or install the package that has it."
        return f"Install {error.name}."
    loaded = sys.modules.get(module)
    if isinstance(error, AttributeError) and loaded is not None:
        functions = [n for n, v in vars(loaded).items() if inspect.isfunction(v) and v.__module__ == module]
        name = str(getattr(error, "name", "") or "")
        return f"Its functions are {', '.join(functions) or 'none'}{meant(name, functions)}."
    return ""


def _line(file: str, line: int) -> str:
    path = Path(file)
    with suppress(ValueError):  # it lies elsewhere
        path = path.relative_to(Path.cwd())
    return f"{path}:{line}"
