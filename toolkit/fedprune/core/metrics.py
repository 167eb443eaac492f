"""Metrics that devices report: which of them count, and which limits they must keep."""

from __future__ import annotations

import math
from collections.abc import Mapping

TRAINED, AVERAGED = "after", "average"
"""Endings of `accuracy_...` and `loss_...`: measured on the device's own test samples, with the model that it has just
trained, or with its own average of models where it keeps one."""

MAX_LOSS = 1e6
"""The largest loss, of either sign, that counts as a measurement."""

_LIMITS = {"accuracy": (0.0, 1.0), "loss": (-MAX_LOSS, MAX_LOSS)}


def served(metrics: Mapping[str, float], kind: str) -> float | None:
    """The measure (`accuracy` or `loss`) on the device's test samples of the model that it serves; None where it wasn't
    measured.

    That is the average where the device keeps one, else what it trained.
    """
    return metrics.get(f"{kind}_{AVERAGED}", metrics.get(f"{kind}_{TRAINED}"))


def believable(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are finite, with `accuracy...` from 0 to 1 and `loss...` within `MAX_LOSS`.

    Densities and the end of training depend on them, so that impossible ones must not count.
    """
    found = {}
    for name, value in metrics.items():
        low, high = _LIMITS.get(name.split("_")[0], (-math.inf, math.inf))
        if math.isfinite(value) and low <= value <= high:
            found[name] = value
    return found
