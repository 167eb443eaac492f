"""A finished round's scores by one metric: the new global model's, and the boards' before and after training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedprune.core.metrics import TRAINED_SUFFIX


@dataclass(frozen=True)
class RoundScores:
    """A round's scores by one metric; NaN where nothing was measured.

    Attributes:
        global_model: The new global model's score on the server's samples.
        received: The mean score of the models that boards received, each on its board's own test samples.
        trained: The mean score of the models that the same boards made of these by training.
    """

    global_model: float
    received: float
    trained: float


def round_scores(entry: Mapping[str, Any], metric: str) -> RoundScores:
    """The scores of a round in a job's history, by the metric of this name."""
    # "folded": added to the round's sum of updates.
    folded = [device.get("metrics", {}) for device in entry["devices"].values() if device["progress"] == "folded"]
    before, after = f"{metric}_before", f"{metric}_{TRAINED_SUFFIX}"
    # Means over the same boards, so that their difference is what training changed.
    pairs = [(m[before], m[after]) for m in folded if before in m and after in m] or [(math.nan, math.nan)]
    received, trained = (math.fsum(scores) / len(pairs) for scores in zip(*pairs, strict=True))
    return RoundScores(entry["metrics"].get(metric, math.nan), received, trained)
