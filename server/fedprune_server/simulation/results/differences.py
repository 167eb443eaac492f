"""Differences between runs: paired over seeds, with intervals, and of each board from training alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from fedprune.core.metrics import Metric
from fedprune_server.simulation.results.record import Record

ALONE = "local"  # the strategy with which every board trains alone


def paired_differences(values: Mapping[int, float | None], others: Mapping[int, float | None]) -> list[float]:
    """Differences of values by seed, of the seeds that both have."""
    pairs = ((value, others.get(seed)) for seed, value in values.items())
    return [a - b for a, b in pairs if a is not None and b is not None]


def standard_error(differences: Sequence[float]) -> float:
    return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def half_interval(differences: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean by Student's t; None for fewer than two differences."""
    return student_quantile(len(differences) - 1) * standard_error(differences) if len(differences) > 1 else None


def difference_text(differences: Sequence[float]) -> str | None:
    """The mean of differences ± half of its 95 % interval; None without differences."""
    return _interval_text(statistics.fmean(differences), half_interval(differences)) if differences else None


def score_difference_text(metric: Metric, mean: float | None, half: float | None = None) -> str:
    """The same of scores: shares in points."""
    if mean is None:
        return "–"
    return _interval_text(mean, half, 100.0, ".1f") if metric.is_share else _interval_text(mean, half, 1.0, ".3g")


def _interval_text(mean: float, half: float | None, scale: float = 1.0, form: str = ".1f") -> str:
    interval = "" if half is None else f" ± {half * scale:{form}}"
    return f"{mean * scale:+{form}}{interval}".replace("-", "−")


def student_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t.

    With θ = atan(t / √ν), P(|T| < t) is a finite sum in sin θ and cos θ (Abramowitz and Stegun, 26.7.3 and 26.7.4).
    """
    is_odd, low, high = degrees % 2, 0.0, math.pi / 2
    for _ in range(60):  # until the halves are as fine as a float
        theta = (low + high) / 2
        term, total = math.cos(theta) ** is_odd, 0.0
        for k in range(is_odd, degrees - 1, 2):
            total += term
            term *= math.cos(theta) ** 2 * (k + 1) / (k + 2)
        inside = total * math.sin(theta)
        if is_odd:
            inside = (theta + inside) * 2 / math.pi
        low, high = (theta, high) if inside < 0.95 else (low, theta)
    return math.sqrt(degrees) * math.tan(low)


def board_gains(run: Record, runs: Iterable[Record]) -> dict[str, float]:
    """By how much each board's served model is better than that of the same board in the run of `local` with the same
    seed; empty without such a run."""
    alone = next((r.latest for r in runs if _strategy_and_seed(r) == (ALONE, _strategy_and_seed(run)[1])), {})
    sign = 1 if run.metric.higher_is_better else -1
    return {name: sign * (value - alone[name]) for name, value in run.latest.items() if name in alone}


def _strategy_and_seed(run: Record) -> tuple[str, int]:
    return run.job.get("strategy", ""), run.job.get("seed", 0)
