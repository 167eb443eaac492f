"""Makes the details that operators ask for: of one device, of its crashes, and of the channels that the fleet holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fedprune.core.errors import BundleError, StorageError
from fedprune.core.text import one_line
from fedprune.core.validation import is_whole
from fedprune.jobs.state import outcome
from fedprune.model.selection import Selection
from fedprune.wire.messages import MAX_WARNING_TEXT
from fedprune_server.devices.crash_store import (
    MAX_CRASHES_PER_BOARD,
    BoardCrash,
    frames_of,
    read_crashes,
    read_warnings,
)
from fedprune_server.devices.plan_vs_actual import QUANTITIES, compare_device, predicted_figures
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.web.state.records import BoardCrashes, ChannelCoverage, DeviceDetails
from fedprune_server.web.state.rows import number_or_none

MAX_GROUPS = 2000
# Limits on what one request of the console may cost the server's loop: channels of a model, and bytes of a ranking.
# Beyond them a device's page shows how many channels the device holds, and not which.
MAX_CHANNELS = 65_536
MAX_RANKING_BYTES = 4 << 20

_MAX_FRAMES = 16  # innermost frames of a crash that are shown: a deep recursion has hundreds
_MAX_ROWS = 20  # latest rounds of a device that are shown
_MAX_ROUNDS = 60  # latest rounds of the job that are searched for them


class _Figure(NamedTuple):
    """A figure of the page: its unit, the fields of the planner's prediction that add up to it, and a board's metric.

    A figure without a metric can't be measured on a board.
    """

    unit: str
    predicted_fields: tuple[str, ...]
    metric: str = ""


_FIGURES = {
    "round": _Figure("s", ("train_s", "transfer_s")), "step": _Figure("s", ("step_s",), "step_seconds"),
    "train": _Figure("s", ("train_s",), "train_seconds"), "transfer": _Figure("s", ("transfer_s",)),
    "latency": _Figure("s", ("latency_s",), "latency_seconds"),
    "memory": _Figure("bytes", ("memory_bytes",), "peak_memory_bytes"),
    "serving_memory": _Figure("bytes", ("inference_bytes",)), "storage": _Figure("bytes", ("storage_bytes",)),
    "download": _Figure("bytes", ("down_bytes",)), "upload": _Figure("bytes", ("up_bytes",)),
    "step_energy": _Figure("J", ("step_j",)), "round_energy": _Figure("J", ("train_j",)),
    "latency_energy": _Figure("J", ("latency_j",)),
}  # fmt: skip


def device_details(runner: JobRunner, name: str, unix_now: float) -> DeviceDetails:
    """A device's plan, predictions and measurements, latest rounds, and channels."""
    device = runner.state.devices.get(name)
    plan_row: dict[str, Any] | None = None
    if device is not None and device.plan is not None:
        limits = {str(x["name"]): x for x in device.plan["limits"]}
        plan_row = {"density": device.plan["density"], "binding": device.plan["bound"], "limits": limits}
    elif device is not None and device.widths:
        # Without a plan the job or the strategy has fixed the widths.
        binding = "job" if device.density == runner.job.density else "strategy"
        plan_row = {"density": device.density, "binding": binding, "limits": {}}
    summaries = [s for s in reversed(runner.state.history[-_MAX_ROUNDS:]) if name in s["devices"]][:_MAX_ROWS]
    history = tuple(_history_row(summary, summary["devices"][name]) for summary in summaries)
    figures, channels = device_figures(runner, name), kept_channels(runner, name)
    return DeviceDetails(name, runner.job.name, plan_row, figures, history, channels, unix_now)


def _history_row(summary: Mapping[str, Any], device_part: Mapping[str, Any]) -> dict[str, Any]:
    """A device's part in a finished round."""
    return {
        "round": summary["round"], "at": summary["at"],
        "progress": outcome(device_part["progress"], device_part.get("kind", "")),
        "density": min(1.0, max(0.0, float(device_part["density"]))), "samples": device_part["samples"],
        "metrics": device_part["metrics"], "reason": one_line(device_part["reason"], 300),
    }  # fmt: skip


def device_figures(runner: JobRunner, name: str) -> tuple[dict[str, Any], ...]:
    """Predictions for a device's rounds next to its measurements at the same widths, where either is known."""
    device = runner.state.devices.get(name)
    prediction = {} if device is None else predicted_figures(name, device, runner.job, runner.architecture) or {}
    comparison = compare_device(name, runner.state, prediction)
    metrics = {m: number_or_none(comparison[m][1], 0.0, 1e15) for m in QUANTITIES if m in comparison}
    metrics["train_seconds"] = number_or_none(_last_metrics(runner, name).get("train_seconds"), 0.0, 1e15)
    rows = []
    for figure_name, figure in _FIGURES.items():
        components = [number_or_none(prediction.get(f), 0.0, 1e15) for f in figure.predicted_fields]
        predicted = None if None in components else sum(p for p in components if p is not None)
        measured = metrics.get(figure.metric)
        if figure_name == "round":
            measured = number_or_none(runner.registry[name].part_seconds, 0.0, 1e15)
        if predicted is not None or measured is not None:
            rows.append({"what": figure_name, "unit": figure.unit, "predicted": predicted, "measured": measured})
    return tuple(rows)


def kept_channels(runner: JobRunner, name: str) -> tuple[dict[str, Any], ...]:
    """How many channels of each group a device holds and, if its ranking is stored here, which ones, as bits in hex."""
    device, task = runner.state.devices.get(name), runner.state.tasks.get(name)
    if device is None or not device.widths:
        return ()
    # The ranking that the device's channels were taken from, and the widths: of its offer if any, or of the round.
    offer = (task.offer if task is not None else None) or device.held or {}
    ranking, widths = offer.get("ranking"), offer.get("widths") or (device.widths if task is None else task.widths)
    if not isinstance(ranking, str):
        ranking, widths = runner.state.ranking, device.widths
    ranks = _read_ranks(runner, ranking)
    rows = []
    for i, (group, width) in enumerate(zip(runner.architecture.groups[:MAX_GROUPS], widths, strict=False)):
        kept_width = min(width, group.size)
        channel_bits = None
        if ranks is not None:
            bits = np.zeros(group.size, np.bool_)
            bits[ranks[i][:kept_width]] = True
            channel_bits = np.packbits(bits).tobytes().hex()
        rows.append({"group": one_line(group.name, 190), "kept": kept_width, "of": group.size, "which": channel_bits})
    return tuple(rows)


def job_coverage(runner: JobRunner, unix_now: float) -> ChannelCoverage:
    """For each run of channels (by rank), the share of devices that hold it, among devices with a submodel.

    A submodel has the channels of the highest ranks, so that widths alone give the shares.
    """
    widths = [t.widths for t in runner.state.tasks.values() if t.widths]
    widths = widths or [d.widths for d in runner.state.devices.values() if d.widths]
    groups = []
    for i, group in enumerate(runner.architecture.groups[:MAX_GROUPS]):
        counts = Counter(min(w[i], group.size) for w in widths)
        shares, remaining_devices, first_channel = [], len(widths), 0
        for width in sorted(counts):
            if width > first_channel:
                shares.append({"channels": width - first_channel, "share": remaining_devices / len(widths)})
                first_channel = width
            remaining_devices -= counts[width]
        if first_channel < group.size:
            shares.append({"channels": group.size - first_channel, "share": 0.0})
        groups.append({"name": one_line(group.name, 190), "channels": group.size, "held": shares})
    return ChannelCoverage(runner.job.name, runner.state.round, tuple(groups), unix_now)


def _last_metrics(runner: JobRunner, name: str) -> dict[str, Any]:
    """Metrics of the latest aggregated update with the device's current widths."""
    device = runner.state.devices.get(name)
    widths = [] if device is None else list(device.widths)
    for summary in reversed(runner.state.history[-_MAX_ROUNDS:]):
        device_part = summary["devices"].get(name)
        if device_part is not None and device_part["progress"] == "folded" and device_part.get("widths") == widths:
            return dict(device_part["metrics"])
    return {}


def _read_ranks(runner: JobRunner, ranking: str | None) -> tuple[Any, ...] | None:
    """Channels of each group, best first; None if the ranking is not stored here or too large."""
    if ranking is None or sum(runner.architecture.sizes) > MAX_CHANNELS:
        return None
    try:
        if not runner.store.has(ranking) or runner.store.size(ranking) > MAX_RANKING_BYTES:
            return None
        return Selection.from_json(runner.store.read(ranking), runner.architecture).ranks
    except (BundleError, StorageError):  # deleted meanwhile, or of another architecture
        return None


def board_crashes(folder: Path, device: str) -> BoardCrashes:
    """A board's latest crashes and warnings in a state folder; none if they can't be read, which `doctor` reports."""
    try:
        crashes = read_crashes(folder, device, limit=MAX_CRASHES_PER_BOARD)[::-1]
        warnings = read_warnings(folder, device)[::-1]
    except StorageError:
        crashes, warnings = [], []
    return BoardCrashes(
        device,
        tuple(map(_crash_row, crashes)),
        tuple({"at": max(0.0, w["at"]), "text": one_line(w["text"], MAX_WARNING_TEXT)} for w in warnings),
    )


def _crash_row(crash: BoardCrash) -> dict[str, Any]:
    body = crash.body
    return {
        "at": max(0.0, crash.at),
        "received": max(0.0, crash.received),
        "cause": one_line(str(body.get("cause", "")), 64),
        "text": one_line(crash.text, 1000),
        "release": one_line(str(body.get("release", "")), 150),
        "slot": one_line(str(body.get("slot", "")), 64),
        "uptime_s": number_or_none(body.get("uptime_s"), 0.0, 1e12),
        "temperature_c": number_or_none(body.get("temperature_c"), -100.0, 300.0),
        **{k: value if is_whole(value := body.get(k)) else None for k in ("memory_available", "memory_total")},
        "frames": tuple(one_line(f, 290) for f in frames_of(crash)[:_MAX_FRAMES]),
    }
