"""PR-FL: densities by communication time, recovery by early stopping, buffered asynchronous aggregation.

arXiv 2403.15439 and its public code; `docs/strategies/pr-fl.md` has the equations, and says where the sources are
silent or differ, and how they are read here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import ConfigError, value_text
from fedprune.core.settings import bounded, check_fields, choice_of
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import SYNCHRONOUS_SCHEDULE, Schedule, Staleness
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors, mesh
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import Allocator, Fixed, Tiers
from fedprune.strategies.channel_ranking import RankedChannels
from fedprune.strategies.element_masks import MaskedElements
from fedprune.strategies.importance.element_ranking import magnitudes, prunable, with_floors
from fedprune.strategies.importance.scoring import order_scores, rank_channels
from fedprune.strategies.options import read_options
from fedprune.strategies.recovery import Recovery
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.time_driven import StartAllocator, TimeDriven
from fedprune.strategies.values import NewMemory, Ranking, Scene, Turn, UpdateReport

Floats = npt.NDArray[np.float32]

# Memory: the order of elements that holds until the next interval ends.
ORDER = "order"

# Memory: importances as far as they are known (0 where not).
IMPORTANCE = "importance"

# Memory: what devices reported since the last interval ended, and how many reported something of each element.
SUM, COUNT = "importance/sum", "importance/count"

# Memory: the round of every device's last update that was added up: buffered updates come again in later rounds.
COUNTED_ROUNDS = "importance/seen"


@dataclass(frozen=True)
class PrFlOptions:
    """Options of `pr-fl`, which `docs/strategies/pr-fl.md` explains."""

    masks: str = choice_of("elements", ("elements", "channels"))
    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    shares: tuple[Any, ...] = bounded((), 0, math.inf)
    interval: int = bounded(50, 1, 10**6)
    stage1: bool = True
    floor: float = 0.1
    reported: float = bounded(0.1, 0, 1)
    layer_floor: float = 0.05
    recovery: bool = True
    patience: int = 10
    delta: float = 0.2
    window_s: float = bounded(1.0, 1e-3, 1e8)
    least: int = 2
    keep: bool = True
    split: bool = True
    a: float = bounded(0.6, 0, 1e6)
    synchronous: bool = False
    evaluate_every: int = 1


# Options that say nothing of rounds in step.
_ASYNCHRONOUS_OPTIONS = ("window_s", "least", "keep", "a", "evaluate_every")


@dataclass(frozen=True)
class Importance:
    """Ranks elements every few rounds; in between masks change with densities alone.

    Importances are the squared gradients of devices' last steps, which the recipe's `report_squares` asks for,
    stretched over all tensors of a device from 0 to 1, and averaged over the devices that reported something other
    than 0. What an interval brings replaces what was known before. Elements of which nothing is known come by |w|,
    times the least that is known of their tensor.

    Attributes:
        interval: Rounds between two orders.
        floor: Share of every tensor, by |w|, that every mask keeps.
    """

    interval: int = bounded(50, 1, 10**6)
    floor: float = bounded(0.05, 0, 1)

    def __post_init__(self) -> None:
        check_fields(self, ("importance",))

    def rank(self, scene: Scene) -> Ranking:
        """Channels in their own order, and the order of elements that holds."""
        return Ranking(rank_channels(order_scores(scene.architecture)), self._element_order(scene))

    def learn(self, scene: Scene, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        """The order, if it is new, and what devices reported."""
        memories: NewMemory = {}
        # The order is stored, since `magnitudes` of a later model would give another one within the interval.
        if self._begins_interval(scene):
            memories[ORDER] = self._element_order(scene)
        sums, counts, counted_rounds = _add_reports(scene, reports())
        if counted_rounds:
            memories |= {
                SUM: dict(sums),
                COUNT: dict(counts),
                COUNTED_ROUNDS: dict(scene.memory.get(COUNTED_ROUNDS, {})) | counted_rounds,
            }
        if scene.round % self.interval == 0:
            memories |= {IMPORTANCE: _merged_importance(scene, sums, counts), SUM: {}, COUNT: {}}
        return memories

    def _begins_interval(self, scene: Scene) -> bool:
        return ORDER not in scene.memory or (scene.round - 1) % self.interval == 0

    def _element_order(self, scene: Scene) -> Tensors:
        if not self._begins_interval(scene):
            return dict(scene.memory[ORDER])
        magnitude_order = magnitudes(scene.model, prunable(scene.architecture))
        importance = scene.memory.get(IMPORTANCE, {})
        smallest = min((float(v[v > 0].min()) for v in importance.values() if (v > 0).any()), default=1.0)
        return with_floors(
            {n: _with_magnitudes(v, importance.get(n), smallest) for n, v in magnitude_order.items()},
            scene.model,
            self.floor,
        )


def _merged_importance(scene: Scene, sums: Tensors, counts: Tensors) -> Tensors:
    """Importances at the end of an interval: its means, and what was known before where it brought nothing."""
    importance_before = scene.memory.get(IMPORTANCE, {})
    importance: Tensors = {}
    for name, total in sums.items():
        # Counts of 0 have sums of 0: the mean is then 0, which means unknown.
        mean = total / np.maximum(counts[name], 1)
        importance[name] = np.where(mean > 0, mean, importance_before.get(name, np.zeros_like(mean))).astype(np.float32)
    return importance


def _with_magnitudes(magnitude: Floats, importance: Floats | None, smallest: float) -> Floats:
    """Importances of a tensor; where it has none, |w| times the least of the tensor or, without any, of the model."""
    if importance is None:
        return np.multiply(magnitude, smallest, dtype=np.float32)
    positive = importance[importance > 0]
    unit = positive.min() if positive.size else np.float32(smallest)
    return np.where(importance > 0, importance, magnitude * unit).astype(np.float32)


def _add_reports(
    scene: Scene, reports: Iterator[UpdateReport]
) -> tuple[Tensors, Tensors, dict[str, npt.NDArray[np.int64]]]:
    """Sums and counts of the interval with those of new reports, and of which rounds these are. Most updates of
    asynchronous rounds come again, or bring nothing: then nothing is new, and nothing need be stored."""
    names = prunable(scene.architecture)
    shapes = {n: scene.architecture.by_name[n].shape for n in names}
    sums_before = {collection: scene.memory.get(collection, {}) for collection in (SUM, COUNT)}
    sums, counts = (
        {n: np.array(sums_before[collection].get(n, np.zeros(shapes[n], np.float32))) for n in names}
        for collection in sums_before
    )
    counted_before = scene.memory.get(COUNTED_ROUNDS, {})
    counted_rounds: dict[str, npt.NDArray[np.int64]] = {}
    for report in reports:
        turn, maps = report.cut.turn, report.trained.selection.maps
        # A buffered update is folded again in every round until the device's next one.
        if not report.squares or (turn.device in counted_before and int(counted_before[turn.device][0]) >= turn.round):
            continue
        counted_rounds[turn.device] = np.array([turn.round], np.int64)
        squared_gradients = {n: v.astype(np.float64) for n, v in report.squares.items()}
        low = min(float(v.min()) for v in squared_gradients.values())
        high = max(float(v.max()) for v in squared_gradients.values())
        for name in names:
            # An update whose squares are all alike ranks nothing.
            if name in squared_gradients and high > low:
                share = (squared_gradients[name] - low) / (high - low)
                sums[name][mesh(maps(name))] += share.astype(np.float32)
                counts[name][mesh(maps(name))] += share > 0
    return sums, counts, counted_rounds


@dataclass(frozen=True)
class PrFl(MaskedElements):
    """Masks of elements by importance.

    Some updates of every interval also bring squared gradients: those of its last `reporting_rounds` rounds, which know
    best the model that is ranked next, and every device's first. In asynchronous rounds a device gets an offer when it
    comes back, and a slow device may never come in an interval's last rounds.
    """

    importance: Importance = field(default_factory=Importance)
    reporting_rounds: int = 0

    def rank(self, scene: Scene) -> Ranking:
        return self.importance.rank(scene)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        return self.importance.learn(scene, reports)

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        interval, round_of_interval = divmod(turn.round - 1, self.importance.interval)
        is_first_in_interval = (
            turn.last_counted_round == 0 or (turn.last_counted_round - 1) // self.importance.interval < interval
        )
        is_reporting_round = round_of_interval >= self.importance.interval - self.reporting_rounds
        return replace(recipe, report_squares=recipe.report_squares or is_first_in_interval or is_reporting_round)


def pr_fl(job: Job) -> Strategy:
    options = read_options(job, PrFlOptions)
    if options.synchronous and (ignored_options := [n for n in _ASYNCHRONOUS_OPTIONS if n in job.options]):
        raise ConfigError(
            ("job", "options", ignored_options[0]),
            expected="none of " + ", ".join(_ASYNCHRONOUS_OPTIONS) + " with synchronous = true",
            got=value_text(job.options[ignored_options[0]]),
            hint="Rounds in step take the fresh updates of all that deliver by the job's deadline.",
        )
    elements = options.masks == "elements"
    # Both are made for every combination: an option that is wrong is named whether it is used or not.
    importance = Importance(options.interval, options.layer_floor)
    # The tolerance keeps 0.1 of 50 at 5 rounds, whatever the product rounds to.
    reporting = math.ceil(options.reported * options.interval - 1e-9)
    # Channels are ranked every I rounds by the asynchronous schedule, and in every round by rounds in step.
    strategy = (
        PrFl(
            job.strategy,
            inputs="measurements",
            importance=importance,
            reporting_rounds=reporting,
            uses_masks=True,
            splits=options.split,
        )
        if elements
        else RankedChannels(job.strategy, inputs="measurements", scorer="magnitude")
    )
    return replace(
        strategy,
        aggregator=Mean(weighting="uniform"),
        allocator=_allocator(job, options, elements),
        schedule=SYNCHRONOUS_SCHEDULE if options.synchronous else _schedule(job, options),
    )


def _schedule(job: Job, options: PrFlOptions) -> Schedule:
    return Schedule(
        "asynchronous",
        window_s=options.window_s,
        least=options.least,
        keep=options.keep,
        staleness=Staleness("polynomial", options.a),
        mixing="normalised",
        score_every=options.interval,
        evaluate_every=options.evaluate_every,
    )


def _allocator(job: Job, options: PrFlOptions, elements: bool) -> Allocator:
    start: StartAllocator = Fixed(job.density or 1.0, elements)
    if options.densities:
        start = Tiers(tuple(options.densities), tuple(options.shares), masks_elements=elements)
    recovery = Recovery(options.patience, options.delta)
    if not options.stage1:
        return start
    return TimeDriven(
        start,
        recovery if options.recovery else None,
        options.interval,
        floor=options.floor,
        # Without channels a message shrinks with both widths of a layer, and the plain step would overshoot.
        power=1.0 if elements else 2.0,
    )
