"""The machine of a run: its unit, the time that is left, and what it lacks."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec

from benchmarks.harness import in_turns, ratio
from fedprune.planning.probe_report import CPU, CUDA

WARM_UP = 5


@dataclass
class Machine:
    """Where all parts run. `dry` runs are as small as they can be, on the processor.

    `end` is a time of `time.monotonic`; `skipped` names what was left out, with the reason.
    """

    dry: bool
    end: float
    skipped: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """`cuda`, or `cpu` for a dry run."""
        return CPU if self.dry else CUDA

    def seconds_left(self) -> float:
        return max(0.0, self.end - time.monotonic())

    def skip(self, name: str, reason: str) -> None:
        self.skipped.append(f"{name} ({reason})")

    def has_modules(self, name: str, *modules: str) -> bool:
        """Whether all these modules are installed; if not, what has this name is skipped."""
        lacking = [module for module in modules if find_spec(module) is None]
        if lacking:
            self.skip(name, f"not installed: {', '.join(lacking)}")
        return not lacking

    def in_time(self, names: Iterable[str], seconds: float) -> Iterable[str]:
        """The names, until fewer than so many seconds are left; the others are skipped."""
        for name in names:
            if self.seconds_left() < seconds:
                self.skip(name, "no time left")
            else:
                yield name


def timings(runs: Mapping[str, Callable[[], object]], turns: int, base: str) -> dict[str, dict[str, float]]:
    """Of functions that run in turn the median milliseconds (`ms`), and medians of the ratios to the base's within a
    turn (`ratio`)."""
    seconds = in_turns(runs, turns, WARM_UP, time.perf_counter)
    return {
        "ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        "ratio": {name: ratio(times, seconds[base]) for name, times in seconds.items() if name != base},
    }


def card() -> dict[str, str]:
    """Name, driver and CUDA of the card."""
    import torch

    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    output = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    name, driver = output.splitlines()[0].split(", ")
    return {"card": name, "driver": driver, "cuda": str(torch.version.cuda)}
