"""Finds why a job's global model no longer improves: the evaluation, the aggregation or the training fails.

Gains are shares: of 1 where the metric is itself a share (accuracy), else of the score that they are compared with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.core.metrics import METRICS, Metric
from fedprune.model.recipe import judging_metric
from fedprune_server.monitoring.round_rows import round_scores

# Evaluated rounds without a better global model that make a stall: of few boards, single rounds vary by chance.
STALL_ROUNDS = 5

# Scores that differ by no more are equal: test data of a board are often 50 to 200 samples, whose accuracy varies by
# as much.
_MAX_EQUAL_GAIN = 0.02

# What a whole job has gained may be chance below this: its best round is the luckiest of many.
_MAX_CHANCE_GAIN = 0.05

# Scores that differ by this much differ for a reason: five times what is taken for equal.
_MIN_CLEAR_GAIN = 0.1

# A model that has come less than this share of the way from its first score to another's is stuck. Of healthy fleets
# with unlike data, whose boards score well on their few classes, the global model comes half of the way and more.
_MAX_STUCK_SHARE_OF_WAY = 0.25

# A model with this share or more (of 1) is good: one that was good when the job began need not improve.
_MIN_GOOD_SCORE = 0.9

# Strategies that leave parts of the global model as they began, so that its score says nothing of the boards'.
_PARTIAL_STRATEGIES = frozenset({"fedper", "local"})


@dataclass(frozen=True, kw_only=True)
class StallScores:
    """A job's scores by the metric that judges its models.

    Boards measure on their own test samples, the server on the samples of [evaluation].

    Attributes:
        first: The global model's score after the first evaluated round.
        now: The global model's mean score over the last `STALL_ROUNDS`.
        best: The global model's best score.
        best_before: The global model's best score before the last `STALL_ROUNDS`.
        initial: The initial model's score on the boards or, where that is no longer kept, `first`.
        received: The recent mean score, on the boards, of the models that they received.
        trained: The recent mean score, on the boards, of the models that they trained from these.
    """

    metric: Metric
    first: float
    now: float
    best: float
    best_before: float
    initial: float
    received: float
    trained: float

    def gain(self, before: float, after: float) -> float:
        change = after - before if self.metric.higher_is_better else before - after
        return change if self.metric.is_share else change / (abs(before) or 1.0)

    def is_stuck(self, begin: float, end: float, goal: float) -> bool:
        """Whether a score that could clearly have come from `begin` to `goal` has hardly moved."""
        distance = self.gain(begin, goal)
        return distance >= _MIN_CLEAR_GAIN and self.gain(begin, end) < _MAX_STUCK_SHARE_OF_WAY * distance

    @property
    def is_good(self) -> bool:
        """Whether the models that boards receive are good."""
        return self.metric.is_share and self.received >= _MIN_GOOD_SCORE

    @property
    def loses_training(self) -> bool:
        """Whether the models that boards receive lack what the boards have learnt."""
        return self.is_stuck(self.initial, self.received, self.trained)


def _evaluation_fails(scores: StallScores) -> bool:
    is_learnt = scores.is_good or scores.gain(scores.initial, scores.received) >= _MIN_CLEAR_GAIN
    return is_learnt and not scores.loses_training and scores.is_stuck(scores.first, scores.now, scores.received)


def _training_fails(scores: StallScores) -> bool:
    gains = scores.gain(scores.initial, scores.trained), scores.gain(scores.first, scores.best)
    return max(gains) < _MAX_CHANCE_GAIN and not scores.is_good


@dataclass(frozen=True)
class StallCause:
    """A cause for which a global model doesn't improve.

    Attributes:
        applies: Whether the scores show it.
        in_training: Whether boards' models suffer. If a loss rises as well, training diverges, which explains more. A
            loss that rises only on the server's samples says nothing about training.
        advice: `{status}` in it stands for the command that shows boards' widths, `{lr}` for the job's learning rate.
    """

    applies: Callable[[StallScores], bool]
    in_training: bool
    sentence: str
    advice: str


# The first that applies is reported: where the evaluation is wrong, its scores say nothing of aggregation or training.
_CAUSES = (
    StallCause(
        _evaluation_fails,
        in_training=False,
        sentence="the models are good on the boards, and only the server's evaluation says otherwise",
        advice="compare the samples of [evaluation] with the boards': scaled alike, with the same numbers for the same "
        "classes, of all classes alike; boards that have few classes score higher on these alone",
    ),
    StallCause(
        lambda scores: scores.loses_training and scores.is_stuck(scores.first, scores.now, scores.trained),
        in_training=True,
        sentence="the boards learn, and aggregation loses what they learn",
        advice="the boards' data are unlike, their training between two rounds goes too far, or their models are of "
        "too different widths: lower lr or epochs or raise proximal in [job.recipe], have more boards in a round, or "
        "give narrow models more (docs/planner.md). {status} shows each board's width",
    ),
    StallCause(
        _training_fails,
        in_training=True,
        sentence="the boards learn nothing either",
        advice="try another lr in [job.recipe] (now {lr}; ten times as much, and a tenth), and look at the boards' "
        "samples: scaled as the model expects, with the right labels (docs/board-data.md)",
    ),
)


def stall_scores(job: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> StallScores | None:
    """The scores of a stored job; None where they can't show a stall: after few rounds, without scores of the server or
    the boards, or where parts of the model stay on the boards."""
    judge = judging_metric(job)
    rounds = [round_scores(row, judge) for row in history]
    global_scores = [scores.global_model for scores in rounds if math.isfinite(scores.global_model)]
    board_scores = [scores for scores in rounds if math.isfinite(scores.received)][-STALL_ROUNDS:]
    has_own_parts = job.get("strategy") in _PARTIAL_STRATEGIES or job.get("recipe", {}).get("personal")
    if len(global_scores) <= STALL_ROUNDS or not board_scores or has_own_parts:
        return None
    metric, initial = METRICS[judge], rounds[0].received
    return StallScores(
        metric=metric,
        first=global_scores[0],
        now=math.fsum(global_scores[-STALL_ROUNDS:]) / STALL_ROUNDS,
        best=metric.best(global_scores),
        best_before=metric.best(global_scores[:-STALL_ROUNDS]),
        initial=initial if math.isfinite(initial) else global_scores[0],  # of a long job only the latest parts are kept
        received=math.fsum(scores.received for scores in board_scores) / len(board_scores),
        trained=math.fsum(scores.trained for scores in board_scores) / len(board_scores),
    )


def stall_cause(scores: StallScores) -> StallCause | None:
    """The cause for which a model no longer improves; None if it does, or if it is as good as it can be."""
    if scores.gain(scores.best_before, scores.best) > _MAX_EQUAL_GAIN:
        return None
    return next((cause for cause in _CAUSES if cause.applies(scores)), None)
