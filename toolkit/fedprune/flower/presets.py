"""Which strategies can be run by Flower's rounds, and why the others can't.

Flower sends a message to every node of a round and waits for the answers. What else a strategy needs of a board (what
it keeps between rounds, masks that it trains under, gradients that it reports) isn't there.
"""

from __future__ import annotations

from fedprune.core.errors import ConfigError, meant
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune.strategies import compose
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Turn

PRESETS = ("fedavg", "fedprox", "fedprune", "fedrolex", "heterofl", "plain")
"""Names of the strategies that work under Flower."""

_PAST = "it goes on from what a device last handed in, which is kept by fedprune's own server"
_PARTS = "a part of the model stays on the device, which a node of Flower doesn't keep"
_MASKS = "devices train under masks of elements"
_LATE = "its updates come in whenever they are ready, while Flower's rounds wait"

REFUSED = {
    "autoflip": _MASKS,
    "ca-hfp": "it ranks channels by curvature, estimated from movements of plain SGD, of which a node's own loop says "
    "nothing",
    "fedasync": _LATE,
    "fedbuff": _LATE,
    "fedfix": _LATE,
    "fedobp": _PAST,
    "fedper": _PARTS,
    "fiarse": _MASKS,
    "history": _PAST,
    "local": _PARTS,
    "pr-fl": "it decides by squared gradients and times of rounds, which fedprune's own boards report",
    "subflot": _PAST,
}
"""The others, and what each of them needs."""


def composed(job: Job) -> Strategy:
    """A job's strategy, if Flower's rounds can run it.

    Raises:
        ConfigError: There is no such strategy, its options are wrong, or it needs what Flower's nodes don't have.
    """
    if job.strategy in REFUSED:
        raise _refusal(job, REFUSED[job.strategy])
    if job.strategy not in PRESETS and ":" not in job.strategy:
        raise ConfigError(
            f"no strategy is called {job.strategy!r}{meant(job.strategy, PRESETS)}",
            expected=f"{', '.join(PRESETS)}, or package.module:function",
        )
    strategy = compose(job)
    recipe = _recipe(job, strategy)
    reasons = {
        "it ranks channels by curvature, of which a node's own loop says nothing": strategy.observes,
        _PAST: strategy.keeps_past,
        _MASKS: strategy.masks or recipe.mask != "none",
        _PARTS: bool(recipe.personal),
        _LATE: strategy.schedule is not None,
        "its first rounds explore": strategy.explores > 0,
        "it needs the squared gradients that fedprune's own boards report": recipe.report_squares,
    }
    for reason, holds in reasons.items():
        if holds:
            raise _refusal(job, reason)
    return strategy


def _recipe(job: Job, strategy: Strategy) -> Recipe:
    """What a device of full width would train by."""
    return strategy.recipe(job.recipe, Turn(job.seed, 1, "", ()))


def _refusal(job: Job, reason: str) -> ConfigError:
    return ConfigError(
        f"strategy {job.strategy!r}, as it is set here, doesn't work under Flower: {reason}",
        expected=", ".join(PRESETS),
        hint="fedprune-server runs it.",
    )
