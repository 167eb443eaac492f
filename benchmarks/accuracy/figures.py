"""Figures of runs, and paired differences of rows, seed by seed."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from scipy.stats import t

from benchmarks.accuracy.protocol import FULL, Protocol

Run = dict[str, Any]
Value = Callable[[Run], "float | None"]


def figure(protocol: Protocol, run: Run, read: Callable[[dict[str, Any]], float | None], last: int = 0) -> float | None:
    """A run's figure: the mean over what the protocol reads, of the first `last` rounds (0: all).

    Shares are of the run's rounds; of simulated time where that ends the runs, so that the same times are read of all.
    """
    rounds = run["rounds"][: last or None]
    timed = bool(protocol.until_s)
    end = rounds[-1]["at"] if timed else rounds[-1]["round"]
    if timed and not last:
        end = max(end, protocol.until_s)  # a run that ended by itself stays what it was
    found = []
    for share in protocol.reads:
        # The last round at or before that share in which it was measured.
        upto = [r for r in rounds if (r["at"] <= share * end if timed else r["round"] <= round(share * end))]
        upto = upto or rounds[:1]
        value = next((v for v in map(read, reversed(upto)) if v is not None), None)
        if value is None:
            return None
        found.append(value)
    return statistics.fmean(found)


def own(metric: str) -> Callable[[dict[str, Any]], float | None]:
    """Reads the mean over devices of what they measured, in percent."""

    def read(row: dict[str, Any]) -> float | None:
        value = row["own"].get(metric, {}).get("mean")
        return None if value is None else 100 * value

    return read


def measured(name: str) -> Callable[[dict[str, Any]], float | None]:
    """Reads what was measured of the global model, in percent."""

    def read(row: dict[str, Any]) -> float | None:
        value = row["measured"].get(name)
        return None if value is None else 100 * value

    return read


def target_time(protocol: Protocol, run: Run) -> float | None:
    """Simulated seconds until the global model reached the target; infinity if it never did."""
    if not protocol.target:
        return None
    return next((r["at"] for r in run["rounds"] if r["measured"].get("global", 0) >= protocol.target), math.inf)


def served(protocol: Protocol, run: Run, last: int = 0) -> float | None:
    """Accuracy of the models that boards serve, on their own test data, in percent."""
    return figure(protocol, run, own(f"accuracy_{protocol.method(run['method']).serves}"), last)


def cost(run: Run, last: int = 0) -> tuple[float, float]:
    """Bytes of all devices, both ways, and multiplications of all training, in the first `last` rounds (0: all)."""
    end = run["rounds"][: last or None][-1]
    return float(end["down"] + end["up"]), float(end["macs"])


def share(runs: Sequence[Run], run: Run, which: int, last: int = 0) -> float | None:
    """A run's bytes (0) or multiplications (1), in percent of those of the full-width float32 row of its seed."""
    whole = of(runs, FULL, run["seed"])
    full = cost(whole[0])[which] if whole else 0.0
    return 100 * cost(run, last)[which] / full if full else None


def of(runs: Sequence[Run], method: str, seed: int) -> list[Run]:
    """The run of a row and a seed, if there is one."""
    return [r for r in runs if r["method"] == method and r["seed"] == seed]


def current(protocol: Protocol, runs: Sequence[Run]) -> list[Run]:
    """The runs that a page shows: of a row whose code or settings have changed, those that were made since, if any."""
    fresh = {r["method"] for r in runs if not r.get("stale")}
    shown = [r for r in runs if not r.get("stale") or r["method"] not in fresh]
    return [r for r in shown if any(m.name == r["method"] for m in protocol.methods)]


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences.

    Attributes:
        mean: Their mean.
        error: Its standard error; None of a single pair.
        pairs: How many there are.
    """

    mean: float
    error: float | None
    pairs: int

    @classmethod
    def of(cls, gaps: Sequence[float]) -> Difference | None:
        """Of single differences; None without any."""
        if not gaps:
            return None
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        return cls(statistics.fmean(gaps), error, len(gaps))

    @property
    def half(self) -> float | None:
        """Half of the 95 % interval by Student's t."""
        return None if self.error is None else float(t.ppf(0.975, self.pairs - 1)) * self.error

    def __str__(self) -> str:
        half = "" if self.half is None else f" ± {self.half:.1f}"
        return f"{self.mean:+.1f}{half}".replace("-", "−")


def paired(runs: Sequence[Run], method: str, other: str, value: Value) -> Difference | None:
    """The difference of two rows over the seeds in which both were run by the same code; None without any."""
    found = []
    for run in runs:
        partner = next((r for r in of(runs, other, run["seed"]) if _comparable(r, run)), None)
        if run["method"] == method and partner is not None:
            pair = value(run), value(partner)
            if pair[0] is not None and pair[1] is not None:
                found.append(pair[0] - pair[1])
    return Difference.of(found)


def _comparable(run: Run, other: Run) -> bool:
    """Whether two runs differ in nothing but their row: both are of the page's code, or of one commit and machine."""
    if run.get("stale") or other.get("stale"):
        return (run.get("code"), run.get("machine")) == (other.get("code"), other.get("machine"))
    return True


wrapped = partial(textwrap.wrap, width=118, break_long_words=False, break_on_hyphens=False)
"""A paragraph in lines."""
