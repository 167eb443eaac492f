"""Corrections of a board's predictions, learnt from the times and memory that its own rounds took."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedprune.planning.costs import MemoryBreakdown
from fedprune.planning.prediction import Prediction

# How far a time that a board reports may correct a predicted one: beyond that something else is wrong, unless the
# server's own clock bears it out.
TIME_CORRECTION_BOUNDS = 0.2, 5.0

# How many times more or less a board's steps may take by one source than by another before it is named: profiles'
# efficiency is an estimate, and off by less on all boards that were measured.
MAX_CLAIM_FACTOR = 10.0

# Limits of the correction of memory, which a faulty measurement must not turn into a plan that ends the process.
# The first: the smallest corrected prediction, as a share of the uncorrected one.
# The second: the largest measurement that counts, as a multiple of the prediction or of the board's memory, whichever
# is more.
MEMORY_CORRECTION_BOUNDS = 0.75, 2.0

# How far a measured time may be from the predicted one before a device is planned for again: plans that follow every
# measurement would change widths in every few rounds.
MAX_TIME_ERROR = 1.25

# The same for memory, where too much ends the process.
MAX_MEMORY_ERROR = 1.1


@dataclass(frozen=True)
class Correction:
    """Corrections of a board's predictions, learnt from its own rounds.

    Attributes:
        step: Measured over predicted time of a training step; `latency` the same of a prediction.
        memory: Measured minus uncorrected predicted peak memory, in bytes, of the latest round that stayed within the
            board's memory.
        memory_at: Predicted graph, weights and activations of that round; 0 before the first.
        overrun: The same difference for the round with the smallest prediction that took more than the board's memory.
        overrun_at: Predicted graph, weights and activations of that round; 0 before the first.
    """

    step: float = 1.0
    latency: float = 1.0
    memory: float = 0.0
    memory_at: float = 0.0
    overrun: float = 0.0
    overrun_at: float = 0.0

    def corrected_by(
        self,
        prediction: Prediction,
        applied: Correction,
        measured: Mapping[str, float],
        capacity: float = math.inf,
        clocked_step_s: float = math.inf,
    ) -> Correction:
        """The correction after another round, whose prediction had the correction `applied`.

        Args:
            measured: `step_seconds`, `latency_seconds` and `peak_memory_bytes`, as far as the board measured them.
            capacity: Bytes of memory that training may take.
            clocked_step_s: The most that a step took by the server's clock, in seconds: the round's time over its
                steps. No step takes longer, whatever the board, its probe and its profile say.
        """
        low, high = TIME_CORRECTION_BOUNDS
        correction = self
        times = (("step", prediction.step_s, clocked_step_s), ("latency", prediction.latency_s, math.inf))
        for name, predicted, clocked_s in times:
            seconds = measured.get(f"{name}_seconds", 0.0)
            if predicted > 0 and (seconds > 0 or math.isfinite(clocked_s)):
                unit = getattr(applied, name) / predicted
                reported = max(low, seconds * unit) if seconds > 0 else 1.0
                factor = min(reported, clocked_s * unit if math.isfinite(clocked_s) else high)
                correction = replace(correction, **{name: factor})
        peak = measured.get("peak_memory_bytes", 0.0)
        return correction._corrected_by_peak(prediction.memory, peak, capacity) if peak > 0 else correction

    def _corrected_by_peak(self, memory: MemoryBreakdown, peak: float, capacity: float) -> Correction:
        low, high = MEMORY_CORRECTION_BOUNDS
        predicted, memory_at = memory.uncorrected, float(memory.of_width)
        bound = high * (max(predicted, capacity) if math.isfinite(capacity) else predicted)
        excess = min(bound, max(low * predicted, peak)) - predicted
        with_round = replace(self, memory=excess, memory_at=memory_at)
        if peak <= capacity:
            return with_round if memory_at < self.overrun_at else replace(with_round, overrun=0.0, overrun_at=0.0)
        # A larger plan than the smallest that is known to overrun tells nothing new.
        if 0 < self.overrun_at < memory_at:
            return self
        smaller_has_fitted = 0 < self.memory_at < memory_at
        return replace(self if smaller_has_fitted else with_round, overrun=excess, overrun_at=memory_at)

    @property
    def doubt(self) -> str:
        """How far the board's rounds are from what it measured of itself or its profile promises; empty if near."""
        return doubt_text(self.step, "its rounds show", "predicted by its own measurements, or its profile without any")

    def without_times(self) -> Correction:
        """The correction of memory only."""
        return replace(self, step=1.0, latency=1.0)

    def memory_beyond(self, memory: MemoryBreakdown) -> int:
        """Bytes that a round is expected to take beyond an uncorrected prediction. After rounds of one width this is a
        constant. Once one plan has taken more than the board's memory and a smaller one has not, it is interpolated
        linearly between the two, so that every plan at least as large as the first is predicted to take too much."""
        excess = self.memory
        if 0 < self.memory_at < self.overrun_at:
            slope = (self.overrun - self.memory) / (self.overrun_at - self.memory_at)
            # Bytes that depend on the width are all that differs between plans of one board.
            excess += slope * (memory.of_width - self.memory_at)
        return math.ceil(max(excess, (MEMORY_CORRECTION_BOUNDS[0] - 1) * memory.uncorrected))

    def differs_from(self, earlier: Correction, prediction: Prediction) -> bool:
        """Whether a plan that was made with an earlier correction is out of date, because predictions differ much."""
        time_ratios = (self.step / earlier.step, self.latency / earlier.latency)
        memory = prediction.memory
        memory_ratio = (memory.uncorrected + self.memory_beyond(memory)) / memory.total
        return (
            not all(1 / MAX_TIME_ERROR < t < MAX_TIME_ERROR for t in time_ratios)
            or not 1 / MAX_MEMORY_ERROR < memory_ratio < MAX_MEMORY_ERROR
        )


# Nothing was measured yet.
NO_CORRECTION = Correction()


def doubt_text(factor: float, source: str, other_source: str) -> str:
    """A clause on steps that take `factor` times as long by one source as by another; empty if they are near."""
    if 1 / MAX_CLAIM_FACTOR <= factor <= MAX_CLAIM_FACTOR:
        return ""
    return f"{source} that its steps take {factor:.2g} times as long as {other_source}"
