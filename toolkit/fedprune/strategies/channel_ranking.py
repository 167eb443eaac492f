"""Strategies that rank channels by a score, the same for all devices of a round, so that submodels are nested."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedprune.aggregation.fold import Fold
from fedprune.model.architecture import Architecture
from fedprune.strategies.importance import scoring
from fedprune.strategies.importance.gradient_stats import Evidence
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import NewMemory, Ranking, Scene, UpdateReport

# Memory: what scores that observe know of gradient and curvature.
EVIDENCE = "evidence"


@dataclass(frozen=True)
class RankedChannels(Strategy):
    """Channels ranked by a score.

    Attributes:
        scorer: `ordered`, `magnitude` or `curvature`; or what CA-HFP compares with: `movement`, by how far weights
            moved, or `random`, ranks that are drawn in every round.
        warmup_rounds: Rounds of random ranks before it. Scorers that learn from updates (`curvature`, `movement`) start
            no earlier than the round in which every channel has been trained (CA-HFP, Sec. III-B).
        form: Of the curvature score (`fedprune.strategies.importance.scoring.curvature_scores`).
    """

    scorer: str = "ordered"
    warmup_rounds: int = 0
    form: scoring.CurvatureForm = "abs"

    @property
    def observes_movement(self) -> bool:
        return self.scorer in ("curvature", "movement")

    def rank(self, scene: Scene) -> Ranking:
        evidence = self._evidence(scene) if self.observes_movement else None
        is_untrained = evidence is not None and not evidence.is_complete
        # Until every channel was trained once, the score of an untrained one is 0, and ranks by it would keep it
        # untrained.
        if self.scorer == "random" or scene.round <= self.warmup_rounds or is_untrained:
            return Ranking(scoring.random_ranks(scene.architecture, scene.seed, scene.round))
        return Ranking(scoring.rank_channels(self._scores(scene, evidence)))

    def learn(self, scene: Scene, fold: Fold, reports: Callable[[], Iterator[UpdateReport]]) -> NewMemory:
        if not self.observes_movement:
            return {}
        evidence = self._evidence(scene)
        recipe = scene.recipe
        # A round's steps are all epochs' together, and later epochs see no new samples; `max_steps` ends within the
        # first.
        samples_per_step = recipe.batch_size / (1 if recipe.max_steps else recipe.epochs)
        # The rate in the middle of the round stands for all of its steps.
        evidence.update(fold, recipe.learning_rate(scene.round, 0.5), samples_per_step)
        return {EVIDENCE: evidence.to_tensors()}

    def _scores(self, scene: Scene, evidence: Evidence | None) -> scoring.Scores:
        architecture, model = scene.architecture, scene.model
        if evidence is None:
            return scoring.channel_scores(self.scorer, architecture, model)
        if self.scorer == "movement":
            return scoring.movement_scores(architecture, evidence)
        return scoring.curvature_scores(architecture, model, evidence, self.form)

    def _evidence(self, scene: Scene) -> Evidence:
        stored = scene.memory.get(EVIDENCE)
        if stored is None:
            return Evidence.empty(scene.architecture)
        return Evidence.from_tensors(scene.architecture, stored)


def group_keys(architecture: Architecture) -> list[str]:
    """Keys of what is remembered of channel groups. The digest makes them void once another version of the compiler
    finds other groups."""
    return [f"{architecture.digest}/{g}" for g in range(len(architecture.groups))]
