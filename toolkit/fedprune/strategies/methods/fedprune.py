"""`fedprune`: the strategy that this project recommends.

Its ingredients; `docs/reproduce-a-paper.md` compares it with what is left without single ones:

- ranks that are settled before the first round and then stay: a submodel's channels are its own for good, so ordered
  dropout can make the ranking true, and a trained model is cut where it hurts least;
- a nested start: in a model that was just made, as its normalisations tell, no channel listens to one that only wider
  models have, so that what a width adds is silent until it has learnt (`fedprune.model.nested_widths`);
- a logit-adjusted loss, so that a device's missing classes don't pull on the model that all share (Menon et al. 2021,
  "Long-tail learning via logit adjustment", eq. 10, with the device's own label shares as prior);
- ordered dropout over the fleet's densities, so that wide boards train the narrow models, too (FjORD, Horvath et al.
  2021, Alg. 1);
- filling from w_t, by which few devices move a coordinate less than many (CA-HFP, Sec. II-A, eq. 4);
- self-distillation on unlabelled samples of the server, if it has any: every width learns from the mean of all widths'
  outputs (Universally slimmable networks, Yu and Huang, ICCV 2019, on FedDF's terms, Lin et al., NeurIPS 2020), as the
  channels of wide models have been trained by few boards;
- server momentum (FedAvgM, Hsu et al. 2019, Sec. 4.3);
- mixup (Zhang et al. 2018) and clipped gradients, as a board has few samples and sees them many times;
- on the board, batch-norm statistics of its own data, and its own moving average of what it trained: half of what
  serves, the other half being the received weights, which know of other boards' data. A board whose validation
  samples show that its average alone is better serves that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded, one_of
from fedprune.jobs.job import SCORERS, Job
from fedprune.jobs.schedule import Schedule, Staleness
from fedprune.model.architecture import Architecture
from fedprune.model.nested_widths import just_made, nested
from fedprune.model.recipe import LEAST_MIXUP, Recipe
from fedprune.model.selection import Tensors
from fedprune.strategies.aggregators import DeltaMean, Mean
from fedprune.strategies.allocation import dealt
from fedprune.strategies.channel_ranking import places_of
from fedprune.strategies.importance.scoring import ranks, score
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Memories, Ranking, Report, Scene, SelfDistillation, Turn

RANKS = "ranks"
"""Memory: the ranks that were settled, by the architecture's digest and the group's number."""


@dataclass(frozen=True)
class Options:
    """Options of `fedprune`, which `docs/strategies/fedprune.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    ranking: str = one_of("auto", ("auto", "nested", *(s for s in SCORERS if s != "curvature")))
    adjust: bool = True
    dropout: tuple[Any, ...] = bounded((0.25, 0.5, 0.75), 1e-3, 1)
    rule: Literal["fill", "coverage"] = "fill"
    server_momentum: float = bounded(0.5, 0, 0.999)
    average: float = bounded(0.85, 0, 1, below=True)
    blend: float = bounded(0.5, 0, 1)
    validate_blend: bool = True
    calibrate: bool = True
    clip_norm: float = bounded(1.0, 0, 1e6)
    mixup: float = bounded(0.2, LEAST_MIXUP, 10, or_zero=True)
    lr_decay: float = bounded(1.0, 1e-3, 1)
    arrivals: int = bounded(0, 0, 10**6)
    distill: int = bounded(40, 0, 10_000)


@dataclass(frozen=True)
class FedPrune(Strategy):
    """The ingredients above, as a job's options have them.

    Ranks are those of the model that the job starts from, and are kept for the whole job. A trained model is cut by
    what it has learnt. In a model that was just made all channels are alike, and any order is as good as another as
    long as it stays. Should another version of the compiler find other groups of channels in the model, ranks are
    settled again, by what the model is then. A model that brings the ranks of an earlier fleet is cut by those.

    Attributes:
        options: The job's options.
        widths: The widths that hold each other in a nested start; empty for the model as it was imported.
    """

    options: Options = field(default_factory=Options)
    widths: tuple[float, ...] = ()

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        """A start at which what a width adds is silent, for a model that was just made."""
        if self.widths and (self.options.ranking == "nested" or just_made(architecture, model)):
            return nested(architecture, model, self.widths)
        return model

    def rank(self, scene: Scene) -> Ranking:
        """The settled ranks; of the first round's model, if none are."""
        known = self._settled(scene)
        if known is not None:
            return known
        name = {"nested": "ordered"}.get(self.options.ranking, self.options.ranking)
        if name == "auto" and scene.ranks is not None:
            return Ranking(scene.ranks)
        if name == "auto":
            name = "ordered" if just_made(scene.architecture, scene.model) else "magnitude"
        return Ranking(ranks(score(name, scene.architecture, scene.model)))

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        """The first round's ranks."""
        if self._settled(scene) is not None:
            return {}
        return {RANKS: dict(zip(places_of(scene.architecture), self.rank(scene).ranks, strict=True))}

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        """The device's recipe. Raises `ConfigError` if the job's own recipe has settings that don't go with the
        strategy's."""
        options = self.options
        average = recipe.average or options.average
        blend = recipe.blend or (options.blend if average else 0.0)
        return replace(
            recipe,
            lr=recipe.lr * options.lr_decay ** (turn.round - 1),
            logit_adjustment=recipe.logit_adjustment or (options.adjust and _adjusts(recipe)),
            ordered_dropout=recipe.ordered_dropout or options.dropout,
            average=average,
            blend=blend,
            validate_blend=recipe.validate_blend or (options.validate_blend and blend > 0),
            calibrate=recipe.calibrate or options.calibrate,
            clip_norm=recipe.clip_norm or options.clip_norm,
            mixup=recipe.mixup or (options.mixup if recipe.mixes else 0.0),
        )

    def _settled(self, scene: Scene) -> Ranking | None:
        known, places = scene.memory.get(RANKS, {}), places_of(scene.architecture)
        return Ranking(tuple(np.asarray(known[p]) for p in places)) if set(known) == set(places) else None


def _adjusts(recipe: Recipe) -> bool:
    # Perplexity judges probabilities: a model whose logits leave the labels' shares out has wrong ones.
    return recipe.loss == "cross_entropy" and recipe.metric != "perplexity"


def fedprune(job: Job) -> Strategy:
    options = read_options(job, Options)
    name = job.strategy
    kind = DeltaMean if options.arrivals else Mean
    return FedPrune(
        name,
        options=options,
        widths=_nested_widths(job, options),
        aggregator=kind(rule=options.rule, server_momentum=options.server_momentum),
        inputs="sum",
        compression="int8",
        allocator=dealt(job, options.densities),
        distillation=_distillation(job, options),
        schedule=_buffered(options.arrivals) if options.arrivals else None,
    )


def _distillation(job: Job, options: Options) -> SelfDistillation | None:
    """The server's own training; None where it is switched off, or where boards keep a part of the model that the
    server's lacks."""
    densities = tuple(d for d in job.recipe.ordered_dropout or options.dropout or options.densities if d < 1)
    if not options.distill or not densities or job.recipe.personal:
        return None
    return SelfDistillation(options.distill, densities, lr=1e-3)


def _nested_widths(job: Job, options: Options) -> tuple[float, ...]:
    """The widths of a nested start: those at which steps train, or else those of tiers; empty for no such start. Raises
    `ConfigError` if a nested start is asked for, and there are no such widths."""
    if options.ranking not in ("auto", "nested"):
        return ()
    widths = tuple(d for d in job.recipe.ordered_dropout or options.dropout or options.densities if d < 1)
    if not widths and options.ranking == "nested":
        raise ConfigError(
            f"job: option ranking of {job.strategy}",
            expected="with nested, some widths below 1",
            got="neither dropout nor densities",
            hint="Give the densities between which it shall be nested, or let ranking be ordered.",
        )
    return widths


def _buffered(arrivals: int) -> Schedule:
    return Schedule(kind="asynchronous", arrivals=arrivals, staleness=Staleness("polynomial", a=0.5), mixing="damped")
