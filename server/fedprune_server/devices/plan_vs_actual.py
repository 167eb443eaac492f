"""Predictions for a device's rounds next to its measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedprune.coordination import State
from fedprune.coordination.width_planner import predict_round
from fedprune.core.errors import FedpruneError
from fedprune.core.text import amount
from fedprune.core.validation import is_number
from fedprune.jobs.job import Job
from fedprune.jobs.state import Device, Progress
from fedprune.model.architecture import Architecture
from fedprune.planning.cost_prediction import trains_on
from fedprune.planning.plan import Plan
from fedprune.planning.probe_report import CPU, ProbeReport
from fedprune.planning.profile import HardwareProfile
from fedprune.strategies import compose

QUANTITIES: dict[str, tuple[str, str, str]] = {
    "step_seconds": ("step", "step_s", "s"),
    "latency_seconds": ("prediction", "latency_s", "s"),
    "peak_memory_bytes": ("memory", "memory_bytes", "bytes"),
}
"""Per metric of an update its name for people, the figure of a plan's prediction, and the unit of both."""

Compared = dict[str, tuple[float | None, float | None]]
"""Per metric what was predicted and what was measured, as far as there is either."""


def compared(name: str, state: State | None, predicted: Mapping[str, Any] | None) -> Compared:
    """A device's predictions and its latest measurements at the same widths."""
    measured = _measured(name, state)
    rows = {m: (_number(predicted, figure), _number(measured, m)) for m, (_, figure, _) in QUANTITIES.items()}
    return {m: pair for m, pair in rows.items() if pair != (None, None)}


def compare_latest(state: State) -> dict[str, Compared]:
    """Predictions and measurements of the devices that counted in the latest round; nothing for one that has another
    plan by now."""
    comparisons: dict[str, Compared] = {}
    for name, part in state.history[-1]["devices"].items() if state.history else ():
        device = state.devices.get(name)
        if device is None or part["progress"] != Progress.FOLDED.value:
            continue  # it has measured nothing in this round
        is_present = device.plan is not None and part.get("widths") == list(device.widths)
        comparisons[name] = compared(name, state, (device.plan or {}).get("prediction")) if is_present else {}
    return comparisons


def planned(plan: Mapping[str, Any]) -> Mapping[str, Any]:
    """A plan's figures without corrections by measurements, which would always agree with them."""
    return vars(Plan.from_dict(plan).before_rounds)


def predicted(name: str, device: Device, job: Job, architecture: Architecture) -> Mapping[str, Any] | None:
    """Predicted cost of a device's rounds before any of them: by its plan, or at the job's widths."""
    if device.plan is not None:
        return planned(device.plan)
    if not device.widths:
        return None
    try:
        held = (device.widths, device.density, device.samples)
        return vars(predict_round(job, compose(job), architecture, name, device, *held))
    except FedpruneError:
        return None


def unit(device: Device) -> str:
    """The processor on which a device trains by its probe or profile, `GPU` or `CPU`; empty if neither can be read."""
    try:
        probe = None if device.probe is None else ProbeReport.from_dict(device.probe)
        return "CPU" if trains_on(HardwareProfile.from_dict(device.profile), probe) == CPU else "GPU"
    except FedpruneError:
        return ""


def described(rows: Compared, corrected: Compared) -> str:
    """Measurements with their predictions before the first round and, where these differ, as `corrected` since."""
    parts = []
    for metric, (expected, seen) in rows.items():
        if seen is None:
            continue
        title, _, unit = QUANTITIES[metric]
        told = [] if expected is None else [f"predicted {amount(expected, unit)}"]
        if (since := corrected[metric][0]) is not None and since != expected:
            told.append(f"{amount(since, unit)} since the rounds measured it")
        parts.append(f"{title} {amount(seen, unit)}" + (f" ({', '.join(told)})" if told else ""))
    return ", ".join(parts)


def table(rows: Sequence[tuple[str, Compared]]) -> list[tuple[str, ...]]:
    """Comparisons as rows of a report; the first is the header."""
    names = [f"{title} {word}" for title, *_ in QUANTITIES.values() for word in ("predicted", "measured", "off by")]
    out: list[tuple[str, ...]] = [("device", *names)]
    for name, pairs in rows:
        cells = [name]
        for metric, (_, _, unit) in QUANTITIES.items():
            expected, seen = pairs.get(metric, (None, None))
            cells += ["–" if v is None else amount(v, unit) for v in (expected, seen)]
            cells.append(f"{expected / seen - 1:+.0%}" if expected is not None and seen else "–")
        out.append(tuple(cells))
    return out


def _measured(name: str, state: State | None) -> Mapping[str, Any]:
    """Metrics of a device's latest update at its present widths."""
    if state is None or name not in state.devices:
        return {}
    widths = list(state.devices[name].widths)
    for row in reversed(state.history):
        part = row["devices"].get(name)
        if part is not None and part["progress"] == "folded" and part.get("widths") == widths:
            metrics: Mapping[str, Any] = part["metrics"]
            return metrics
    return {}


def _number(values: Mapping[str, Any] | None, name: str) -> float | None:
    value = (values or {}).get(name)
    return float(value) if is_number(value) else None
