"""HeteroFL (Diao et al. 2021) and FedRolex (Alam et al. 2022): submodels of several widths out of one model.

They differ in where the kept channels lie: HeteroFL's are the first ones; FedRolex's window moves on by one channel a
round, around the end, so that all channels get trained. Both train with the same aids, for which HeteroFL's Sec. 3.3
and the authors' code stand: outputs of layers are scaled by 1 / width while training, batch-norm statistics are
measured after training (static batch norm), logits of classes that a device has no sample of are masked, and of the
last layer a device's update counts only in rows of its own classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fedprune.core import validation
from fedprune.core.errors import ConfigError, shown
from fedprune.core.settings import bounded, one_of
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.model.trainable import head_axes
from fedprune.strategies.aggregators import WEIGHTINGS, Mean
from fedprune.strategies.allocation import DealtBy, dealt
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Ranking, Scene, Turn

LEVELS = (1.0, 0.5, 0.25, 0.125, 0.0625)
"""The papers' widths a, b, c, d, e."""


MOST_SCALED = 1e-3
"""The narrowest width whose scaler boards take."""


@dataclass(frozen=True)
class Options:
    """Options of `heterofl`, which `docs/strategies/heterofl.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    planned: bool = False
    shares: tuple[Any, ...] = bounded((), 0, math.inf)
    by: DealtBy = "name"
    every: int = 0
    weighting: str = one_of("uniform", WEIGHTINGS)
    scaler: bool = True
    static_norm: bool = True
    masked: bool = True
    label_rows: bool = True
    clip_norm: float = bounded(1.0, 0, 1e6)
    milestones: tuple[Any, ...] = ()
    factor: float = bounded(0.1, 1e-6, 1)


@dataclass(frozen=True)
class RollingOptions(Options):
    """Options of `fedrolex`, which `docs/strategies/fedrolex.md` explains."""

    step: int = bounded(1, 0, 10**6)


@dataclass(frozen=True)
class HeteroFL(Strategy):
    """The first channels, with the aids of training narrow submodels."""

    options: Options = field(default_factory=Options)

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        if isinstance(self.aggregator, Mean) and self.aggregator.changed == "rows":
            head_axes(architecture, ("job", "options", "label_rows"))
        return model

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        options = self.options
        settings: dict[str, Any] = {}
        if options.scaler and turn.density < 1:
            settings["scale"] = 1.0 / turn.density
        if options.static_norm:
            settings["calibrate"] = True
        if options.masked and recipe.loss == "cross_entropy":
            settings["mask_absent_classes"] = True
        if options.clip_norm:
            settings["clip_norm"] = options.clip_norm
        passed = sum(turn.round > m for m in options.milestones)
        return replace(recipe, lr=recipe.lr * options.factor**passed, **settings)


@dataclass(frozen=True)
class FedRolex(HeteroFL):
    """A window that moves on: channel (t·step + j) mod n comes at place j in round t = 0, 1, …

    FedRolex (Alam et al. 2022, eq. 3). All devices of a round share the window's start, so that a narrow device's
    channels are among a wide one's.
    """

    step: int = 1

    def rank(self, scene: Scene) -> Ranking:
        start = (scene.round - 1) * self.step
        return Ranking(tuple((np.arange(n, dtype=np.int64) + start) % n for n in scene.architecture.sizes))


def heterofl(job: Job) -> Strategy:
    return _composed(job, HeteroFL(job.strategy, options=read_options(job, Options), inputs="sum"))


def fedrolex(job: Job) -> Strategy:
    options = read_options(job, RollingOptions)
    return _composed(job, FedRolex(job.strategy, options=options, step=options.step, inputs="sum"))


def _composed(job: Job, strategy: HeteroFL) -> Strategy:
    """A strategy with the aggregator and the widths that its options ask for."""
    options = strategy.options
    if not all(type(m) is int and m >= 0 for m in options.milestones):
        raise ConfigError(("job", "options", "milestones"), expected="numbers of rounds", got=shown(options.milestones))
    if options.scaler:
        for density in options.densities or ((job.density,) if job.density else ()):
            validation.number(("job", "options", "densities"), density, MOST_SCALED, 1)
    default = () if options.planned else LEVELS
    rows = options.label_rows and options.masked and job.recipe.loss == "cross_entropy"
    if rows and job.recipe.optimizer == "adam" and job.recipe.weight_decay:
        raise ConfigError(
            "tells untrained rows by their direction, which Adam's weight decay changes",
            path=("job", "options", "label_rows"),
            expected="optimizer adamw or sgd, weight_decay 0, or label_rows = false",
        )
    return replace(
        strategy,
        aggregator=Mean(weighting=options.weighting, changed="rows" if rows else ""),
        allocator=dealt(job, options.densities, options.shares, options.by, options.every, default=default),
    )
