"""Which strategies can be private, and how.

With local noise a board releases its update, so that no use of it by the server costs more; the board must not send
other measurements. With shared noise only the sum is released, so that a strategy that uses single updates is refused.
"""

from __future__ import annotations

from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.strategies.averaging import Mean
from fedprune.strategies.scorers import ByName
from fedprune.strategies.strategy import Strategy
from fedprune.updates.codecs import PLAIN
from fedprune.updates.privacy_settings import LOCAL, SHARED

_LOSSLESS = (PLAIN, "zlib")


def check_private(job: Job, strategy: Strategy) -> Strategy:
    """Check that a job's privacy can be kept by its strategy.

    Returns:
        The strategy.

    Raises:
        ConfigError: It can't; the message names the strategy and says why.
    """
    if not job.privacy.on:
        return strategy
    if strategy.inputs == "measurements":
        raise ConfigError(
            f"job: privacy with strategy {job.strategy}",
            expected="a strategy whose boards send updates alone",
            got="one that also uses what boards measure on their samples, which no noise covers",
            hint="fedprune, fedavg and heterofl are some that can be private.",
        )
    if not job.privacy.local and (looks := _looks(job, strategy)):
        raise ConfigError(
            f"job: privacy: noise {SHARED!r} with strategy {job.strategy}",
            expected="a job in which nothing is made of single updates",
            got=looks,
            hint=f"With noise = {LOCAL!r} every update is private by itself.",
        )
    return strategy


def _looks(job: Job, strategy: Strategy) -> str:
    """What of a job looks at single updates, or is no function of their sum; empty where nothing does."""
    codecs = {job.compression, *job.compression_of.values()} - set(_LOSSLESS)
    found = {
        "a composition of somebody's own, which may look at anything": ":" in job.strategy,
        "a strategy that uses single updates": strategy.inputs != "sum",
        "a schedule on which updates are released one by one": strategy.schedule is not None
        and strategy.schedule.asynchronous,
        "a robust mean, which compares single updates": "robust" in job.options,
        "an aggregator that is no mean of all": type(strategy.aggregator) is not Mean,
        "an option by which only what an update has changed counts": isinstance(strategy.aggregator, Mean)
        and strategy.aggregator.changed != "",
        "a scorer that goes by how single updates moved": isinstance(strategy.scorer, ByName)
        and strategy.scorer.observes,
        f"compression {', '.join(sorted(codecs))}, which rounds single updates": bool(codecs),
        "masks of single elements, which only some boards hold": strategy.masks,
        "rounds of exploration": strategy.explores > 0,
        "updates that are kept for the next rounds": strategy.keeps_past,
    }
    return next((what for what, is_so in found.items() if is_so), "")
