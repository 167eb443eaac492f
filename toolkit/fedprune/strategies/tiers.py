"""Who gets how much of the model, as presets' options say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.strategies.allocation import Allocator, Fixed, Tiers
from fedprune.strategies.options import choice, numbers


def dealt(
    job: Job,
    densities: Sequence[float],
    shares: Sequence[float] = (),
    by: str = "name",
    every: int = 0,
    *,
    default: Sequence[float] = (),
) -> Allocator | None:
    """The allocator that `densities` and its companions ask for.

    Args:
        job: Its own `density` comes next.
        densities: One per tier; empty to leave it to the job or, where it has none, to the default.
        shares: Share of the fleet in each tier; empty for equal ones.
        by: `name` or `chance`.
        every: With `chance`, tiers are drawn anew every so many rounds.
        default: Densities of the preset's own; empty to leave it to the planner.

    Raises:
        ConfigError: They don't fit each other.
    """
    for name, values in (("densities", densities), ("shares", shares)):
        numbers(job.strategy, name, values)
    choice(job.strategy, "by", by, ("name", "chance"))
    if not densities and not job.density and len(default) == 1:
        return Fixed(default[0])
    tiers = densities or (() if job.density else default)
    if tiers:
        return Tiers(tuple(tiers), tuple(shares), cast(Literal["name", "chance"], by), every)
    if shares or by != "name" or every:
        raise ConfigError(
            f"job: options shares, by and every of {job.strategy}",
            expected="densities to deal",
            got="the job's density" if job.density else "the planner's widths",
        )
    return Fixed(job.density) if job.density else None
