"""HeteroFL (Diao et al. 2021) and FedRolex (Alam et al. 2022): submodels of several widths out of one model.

They differ in where the kept channels lie: HeteroFL's are the first ones; FedRolex's window moves on by one channel a
round, around the end, so that all channels get trained. Both train with the same aids, for which HeteroFL's Sec. 3.3
and the authors' code stand: outputs of layers are scaled by 1 / width while training, batch-norm statistics are
measured after training (static batch norm), logits of classes that a device has no sample of are masked, and of the
last layer a device's update counts only in rows of its own classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.settings import bounded
from fedprune.jobs.job import Job
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.model.trainable import head_axes
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.allocation import density_allocator
from fedprune.strategies.options import read_options
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Ranking, Scene, Turn

# The papers' widths a, b, c, d, e.
LEVELS = (1.0, 0.5, 0.25, 0.125, 0.0625)

# The narrowest width whose scaler boards take.
MIN_DENSITY = 1e-3

# Gradients' largest norm, as in HeteroFL's code.
CLIP_NORM = 1.0


@dataclass(frozen=True)
class HeteroFlOptions:
    """Options of `heterofl` and `fedrolex`, which `docs/strategies/heterofl.md` explains."""

    densities: tuple[Any, ...] = bounded((), 0, 1, above=True)
    label_rows: bool = True


@dataclass(frozen=True)
class HeteroFL(Strategy):
    """The first channels, with the aids of training narrow submodels."""

    def begin(self, architecture: Architecture, model: Tensors) -> Tensors:
        if isinstance(self.aggregator, Mean) and self.aggregator.only_changed == "rows":
            # Raises before a board is asked if the model has no last layer whose rows are classes.
            head_axes(architecture, ("job", "options", "label_rows"))
        return model

    def recipe(self, recipe: Recipe, turn: Turn) -> Recipe:
        is_classified = recipe.loss == "cross_entropy"
        return replace(
            recipe,
            scale=1.0 / turn.density if turn.density < 1 else recipe.scale,
            calibrate=True,
            mask_absent_classes=is_classified or recipe.mask_absent_classes,
            clip_norm=CLIP_NORM,
        )


@dataclass(frozen=True)
class FedRolex(HeteroFL):
    """A window that moves on: channel (t + j) mod n is at position j in round t = 0, 1, …

    FedRolex (Alam et al. 2022, eq. 3). All devices of a round share the window's start, so that a narrow device's
    channels are among a wide one's.
    """

    def rank(self, scene: Scene) -> Ranking:
        start = scene.round - 1
        return Ranking(tuple((np.arange(n, dtype=np.int64) + start) % n for n in scene.architecture.sizes))


def heterofl(job: Job) -> Strategy:
    return _compose_heterofl(job, HeteroFL)


def fedrolex(job: Job) -> Strategy:
    return _compose_heterofl(job, FedRolex)


def _compose_heterofl(job: Job, kind: type[HeteroFL]) -> Strategy:
    """A strategy with the aggregator and the widths that its options ask for."""
    options = read_options(job, HeteroFlOptions)
    for density in options.densities or ((job.density,) if job.density else ()):
        validation.check_number(("job", "options", "densities"), density, MIN_DENSITY, 1)
    counts_label_rows = options.label_rows and job.recipe.loss == "cross_entropy"
    if counts_label_rows and job.recipe.optimizer == "adam" and job.recipe.weight_decay:
        raise ConfigError(
            "tells untrained rows by their direction, which Adam's weight decay changes",
            path=("job", "options", "label_rows"),
            expected="optimizer adamw or sgd, weight_decay 0, or label_rows = false",
        )
    return kind(
        job.strategy,
        aggregator=Mean(weighting="uniform", only_changed="rows" if counts_label_rows else ""),
        inputs="sum",
        allocator=density_allocator(job, options.densities, default=LEVELS),
    )
