"""Strategies that rank channels by a score, the same for all devices of a round, so that submodels are nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from fedprune.aggregation.fold import Fold
from fedprune.model.architecture import Architecture
from fedprune.strategies.importance.gradient_stats import DECAY, Estimator, Evidence
from fedprune.strategies.importance.scoring import (
    Form,
    Scores,
    curvature,
    magnitude,
    movement,
    random_ranks,
    ranks,
    score,
)
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Memories, Ranking, Report, Scene

EVIDENCE = "evidence"
"""Memory: what scores that observe know of gradient and curvature."""

HELD = "held"
"""Memory: the ranks of channels that hold until the next interval begins, by the architecture's digest and the group's
number."""


@dataclass(frozen=True)
class Ranked(Strategy):
    """Channels ranked by a score.

    Attributes:
        scorer: `ordered`, `magnitude` or `curvature`; or what CA-HFP compares with: `movement`, by how far weights
            moved, or `random`, ranks that are drawn in every round.
        warmup_rounds: Rounds of random ranks before it; where it observes at least until every channel was trained
            once, since until then there is nothing to judge some of them by (CA-HFP, Sec. III-B).
        form: Of the curvature score (`fedprune.strategies.importance.scoring.curvature`).
        estimator: Of curvature, where it observes (`fedprune.strategies.importance.gradient_stats`).
        decay: What old estimates keep of themselves every round.
        per_count: A channel's layers count by the mean over their weights instead of by the sum.
    """

    scorer: str = "ordered"
    warmup_rounds: int = 0
    form: Form = "abs"
    estimator: Estimator = "fisher"
    decay: float = DECAY
    per_count: bool = False

    @property
    def observes(self) -> bool:
        return self.scorer in ("curvature", "movement")

    def rank(self, scene: Scene) -> Ranking:
        evidence = self._evidence(scene) if self.observes else None
        unknown = evidence is not None and not evidence.complete
        if self.scorer == "random" or scene.round <= self.warmup_rounds or unknown:
            return Ranking(random_ranks(scene.architecture, scene.seed, scene.round))
        return Ranking(ranks(self._scores(scene, evidence)))

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        if not self.observes:
            return {}
        evidence = self._evidence(scene)
        recipe = scene.recipe
        samples = recipe.batch_size / (1 if recipe.max_steps else recipe.epochs)
        evidence.update(fold, recipe.rate(scene.round, 0.5), samples, self.decay)
        return {EVIDENCE: evidence.to_tensors()}

    def _scores(self, scene: Scene, evidence: Evidence | None) -> Scores:
        architecture, model = scene.architecture, scene.model
        if self.scorer == "magnitude":
            return magnitude(architecture, model, per_count=self.per_count)
        if evidence is None:
            return score(self.scorer, architecture, model)
        if self.scorer == "movement":
            return movement(architecture, evidence, per_count=self.per_count)
        return curvature(architecture, model, evidence, self.form, per_count=self.per_count)

    def _evidence(self, scene: Scene) -> Evidence:
        """The estimates; empty if they were made in another way, before the job's settings changed."""
        known = scene.memory.get(EVIDENCE)
        found = None if known is None else Evidence.from_tensors(scene.architecture, known)
        if found is None or found.estimator != self.estimator:
            return Evidence.empty(scene.architecture, self.estimator)
        return found


@dataclass(frozen=True)
class Held(Ranked):
    """Ranks of channels that are computed every few rounds only, for schedules that rank every round.

    Attributes:
        interval: Rounds between two rankings; the score learns from every round.
    """

    interval: int = 1

    def rank(self, scene: Scene) -> Ranking:
        held, places = scene.memory.get(HELD, {}), places_of(scene.architecture)
        if set(held) != set(places) or (scene.round - 1) % self.interval == 0:
            return super().rank(scene)
        return Ranking(tuple(held[p].astype(np.int64) for p in places))

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[Report]]) -> Memories:
        """The ranks that hold, and what the score learns."""
        found = self.rank(scene).ranks
        held = {p: r.astype(np.int32) for p, r in zip(places_of(scene.architecture), found, strict=True)}
        return {**super().learn(scene, fold, reports), HELD: dict(held)}


def places_of(architecture: Architecture) -> list[str]:
    """Names for what is remembered of channel groups, which no other description of the model has."""
    return [f"{architecture.digest}/{g}" for g in range(len(architecture.groups))]
