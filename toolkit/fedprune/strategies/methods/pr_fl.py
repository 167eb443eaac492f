"""PR-FL: densities by communication time, recovery by early stopping, buffered asynchronous aggregation.

arXiv 2403.15439 and its public code; `docs/strategies/pr-fl.md` has the equations, and says where the sources are
silent or differ, and how they are read here. FedGMR (arXiv 2512.05372), the same authors' later form, is had by
`stage1 = false`, `step = "double"` or `"ladder"`, `importance = "taylor"` and tiers as `densities`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import ConfigError, shown
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import SYNCHRONOUS, Schedule
from fedprune.model.recipe import Recipe
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Allocator, Fixed, Tiers
from fedprune.strategies.channel_ranking import Held, Ranked
from fedprune.strategies.element_importance import Importance, Kind
from fedprune.strategies.element_masks import Masked
from fedprune.strategies.growth import Ladder, Start, TimeDriven
from fedprune.strategies.methods.asynchronous import staleness_of
from fedprune.strategies.options import choice, number, numbers, read_options
from fedprune.strategies.recovery import Recovery, Step, Validation
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Memories, Ranking, Report, Scene, Turn


@dataclass(frozen=True)
class Options:
    """Settings of `pr-fl`.

    Attributes:
        masks: `elements`, as published: all channels, single weights masked, which makes messages smaller and training
            no faster. `channels`: whole channels, by which boards get faster, too.
        importance: What elements are ranked by: `squares`, `taylor` or `size`
            (`fedprune.strategies.element_importance`).
        densities: What devices begin with, by tier in the order of names; empty for all of the model, or the job's
            `density`.
        shares: Share of the fleet in each tier; empty for equal ones.
        interval: I: masks, densities and early stopping are looked at every so many rounds.
        stage1: Whether times drive densities.
        floor: ρ_min.
        reported: Share of an interval, its last rounds, in whose offers devices are asked for squared gradients, which
            double an update. Every device is asked in its first offer of an interval in any case, so that slow ones are
            heard, too. 1 is all of them, as in the authors' code.
        layer_floor: Share of every tensor that every mask keeps, by |w| (masks of elements).
        gain: How much of the way to equal times is gone at once.
        band: Times that are within this share of the fastest device's for the whole model are equal.
        freeze: Once something has grown, times drive no densities any more.
        recovery: Whether densities grow back.
        patience: P, in checks.
        step: `add` (Δρ), `double` or `ladder`.
        delta: Δρ.
        rungs: The ladder.
        reset: Whoever grows begins with a new best score.
        stable: So many checks whoever has just grown is not looked at.
        final_patience: P of the whole model at the end; 0 for 8·P.
        validation: `devices` or `server` (`fedprune.strategies.recovery.Recovery`).
        stop: Whether the job ends when nothing gets better any more.
        window_s: How long a round collects.
        least: With fewer updates it goes on collecting.
        keep: Every device's last update enters every round.
        staleness: `polynomial`, `hinge` or `constant`.
        a: As in `fedprune.jobs.schedule.Staleness`.
        b: Where the hinge is.
        frozen: What a kept update counts for is settled when it comes.
        max_staleness: Staler updates don't count; 0 for no limit.
        rate: η_g.
        weighting: `uniform` or `samples`.
        synchronous: Rounds in step, with a deadline (the ablation PR-FL-Syn). Options about windows, buffers and
            staleness are refused then.
        mean: `masked`: a weight's mean over those that hold it (MaskFedAvg); `plain`: over all, with 0 where it is
            masked (the ablation FedAvg-PR-FL).
        evaluate_every: The model is evaluated every so many rounds.
    """

    masks: str = "elements"
    importance: str = "squares"
    densities: tuple[Any, ...] = ()
    shares: tuple[Any, ...] = ()
    interval: int = 50
    stage1: bool = True
    floor: float = 0.1
    reported: float = 0.1
    layer_floor: float = 0.05
    gain: float = 1.0
    band: float = 0.05
    freeze: bool = True
    recovery: bool = True
    patience: int = 10
    step: str = "add"
    delta: float = 0.2
    rungs: tuple[Any, ...] = (0.05, 0.1, 0.2, 0.5, 1.0)
    reset: bool = False
    stable: int = 0
    final_patience: int = 0
    validation: str = "devices"
    stop: bool = True
    window_s: float = 1.0
    least: int = 2
    keep: bool = True
    staleness: str = "polynomial"
    a: float = 0.6
    b: int = 2
    frozen: bool = False
    max_staleness: int = 0
    rate: float = 1.0
    weighting: str = "uniform"
    synchronous: bool = False
    mean: str = "masked"
    evaluate_every: int = 1


_ASYNCHRONOUS = (
    "window_s", "least", "keep", "staleness", "a", "b", "frozen", "max_staleness", "rate", "evaluate_every",
)  # fmt: skip
"""Options that say nothing of rounds in step."""


@dataclass(frozen=True)
class PrFl(Masked):
    """Masks of elements by importance.

    Some updates of every interval also bring squared gradients: those of its last rounds, which know the model best
    that is ranked next, and every device's first. In asynchronous rounds a device gets an offer when it comes back: one
    that takes long may never come in an interval's last rounds.

    Attributes:
        importance: Of elements.
        reporting: How many of an interval's last rounds bring squared gradients.
    """

    importance: Importance = field(default_factory=Importance)
    reporting: int = 0

    def rank(self, scene: Scene) -> Ranking:
        return self.importance.rank(scene)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        return self.importance.learn(scene, reports)

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        if self.importance.kind != "squares":
            return recipe
        interval, place = divmod(turn.round - 1, self.importance.interval)
        first = turn.last == 0 or (turn.last - 1) // self.importance.interval < interval
        last = place >= self.importance.interval - self.reporting
        return replace(recipe, report_squares=recipe.report_squares or first or last)


def pr_fl(job: Job) -> Strategy:
    """The preset.

    Raises:
        ConfigError: An option is unknown or out of range.
    """
    options = read_options(job, Options)
    name = job.strategy
    choice(name, "masks", options.masks, ("elements", "channels"))
    choice(name, "weighting", options.weighting, ("uniform", "samples"))
    choice(name, "mean", options.mean, ("masked", "plain"))
    number(name, "rate", options.rate, 0, 1, above=True)
    number(name, "reported", options.reported, 0, 1)
    if options.synchronous and (idle := [n for n in _ASYNCHRONOUS if n in job.options]):
        raise ConfigError(
            f"job: option {idle[0]} of {name}",
            expected="none of " + ", ".join(_ASYNCHRONOUS) + " with synchronous = true",
            got=shown(job.options[idle[0]]),
            hint="Rounds in step take the fresh updates of all that deliver by the job's deadline.",
        )
    elements = options.masks == "elements"
    # Both are made for every combination: an option that is wrong is named whether it is used or not.
    importance = Importance(cast(Kind, options.importance), options.interval, options.layer_floor)
    settings: dict[str, Any] = {
        "aggregator": Mean(rule="coverage" if options.mean == "masked" else "zero", weighting=options.weighting),
        "inputs": "measurements",
        "allocator": _allocator(job, options, elements),
        "schedule": SYNCHRONOUS if options.synchronous else _schedule(job, options),
        "masks": elements,
    }
    if elements:
        reporting = math.ceil(options.reported * options.interval - 1e-9)
        return PrFl(name, importance=importance, reporting=reporting, **settings)
    if (
        options.synchronous
    ):  # the asynchronous schedule ranks every I rounds by itself; rounds in step are ranked singly
        return Held(name, scorer="magnitude", interval=options.interval, **settings)
    return Ranked(name, scorer="magnitude", **settings)


def _schedule(job: Job, options: Options) -> Schedule:
    number(job.strategy, "window_s", options.window_s, 1e-3, 1e8)
    return Schedule(
        "asynchronous",
        window_s=options.window_s,
        least=options.least,
        keep=options.keep,
        staleness=staleness_of(job, options.staleness, options.a, options.b, frozen=options.frozen),
        max_staleness=options.max_staleness,
        mixing="normalised",
        rate=options.rate,
        score_every=options.interval,
        evaluate_every=options.evaluate_every,
    )


def _allocator(job: Job, options: Options, elements: bool) -> Allocator:
    for name in ("densities", "shares", "rungs"):
        numbers(job.strategy, name, getattr(options, name))
    start: Start = Fixed(job.density or 1.0, elements)
    if options.densities:
        start = Tiers(tuple(options.densities), tuple(options.shares), elements=elements)
    recovery = None
    if options.recovery:
        recovery = Recovery(
            patience=options.patience,
            step=cast(Step, options.step),
            delta=options.delta,
            rungs=tuple(options.rungs),
            reset=options.reset,
            stable=options.stable,
            final_patience=options.final_patience,
            validation=cast(Validation, options.validation),
            stop=options.stop,
        )
    if not options.stage1:
        return Ladder(start, recovery, options.interval)
    return TimeDriven(
        start,
        recovery,
        options.interval,
        floor=options.floor,
        gain=options.gain,
        band=options.band,
        freeze=options.freeze,
        power=1.0 if elements else 2.0,
    )
