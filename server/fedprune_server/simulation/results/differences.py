"""Differences between runs: paired over seeds, with intervals, and of each board from training alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from fedprune.core.metrics import Metric
from fedprune_server.simulation.results.record import Record

_STUDENT_QUANTILES = (12.7062, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139)


def standard_error(differences: Sequence[float]) -> float:
    return statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0


def half_interval(differences: Sequence[float]) -> float | None:
    """Half of the 95 % interval of the mean by Student's t; None for fewer than two differences."""
    return student_quantile(len(differences) - 1) * standard_error(differences) if len(differences) > 1 else None


def difference_text(differences: Sequence[float]) -> str | None:
    """The mean of differences ± half of its 95 % interval; None without differences."""
    if not differences:
        return None
    half = half_interval(differences)
    return _signed(statistics.fmean(differences), ".1f") + ("" if half is None else f" ± {half:.1f}")


def score_difference_text(metric: Metric, mean: float) -> str:
    """A difference of scores: of shares in points."""
    return _signed(100 * mean, ".1f") if metric.is_share else _signed(mean, ".3g")


def _signed(number: float, form: str) -> str:
    return f"{number:+{form}}".replace("-", "−")


def student_quantile(degrees: int) -> float:
    """The 0.975 quantile of Student's t: tabulated, and for more degrees of freedom the series in 1 / ν of Abramowitz
    and Stegun, 26.7.5, which is right to five digits there."""
    if degrees <= len(_STUDENT_QUANTILES):
        return _STUDENT_QUANTILES[degrees - 1]
    return 1.959964 + 2.372272 / degrees + 2.822500 / degrees**2 + 2.555851 / degrees**3 + 1.589536 / degrees**4


def board_gains(run: Record, runs: Iterable[Record]) -> dict[str, float]:
    """By how much each board's served model is better than if the board trains alone, in the run of `local` with the
    same seed; empty without such a run, and for that run itself."""
    alone: dict[str, float] = next((r.latest for r in runs if r.seed == run.seed and r.is_alone), {})
    sign = 1 if run.metric.higher_is_better else -1
    return {} if run.is_alone else {k: sign * (v - alone[k]) for k, v in run.latest.items() if k in alone}
