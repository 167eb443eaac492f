"""Checks that a strategy fits a job's privacy: noise on the boards' updates, or sums of masked updates."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Collection
from contextlib import nullcontext, suppress

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.strategy import Strategy
from fedprune.updates.codecs import AUTO, PLAIN
from fedprune.updates.privacy import LOCAL, SHARED


def check_private(job: Job, strategy: Strategy, sizes: tuple[int, ...] = ()) -> Strategy:
    """Return a strategy that can keep its job's privacy; `sizes` are the model's channels per group, where it is known.
    Raises `ConfigError` if it can't, which names the strategy and says why.

    With local noise a board releases its update, so that no use of it by the server costs more; the board must not send
    other measurements. With shared noise only the sum is released, so that a strategy that uses single updates is
    refused.
    """
    if not job.privacy.is_on:
        return strategy
    if strategy.inputs == "measurements":
        raise ConfigError(
            f"with strategy {job.strategy}",
            path=("job", "privacy"),
            expected="a strategy whose boards send updates alone",
            got="one that also uses what boards measure on their samples, which no noise covers",
            hint="fedprune, fedavg and fedprox are some that can be private.",
        )
    # Raises if a `recipe` of its own asks for what no noise covers. One that fails at the width of no model at hand may
    # be right at the job's, with which a coordinator asks again.
    with nullcontext() if sizes or ":" not in job.strategy else suppress(ConfigError):
        strategy.planned_recipe(job, "", sizes or (1,), 1.0, 1)
    if not job.privacy.is_local and (reader := _single_update_reader(job, strategy, (PLAIN,))):
        raise ConfigError(
            f"{SHARED!r} with strategy {job.strategy}",
            path=("job", "privacy", "noise"),
            expected="a job in which nothing is made of single updates",
            got=reader,
            hint=f"With noise = {LOCAL!r}, and without boards, every update is private by itself.",
        )
    return strategy


def check_secure(job: Job, strategy: Strategy) -> Strategy:
    """Return a strategy that needs only sums of masked updates, if its job has secure aggregation. Raises
    `ConfigError`, which says what needs more."""
    if not job.secure_aggregation:
        return strategy
    reader = _single_update_reader(job, strategy, (PLAIN, "int8"))
    if not reader and (job.compression_of or job.compression_down not in (AUTO, PLAIN)):
        reader = "compression_of or compression_down, by which boards differ"
    if not reader:  # and so a preset, whose recipe depends on no model
        recipe = strategy.planned_recipe(job, "", (1,), 1.0, 1)
        if recipe.mask != "none" or recipe.report_squares:
            reader = "a recipe with element masks or squared gradients, which boards have of their own"
    if reader:
        raise ConfigError(
            f"with strategy {job.strategy}",
            path=("job", "secure_aggregation"),
            expected="a job in which nothing is made of single updates",
            got=reader,
            hint="fedavg, and heterofl with label_rows = false, are some that go with it; compression may be int8.",
        )
    return strategy


def _single_update_reader(job: Job, strategy: Strategy, allowed: Collection[str]) -> str:
    """What of a job reads single updates, or more than their sum; empty if nothing does. `allowed` are the codecs that
    don't."""
    # AUTO is the strategy's own codec, which is checked with the strategy.
    codecs = {job.compression, *job.compression_of.values()} - {AUTO, *allowed}
    readers = {
        "a composition of your own, which may read anything": ":" in job.strategy,
        "a strategy that uses single updates": strategy.inputs != "sum",
        # A subclass inherits `inputs`, so that its methods have the last word.
        "a `reconstruct` of its own, which rewrites single updates": not strategy.has_plain_reconstruction,
        "a `learn` of its own, which reads single updates": _reads_reports(type(strategy), "learn"),
        "a `close` of its own, which reads single updates": _reads_reports(type(strategy), "close"),
        "a schedule on which updates are released one by one": strategy.schedule is not None
        and strategy.schedule.asynchronous,
        "a robust mean, which compares single updates": "robust" in job.options,
        "an aggregator that is no mean of all": type(strategy.aggregator) is not Mean,
        "an option by which only what an update has changed counts": isinstance(strategy.aggregator, Mean)
        and strategy.aggregator.only_changed != "",
        "a ranking by how single updates moved": strategy.observes_movement,
        f"compression {', '.join(sorted(codecs))}, which rounds single updates": bool(codecs),
        "masks of single elements, which only some boards hold": strategy.uses_masks,
        "rounds of exploration": strategy.exploration_rounds > 0,
        "updates that are kept for the next rounds": strategy.keeps_past,
    }
    return next((reader for reader, applies in readers.items() if applies), "")


def _reads_reports(kind: type[Strategy], name: str) -> bool:
    """Whether a class's `learn` or `close` uses its last parameter, `reports`, other than to call the method that it
    overrides. A method whose source can't be read counts as one that does."""
    overrides = [c.__dict__[name] for c in kind.__mro__ if name in c.__dict__ and c is not Strategy]
    try:
        trees = [ast.parse(textwrap.dedent(inspect.getsource(override))) for override in overrides]
    except (OSError, TypeError, SyntaxError):
        return True
    for tree in trees:
        function = next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)), None)
        if function is None or function.args.vararg or function.args.kwarg:
            return True
        calls = (n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) == f"super().{name}")
        passed_on = {n for call in calls for n in ast.walk(call)}
        names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and n not in passed_on}
        if function.args.args[-1].arg in names:
            return True
    return False
