"""Composes a user's own strategy, which a job names as `package.module:function`."""

from __future__ import annotations

import inspect
import sys

from fedprune.core.errors import ConfigError, FedpruneError, StrategyError, did_you_mean
from fedprune.core.imports import import_user_module
from fedprune.jobs.job import Job
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.strategy_guards import PAGE_HINT, UserCode, failure_text, guard_strategy


def user_strategy(job: Job) -> Strategy:
    """The strategy that a user's function returns; its answers are checked at every call. Raises `ConfigError` if
    there is no such function, it fails or returns no strategy, or an option is wrong."""
    strategy, user_code = compose_unchecked(job)
    return guard_strategy(strategy, job.strategy, user_code)


def compose_unchecked(job: Job) -> tuple[Strategy, UserCode]:
    """The strategy as the user's function returns it, and where the code is. Raises `ConfigError`."""
    module_name, _, name = job.strategy.partition(":")
    try:
        module = import_user_module(module_name)
        compose = getattr(module, name)
    except FedpruneError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise ConfigError(
            f"{job.strategy} {failure_text(error)}", path=("job", "strategy"), hint=_not_found_hint(error, module_name)
        ) from error
    user_code = UserCode(module_name, getattr(module, "__file__", None))
    try:
        strategy = compose(job)
    except FedpruneError:
        raise
    except Exception as error:
        raise StrategyError(
            f"{job.strategy} {failure_text(error, user_code.error_location(error))}",
            path=("job", "strategy"),
            hint=PAGE_HINT,
        ) from error
    if not isinstance(strategy, Strategy):
        raise StrategyError(("job", "strategy"), expected="a Strategy", got=type(strategy).__name__)
    return strategy, user_code


def _not_found_hint(error: Exception, module: str) -> str:
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
