"""Makes the console's rows of devices and finished rounds from snapshots, memberships and the job's history."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from fedprune.core.metrics import primary_metric
from fedprune.core.text import one_line
from fedprune.core.validation import is_number
from fedprune.jobs.state import Progress
from fedprune.wire.fleet_messages import COMMITTED
from fedprune_server.observation.snapshot import DeviceSnapshot
from fedprune_server.web.state.membership_poller import Member
from fedprune_server.web.state.records import FinishedRound

# Boards describe their software in one line of names and versions, with `slot a with release 7`. The text is theirs, so
# that lengths and counts are limited here.
_SLOT = re.compile(r"\bslot ([ab])\b(?: with release (\d{1,10})\b)?")
_VERSION = re.compile(r"([A-Za-z][A-Za-z0-9_.-]{0,39})[ /]v?(\d[A-Za-z0-9.+_-]{0,39})")
_MAX_VERSIONS = 8


def device_row(
    device: DeviceSnapshot,
    *,
    job: str | None,
    ended: int,
    member: Member,
    traffic: tuple[int, int],
    heard_at: float | None,
    quarantine: tuple[float, str] | None = None,
    update: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A device's row.

    Args:
        device: The device as seen by the job that has it, or had it last.
        job: That job's name, if the device takes part in it.
        ended: The latest finished round of the job: in the current round no board is late yet.
        traffic: Bytes to the device and from it, of all jobs.
        heard_at: When any job last heard it, in seconds since 1970.
        quarantine: When its quarantine ends, and the reason.
        update: Its last report about the latest rollout's release.
    """
    state = _device_state(device, member.status)
    slot, release = slot_and_release(device.software)
    versions = {n.lower(): v for n, v in _VERSION.findall(_SLOT.sub("", device.software[:500]))}
    if release is None and update is not None and update["state"] == COMMITTED:
        release = update["number"]
    score, last_counted = primary_metric(device.metrics), device.last_counted_round
    return {
        "name": device.name,
        "job": job,
        "online": device.connected or device.online,
        "state": state,
        "doing": one_line(device.activity if device.takes_part or state == "excluded" else state, 190),
        "profile": one_line(device.profile, 190),
        "slot": slot,
        "release": release,
        "update": None if update is None else dict(update),
        "density": None if device.density is None else min(1.0, max(0.0, float(device.density))),
        "parameters": device.parameters or None,
        "samples": device.samples,
        "seen_at": heard_at,
        "temperature_c": device.temperature_c,
        "versions": dict(list(versions.items())[:_MAX_VERSIONS]),
        "bytes_down": traffic[0],
        "bytes_up": traffic[1],
        "seconds": number_or_none(device.seconds, 0.0, 1e12),
        "metrics": dict(device.metrics),
        "measured": None if score is None else score[1],
        "staleness": max(0, ended - last_counted) if last_counted else None,
        "quarantine": None if quarantine is None else {"until": quarantine[0], "reason": one_line(quarantine[1], 500)},
        "status": member.status,
        "key": member.key,
        "excluded": one_line(device.excluded, 500) if device.excluded else None,
    }  # fmt: skip


def _device_state(device: DeviceSnapshot, status: str) -> str:
    if device.excluded:
        return "excluded"
    if not device.takes_part:
        return "ready" if device.connected else {"waiting": "waiting", "revoked": "revoked"}.get(status, "unknown")
    if not device.online:
        return "revoked" if status == "revoked" else ("elsewhere" if device.connected else "offline")
    return device.part_progress or "ready"


def slot_and_release(software: str) -> tuple[str | None, int | None]:
    """The slot from which a board runs, and the number of its release, as it reports; None if it doesn't report one."""
    slot, release = match.groups() if (match := _SLOT.search(software[:500])) else (None, None)
    return slot, None if release is None else int(release)


def finished_round_record(
    job: str, summary: Mapping[str, Any], previous_end: float | None, traffic: tuple[int, int] | None
) -> FinishedRound:
    """The record of a finished round. `previous_end` is when the round before ended, `traffic` the bytes to and from
    devices since then; None if unknown."""
    device_parts = list(summary["devices"].values())
    reasons = Counter(
        one_line(str(p["reason"]), 150) or "?" for p in device_parts if p["progress"] == Progress.REFUSED.value
    )
    if len(reasons) > 100:  # a reason may hold a number, so that every board has one of its own
        reasons = Counter(dict(reasons.most_common(100)))
    ages = [float(p["staleness"]) for p in device_parts if isinstance(p.get("staleness"), (int, float))]
    bytes_down, bytes_up = traffic or (None, None)
    return FinishedRound(
        job=job,
        round=summary["round"],
        at=summary["at"],
        seconds=None if previous_end is None else max(0.0, summary["at"] - previous_end),
        metrics=dict(list(summary["metrics"].items())[:64]),
        counted=sum(p["progress"] == Progress.FOLDED.value for p in device_parts) if device_parts else None,
        devices=len(device_parts) or None,
        refused=dict(reasons),
        bytes_down=bytes_down,
        bytes_up=bytes_up,
        staleness={"mean": sum(ages) / len(ages), "max": max(ages)} if ages else None,
        model=summary["model"],
    )


def number_or_none(value: Any, low: float, high: float) -> float | None:
    """A measured number; None for anything else."""
    return float(value) if is_number(value, low, high) else None
