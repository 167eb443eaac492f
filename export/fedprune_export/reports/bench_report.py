"""Report of a benchmark: what was measured of a bundle, next to what the planner predicts for a board."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fedprune.core.text import amount
from fedprune.output.document import Table
from fedprune.output.tables import Column
from fedprune.planning.cost_prediction import predict
from fedprune.planning.probe_report import ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.runtime.bundle import Bundle
from fedprune_export.profiling.benchmark import PREDICTION, STEP, Measurement

_COLUMNS = (
    Column("what"),
    Column("batch", right=True),
    Column("threads", right=True, drop=1),
    Column("median", right=True),
    Column("quartiles", drop=3),
    Column("per sample", right=True, drop=2),
    Column("peak memory", right=True),
)


@dataclass(frozen=True)
class Benchmark:
    """Measurements of a bundle on this machine. `probe`: what that board measured of itself, if it did."""

    bundle: Bundle
    measured: tuple[Measurement, ...]
    profile: HardwareProfile | None = None
    probe: ProbeReport | None = None

    def predicted(self, m: Measurement) -> tuple[float | None, float | None]:
        """Seconds and peak bytes that the planner predicts; None for what it doesn't look at.

        The planner predicts float32 alone, and predictions of one sample.
        """
        if self.profile is None or m.what not in (STEP, PREDICTION):
            return None, None
        bundle = self.bundle
        recipe = replace(bundle.recipe, batch_size=m.batch, accumulate=1)
        widths = bundle.selection.widths
        found = predict(bundle.architecture, widths, self.profile, recipe, m.batch, probe=self.probe)
        if m.what == STEP:
            return found.step_s, found.memory_bytes
        return (found.latency_s, found.inference_bytes) if m.batch == 1 else (None, None)

    def to_dict(self) -> dict[str, Any]:
        rows = [m.to_dict() for m in self.measured]
        if self.profile is not None:
            for row, m in zip(rows, self.measured, strict=True):
                row["predicted"] = dict(zip(("seconds", "peak_bytes"), self.predicted(m), strict=True))
        return {
            "bundle": str(self.bundle.folder),
            "model": self.bundle.architecture.name,
            "widths": list(self.bundle.selection.widths),
            "target": self.profile.name if self.profile is not None else None,
            "measured": rows,
        }

    def table(self) -> Table:
        columns = list(_COLUMNS)
        if self.profile is not None:
            columns += [Column(f"predicted for {self.profile.name}", right=True, wrap=16)]
            columns += [Column("its memory", right=True)]
        return Table(columns, [self._row(m) for m in self.measured])

    def _row(self, m: Measurement) -> tuple[str, ...]:
        low, median, high = (amount(s, "s") for s in m.quartiles)
        each, peak = amount(m.seconds / m.batch, "s"), amount(m.peak_bytes, "bytes")
        row = (m.what, str(m.batch), str(m.threads), median, f"{low} to {high}", each, peak)
        if self.profile is None:
            return row
        units = zip(self.predicted(m), ("s", "bytes"), strict=True)
        return (*row, *("–" if value is None else amount(value, unit) for value, unit in units))
