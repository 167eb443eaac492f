"""`fedprune`: the strategy that this project recommends.

Its ingredients; `docs/reproduce-a-paper.md` compares it with what is left without single ones:

- ranks that are settled before the first round and then stay: a submodel's channels are its own for good, so ordered
  dropout can make the ranking true, and a trained model is cut where it hurts least;
- a nested start: in a model that was just made, as its normalisations or the bounds of its weights tell, no channel
  listens to one that only wider models have, so that what a width adds is silent until it has learnt; and the core has
  the weights that a net of its widths begins with (`fedprune.model.nesting`);
- a logit-adjusted loss, so that a device's missing classes don't pull on the model that all share (Menon et al. 2021,
  "Long-tail learning via logit adjustment", eq. 10, with the device's own label shares as prior);
- a core that the fleet shares before each board trains all that it can hold (`fedprune.strategies.shared_core`); or, if
  it is asked for, ordered dropout, so that wide boards train the narrow models, too (FjORD, Horvath et al. 2021,
  Alg. 1);
- filling from w_t, by which few devices move a coordinate less than many (CA-HFP, Sec. II-A, eq. 4);
- self-distillation on unlabelled samples of the server, if it has any: every width learns from the mean of all widths'
  outputs (Universally slimmable networks, Yu and Huang, ICCV 2019, on FedDF's terms, Lin et al., NeurIPS 2020), as the
  channels of wide models have been trained by few boards;
- server momentum (FedAvgM, Hsu et al. 2019, Sec. 4.3), where boards train with SGD;
- clipped gradients, and mixup (Zhang et al. 2018) if it is asked for;
- on the board, batch-norm statistics of its own data, and its own moving average of what it trained: half of what
  serves, the other half being the received weights, which know of other boards' data. A board whose validation
  samples show that one of the two is better serves that, the received weights without its labels' shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded, choice_of
from fedprune.jobs.job import SCORERS, Job
from fedprune.jobs.schedule import Schedule, Staleness
from fedprune.model.architecture import Architecture, widths_at
from fedprune.model.initial_values import is_untrained
from fedprune.model.mixup import MIN_MIXUP
from fedprune.model.nesting import nest_widths, start_as_core
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies.aggregators import DeltaMean, Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.channel_ranking import group_keys
from fedprune.strategies.importance.scoring import Ranks, channel_scores, rank_channels
from fedprune.strategies.options import read_options
from fedprune.strategies.shared_core import SharedCore
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import NewMemory, Ranking, Scene, SelfDistillation, Turn, UpdateReport

# Memory: the ranks that were settled, by the architecture's digest and the group's number.
RANKS = "ranks"

# The served average forgets all but the last rounds while a job is young: in round t its factor is t / (t + this).
AVERAGE_DELAY = 4

# β of jobs whose boards train with SGD. Steps of the other optimisers are as long in the first rounds, and momentum
# carries the model beyond what boards found.
SGD_MOMENTUM = 0.5

# Share of the boards that can hold the core.
CORE_BOARD_SHARE = 0.75

# A bottleneck as narrow as this is most of what a model knows of a sample, and next to nothing of its costs. With a
# core alone: with ordered dropout, whose steps cut every group, it has not been tried.
MIN_CHANNELS = 4


@dataclass(frozen=True)
class FedPruneOptions:
    """Options of `fedprune`, which `docs/strategies/fedprune.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    ranking: str = choice_of("auto", ("auto", "nested", *(s for s in SCORERS if s != "curvature")))
    adjust: bool = True
    core: float | None = bounded(None, 0, 1)
    dropout: tuple[Any, ...] = bounded((), 1e-3, 1)
    rule: Literal["fill", "coverage"] = "fill"
    server_momentum: float | None = bounded(None, 0, 0.999)
    average: float = bounded(0.85, 0, 1, below=True)
    blend: float = bounded(0.5, 0, 1)
    validate_blend: bool = True
    calibrate: bool = True
    clip_norm: float = bounded(1.0, 0, 1e6)
    mixup: float = bounded(0.0, MIN_MIXUP, 10, or_zero=True)
    lr_decay: float = bounded(1.0, 1e-3, 1)
    arrivals: int = bounded(0, 0, 10**6)
    distill: int = bounded(40, 0, 10_000)


@dataclass(frozen=True)
class FedPrune(Strategy):
    """The strategy with the ingredients that a job's options ask for.

    Ranks are those of the model that the job starts from, and are kept for the whole job. A trained model is cut by
    what it has learnt. In a model that was just made all channels are alike, and any order is as good as another as
    long as it stays. If another version of the compiler finds other groups of channels in the model, ranks are settled
    again by the model of that round. A model that brings the ranks of an earlier fleet is cut by those.

    Attributes:
        nested_densities: The widths that hold each other in a nested start; empty for the model as it was imported.
    """

    options: FedPruneOptions = field(default_factory=FedPruneOptions)
    nested_densities: tuple[float, ...] = ()

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        """Nest a model that was just made, so that what a wider width adds is silent at the start."""
        # With a core no widths are nested beforehand: `start_core` knows it.
        if self.nested_densities and self._is_just_made(architecture, model):
            nested_levels = [widths_at(architecture, density) for density in self.nested_densities]
            return nest_widths(architecture, model, nested_levels)
        return model

    def rank(self, scene: Scene) -> Ranking:
        """The settled ranks, or those of the first round's model if none are settled."""
        settled = self._settled_ranking(scene)
        if settled is not None:
            return settled
        # A nested start is made for the model's own order.
        scorer = {"nested": "ordered"}.get(self.options.ranking, self.options.ranking)
        # An earlier fleet has trained narrow models by these ranks, which says more than sizes of weights.
        if scorer == "auto" and scene.ranks is not None:
            return Ranking(scene.ranks)
        if scorer == "auto":
            scorer = "ordered" if is_untrained(scene.architecture, scene.model) else "magnitude"
        return Ranking(rank_channels(channel_scores(scorer, scene.architecture, scene.model)))

    def start_core(self, scene: Scene, core: tuple[int, ...]) -> tuple[Tensors, NewMemory] | None:
        """In a model that was just made the core has the weights that a net of its widths begins with."""
        if not self._is_just_made(scene.architecture, scene.model):
            return None
        ranks = self.rank(scene).ranks
        return start_as_core(Selection.of(scene.architecture, core, ranks), scene.model), _memory_of(scene, ranks)

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        """Store the first round's ranks."""
        return {} if self._settled_ranking(scene) is not None else _memory_of(scene, self.rank(scene).ranks)

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """The device's recipe. Raises `ConfigError` if the job's own recipe has settings that don't go with the
        strategy's."""
        options = self.options
        ema_decay = recipe.average or min(options.average, turn.round / (turn.round + AVERAGE_DELAY))
        blend = recipe.blend or (options.blend if ema_decay else 0.0)
        # A step of Adam moves each weight as far at any width, and so the outputs as far as there are channels; one of
        # SGD does not. So rates of hidden layers go with 1 / width and 1 (Yang et al. 2021, "Tensor Programs V", Table
        # 3). MACs go with the square of the width, as far as layers are narrower at all.
        is_scaled = self.core is not None and recipe.optimizer != "sgd"
        lr_factor = turn.macs_share**-0.5 if is_scaled else 1.0
        # Perplexity judges probabilities: a model whose logits leave the labels' shares out has wrong ones.
        can_adjust = recipe.loss == "cross_entropy" and recipe.metric != "perplexity"
        return replace(
            recipe,
            lr=recipe.lr * options.lr_decay ** (turn.round - 1) * lr_factor,
            logit_adjustment=recipe.logit_adjustment or (options.adjust and can_adjust),
            ordered_dropout=recipe.ordered_dropout or options.dropout,
            average=ema_decay,
            blend=blend,
            validate_blend=recipe.validate_blend or (options.validate_blend and blend > 0),
            calibrate=recipe.calibrate or options.calibrate,
            clip_norm=recipe.clip_norm or options.clip_norm,
            mixup=recipe.mixup or (options.mixup if recipe.can_mix else 0.0),
        )

    def without_core(self) -> FedPrune:
        """The same for a fleet that shares no core: nested between the quarters where it isn't said what boards
        hold."""
        return replace(self, core=None, nested_densities=self.nested_densities or (0.25, 0.5, 0.75))

    def _is_just_made(self, architecture: Architecture, model: Tensors) -> bool:
        ranking = self.options.ranking
        return ranking == "nested" or (ranking == "auto" and is_untrained(architecture, model))

    def _settled_ranking(self, scene: Scene) -> Ranking | None:
        stored_ranks, keys = scene.memory.get(RANKS, {}), group_keys(scene.architecture)
        # Keys carry the architecture's digest: other groups of channels make the memory void.
        return Ranking(tuple(np.asarray(stored_ranks[key]) for key in keys)) if set(stored_ranks) == set(keys) else None


def _memory_of(scene: Scene, ranks: Ranks) -> NewMemory:
    return {RANKS: dict(zip(group_keys(scene.architecture), ranks, strict=True))}


def fedprune(job: Job) -> Strategy:
    options = read_options(job, FedPruneOptions)
    # Without rounds devices begin with different models, of which only moves can be averaged.
    kind = DeltaMean if options.arrivals else Mean
    core = _shared_core(job, options)
    momentum = options.server_momentum
    if momentum is None:
        momentum = SGD_MOMENTUM if job.recipe.optimizer == "sgd" else 0.0
    # The narrower widths at which boards' steps train, or those of tiers.
    widths = () if core is not None else tuple(d for d in _dropout(job, options) or options.densities if d < 1)
    if options.ranking == "nested" and core is None and not widths:
        raise ConfigError(
            ("job", "options", "ranking"),
            expected="with nested, a core or some widths below 1",
            got="neither a core, nor dropout, nor densities",
            hint="Give the densities between which it shall be nested, or let ranking be ordered.",
        )
    return FedPrune(
        job.strategy,
        options=options,
        nested_densities=widths,
        aggregator=kind(rule=options.rule, server_momentum=momentum),
        inputs="sum",
        compression="int8",
        allocator=density_allocator(job, options.densities),
        distillation=_distillation(job, options),
        schedule=_buffered_schedule(options.arrivals) if options.arrivals else None,
        min_channels=1 if core is None else MIN_CHANNELS,
        core=core,
    )


def _shared_core(job: Job, options: FedPruneOptions) -> SharedCore | None:
    """The core that the options ask for, by default one, but none beside ordered dropout, whose steps are narrower, or
    in asynchronous jobs, which begin with few of their boards. Raises `ConfigError` if one is asked for there."""
    is_asynchronous = options.arrivals > 0 or job.schedule.get("kind", "sync") != "sync"
    has_none = is_asynchronous or bool(_dropout(job, options))
    board_share = (0.0 if has_none else CORE_BOARD_SHARE) if options.core is None else options.core
    if board_share and has_none:
        raise ConfigError(
            ("job", "options", "core"),
            expected=f"0 {'in asynchronous jobs' if is_asynchronous else 'with ordered dropout, of narrower steps'}",
            got=board_share,
            hint=f"Leave out `core`, or {'`arrivals` and the schedule' if is_asynchronous else '`dropout`'}.",
        )
    return SharedCore(board_share) if board_share else None


def _dropout(job: Job, options: FedPruneOptions) -> tuple[float, ...]:
    return job.recipe.ordered_dropout or options.dropout


def _distillation(job: Job, options: FedPruneOptions) -> SelfDistillation | None:
    """The server's own training, at the widths of ordered dropout, or else at those that boards have trained; None if
    it is off, or if boards keep tensors that the server's model lacks."""
    if not options.distill or job.recipe.personal:
        return None
    # The rate was chosen on tables of docs/strategies/fedprune.md.
    return SelfDistillation(options.distill, tuple(d for d in _dropout(job, options) if d < 1), lr=1e-3)


def _buffered_schedule(arrivals: int) -> Schedule:
    return Schedule(kind="asynchronous", arrivals=arrivals, staleness=Staleness("polynomial", a=0.5), mixing="damped")
