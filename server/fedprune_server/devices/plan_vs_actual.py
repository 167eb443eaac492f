"""Compares the predictions for a device's rounds with its measurements."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.coordination import State
from fedprune.coordination.round_prediction import predict_round
from fedprune.core.errors import FedpruneError
from fedprune.core.text import amount
from fedprune.core.validation import is_number
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice, Progress
from fedprune.model.architecture import Architecture
from fedprune.planning.cost_prediction import training_unit
from fedprune.planning.probe_report import CPU, ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.planning.width_plan import WidthPlan
from fedprune.strategies import compose

# By metric of an update: its name in texts, the attribute of a plan's prediction, and the unit of both.
QUANTITIES: dict[str, tuple[str, str, str]] = {
    "step_seconds": ("step", "step_s", "s"),
    "latency_seconds": ("prediction", "latency_s", "s"),
    "peak_memory_bytes": ("memory", "memory_bytes", "bytes"),
}

# By metric: the predicted and the measured value, of which one may be missing.
RoundComparison = Mapping[str, tuple[float | None, float | None]]


def compare_device(name: str, state: State | None, predicted: Mapping[str, Any] | None) -> RoundComparison:
    """A device's predictions beside its latest measurements at the same widths."""
    measured = _measured_figures(name, state)
    pairs = {m: (_figure(predicted, figure), _figure(measured, m)) for m, (_, figure, _) in QUANTITIES.items()}
    return {m: pair for m, pair in pairs.items() if pair != (None, None)}


@dataclass(frozen=True)
class LatestComparison:
    """A device's latest measurements beside its predictions as rounds have corrected them, by its plan."""

    corrected: RoundComparison
    plan: Mapping[str, Any] | None = None

    def text(self, metrics: Collection[str]) -> str:
        """Some of the measurements, with the predictions that `status` shows beside them."""
        # Only here, since reading a plan takes too long to be done for every board of a large fleet.
        figures = None if self.plan is None else planned_figures(self.plan)
        rows = {m: (_figure(figures, QUANTITIES[m][1]), self.corrected[m][1]) for m in metrics}
        return comparison_text(rows, self.corrected)


def compare_latest(state: State) -> dict[str, LatestComparison]:
    """Comparisons for the devices that counted in the latest round; empty for a device whose widths have changed."""
    comparisons: dict[str, LatestComparison] = {}
    for name, device_summary in state.history[-1]["devices"].items() if state.history else ():
        device = state.devices.get(name)
        if device is None or device_summary["progress"] != Progress.FOLDED.value:
            continue  # a device whose update didn't count has measured nothing in this round
        is_unchanged = device.plan is not None and device_summary.get("widths") == list(device.widths)
        rows = compare_device(name, state, (device.plan or {}).get("prediction")) if is_unchanged else {}
        comparisons[name] = LatestComparison(rows, device.plan)
    return comparisons


def planned_figures(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan's predictions before the first round: later ones are corrected by measurements, and agree with them."""
    return vars(WidthPlan.from_dict(plan).before_rounds)


def predicted_figures(name: str, device: JobDevice, job: Job, architecture: Architecture) -> Mapping[str, Any] | None:
    """Predictions for a device before its first round: those of its plan, or those at the job's widths."""
    if device.plan is not None:
        return planned_figures(device.plan)
    if not device.widths:
        return None
    try:
        position = (device.widths, device.density, device.samples)
        return vars(predict_round(job, compose(job), architecture, name, device, *position))
    except FedpruneError:
        return None


def training_processor(device: JobDevice) -> str:
    """The processor on which a device trains by its probe or profile, `GPU` or `CPU`; empty if neither can be read."""
    try:
        probe = None if device.probe is None else ProbeReport.from_dict(device.probe)
        return "CPU" if training_unit(HardwareProfile.from_dict(device.profile), probe) == CPU else "GPU"
    except FedpruneError:
        return ""


def comparison_text(rows: RoundComparison, corrected: RoundComparison) -> str:
    """A text of measurements with their predictions before the first round and, where they differ, corrected since."""
    phrases = []
    for metric, (predicted_value, measured_value) in rows.items():
        if measured_value is None:
            continue
        title, _, unit = QUANTITIES[metric]
        remarks = [] if predicted_value is None else [f"predicted {amount(predicted_value, unit)}"]
        if (corrected_value := corrected[metric][0]) is not None and corrected_value != predicted_value:
            remarks.append(f"{amount(corrected_value, unit)} since the rounds measured it")
        phrases.append(f"{title} {amount(measured_value, unit)}" + (f" ({', '.join(remarks)})" if remarks else ""))
    return ", ".join(phrases)


def comparison_rows(rows: Sequence[tuple[str, RoundComparison]]) -> list[tuple[str, ...]]:
    """Comparisons as rows of a report's table; the first row is the header."""
    names = [f"{title} {kind}" for title, *_ in QUANTITIES.values() for kind in ("predicted", "measured", "off by")]
    table_rows: list[tuple[str, ...]] = [("device", *names)]
    for name, comparison in rows:
        cells = [name]
        for metric, (_, _, unit) in QUANTITIES.items():
            predicted_value, measured_value = comparison.get(metric, (None, None))
            cells += ["–" if value is None else amount(value, unit) for value in (predicted_value, measured_value)]
            cells.append(
                f"{predicted_value / measured_value - 1:+.0%}"
                if predicted_value is not None and measured_value
                else "–"
            )
        table_rows.append(tuple(cells))
    return table_rows


def _measured_figures(name: str, state: State | None) -> Mapping[str, Any]:
    """Metrics of a device's latest update at its present widths."""
    if state is None or name not in state.devices:
        return {}
    widths = list(state.devices[name].widths)
    for row in reversed(state.history):
        summary = row["devices"].get(name)
        if summary is not None and summary["progress"] == "folded" and summary.get("widths") == widths:
            metrics: Mapping[str, Any] = summary["metrics"]
            return metrics
    return {}


def _figure(values: Mapping[str, Any] | None, name: str) -> float | None:
    value = (values or {}).get(name)
    return float(value) if is_number(value) else None
