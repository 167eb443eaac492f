"""Rows of devices and finished rounds, from what the coordinator, the registry and the identity know."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedprune.core.metrics import leading
from fedprune.core.text import one_line
from fedprune.core.validation import is_number
from fedprune.jobs.state import Device, Progress, State, Task, outcome
from fedprune.wire.fleet_messages import COMMITTED
from fedprune_server.monitoring.view import JobView
from fedprune_server.web.state.records import FinishedRound
from fedprune_server.web.state.surroundings import Member

_SLOT = re.compile(r"\bslot ([ab])\b(?: with release (\d{1,10})\b)?")
_VERSION = re.compile(r"([A-Za-z][A-Za-z0-9_.-]{0,39})[ /]v?(\d[A-Za-z0-9.+_-]{0,39})")
_MOST_VERSIONS = 8


def device_row(
    view: JobView,
    name: str,
    *,
    job: str | None,
    here: bool,
    member: Member,
    traffic: tuple[int, int],
    now: float | None,
    update: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A device's row.

    Args:
        view: The job that has the device, or had it last.
        job: That job's name, if the device takes part in it.
        here: Whether the device is connected, at whatever job.
        traffic: Bytes to it and from it, of all jobs.
        now: When it was last heard, in seconds since 1970.
        update: Its last report about the latest rollout's release.
    """
    state, contact = view.state, view.registry[name]
    device, task = state.devices.get(name), state.tasks.get(name)
    shown = view.registry.row(name, view.uploads.progress(name))
    status = member.status
    online = here or bool(device is not None and device.online)
    doing = shown.state if not (shown.state == "offline" and here) else "not at this job"
    held = view.quarantine.held(name)
    last_counted = 0 if device is None else device.last_counted_round
    ended = int(state.history[-1]["round"]) if state.history else 0  # no board is late in the current round yet
    excluded = contact.problem or (device.excluded if device is not None else "")
    slot, release = running(contact.software)
    if release is None and update is not None and update["state"] == COMMITTED:
        release = update["number"]
    # The probe of a board that is away need not be in memory, and what it measured at its start is over.
    probe = (device.probe if device is not None and device.online else None) or {}
    now_at = _state(
        state,
        device,
        task,
        here=here,
        training=contact.progress is not None,
        status=status,
        problem=contact.problem,
    )
    if device is None and now_at != "excluded":
        doing = now_at
    judged = leading(shown.metrics)
    return {
        "name": name,
        "job": job,
        "online": online,
        "state": now_at,
        "doing": one_line(doing, 190),
        "profile": one_line(shown.profile, 190),
        "slot": slot,
        "release": release,
        "update": None if update is None else dict(update),
        "density": None if shown.density is None else min(1.0, max(0.0, float(shown.density))),
        "parameters": shown.parameters if device is not None and device.widths else None,
        "samples": None if device is None else device.samples,
        "seen_at": now,
        "temperature_c": _temperature(contact.temperature_c, probe.get("temperature_c")),
        "versions": versions(contact.software),
        "bytes_down": traffic[0],
        "bytes_up": traffic[1],
        "seconds": number(shown.seconds, 0.0, 1e12),
        "metrics": dict(shown.metrics),
        "measured": None if judged is None else judged[1],
        "staleness": max(0, ended - last_counted) if last_counted else None,
        "quarantine": None if held is None else {"until": held[0], "reason": one_line(held[1], 500)},
        "status": status,
        "key": member.key,
        "excluded": one_line(excluded, 500) if excluded else None,
    }  # fmt: skip


def _state(
    state: State, device: Device | None, task: Task | None, *, here: bool, training: bool, status: str, problem: str
) -> str:
    if device is None:
        if problem:
            return "excluded"
        return "ready" if here else {"waiting": "waiting", "revoked": "revoked"}.get(status, "unknown")
    if device.excluded or problem:
        return "excluded"
    if not device.online:
        return "revoked" if status == "revoked" else ("elsewhere" if here else "offline")
    if task is None or not state.awaits(task):
        return "ready"
    return "training" if task.progress is Progress.OFFERED and training else outcome(task.progress.value, task.kind)


def versions(software: str) -> dict[str, str]:
    """Versions of a board's software, by name."""
    found = {n.lower(): v for n, v in _VERSION.findall(_SLOT.sub("", software[:500]))}
    return dict(list(found.items())[:_MOST_VERSIONS])


def running(software: str) -> tuple[str | None, int | None]:
    """The slot that a board reports to run from and the number of its release; None for what it doesn't report."""
    found = _SLOT.search(software[:500])
    if found is None:
        return None, None
    return found[1], None if found[2] is None else int(found[2])


def finished_round(
    job: str, summary: dict[str, Any], before: float | None, traffic: tuple[int, int] | None
) -> FinishedRound:
    """A finished round; `before` is when the previous one ended, `traffic` the bytes to and from devices since then."""
    parts = list(summary["devices"].values())
    refused = Counter(one_line(str(p["reason"]), 150) or "?" for p in parts if p["progress"] == Progress.REFUSED.value)
    if len(refused) > 100:
        refused = Counter(dict(refused.most_common(100)))
    stale = [float(p["staleness"]) for p in parts if isinstance(p.get("staleness"), (int, float))]
    return FinishedRound(
        job=job,
        round=summary["round"],
        at=summary["at"],
        seconds=None if before is None else max(0.0, summary["at"] - before),
        metrics=dict(list(summary["metrics"].items())[:64]),
        counted=sum(p["progress"] == Progress.FOLDED.value for p in parts) if parts else None,
        devices=len(parts) or None,
        refused=dict(refused),
        bytes_down=None if traffic is None else traffic[0],
        bytes_up=None if traffic is None else traffic[1],
        staleness={"mean": sum(stale) / len(stale), "max": max(stale)} if stale else None,
        model=summary["model"],
    )


def _temperature(reported: float | None, at_start: Any) -> float | None:
    return number(at_start, -100.0, 300.0) if reported is None else reported


def number(value: Any, low: float, high: float) -> float | None:
    """A measured number; None for anything else."""
    return float(value) if is_number(value, low, high) else None
