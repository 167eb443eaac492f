"""What a server's and its console's words are checked by: rows of devices, rollouts and groups of channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedprune.core.errors import ProtocolError, shown
from fedprune.wire import validation as check
from fedprune.wire.validation import Check

DEVICE_STATES = (
    "offline",
    "ready",
    "queued",
    "extracting",
    "offered",
    "training",
    "pulling",
    "stored",
    "folded",
    "refused",
    "excluded",
    "elsewhere",
    "waiting",
    "revoked",
    "unknown",
)
"""What a device is doing, as it can be filtered by; `doing` says it in words."""

FIGURES = (
    "round",
    "step",
    "train",
    "transfer",
    "latency",
    "memory",
    "serving_memory",
    "storage",
    "download",
    "upload",
    "step_energy",
    "latency_energy",
)
STATUSES = ("member", "waiting", "revoked")
SEVERITIES = ("info", "warning", "critical")
LEVELS = ("debug", "info", "warning", "error")
ORDER_KINDS = (
    "approve",
    "coverage",
    "deny",
    "look",
    "pause",
    "release_quarantine",
    "resume",
    "revoke",
    "rollout_back",
    "rollout_pause",
    "rollout_resume",
    "rollout_start",
    "rollout_stop",
)

COUNT = check.whole()
TIME = check.number(0.0)
SECONDS = check.number(0.0)
SHARE = check.number(0.0, 1.0)
SHORT = check.text(200)
TEXT = check.text(2000)


def truth(where: str, value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ProtocolError(where, expected="true or false", got=shown(value))
    return value


def row_of(checks: Mapping[str, Check]) -> Check:
    """An object with these fields; what else it has is left out."""

    def checked(where: str, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ProtocolError(where, expected="an object", got=shown(value))
        for name in checks:
            if name not in value:
                raise ProtocolError(f"{where}.{name}", expected="a value", got="nothing")
        return {name: one(f"{where}.{name}", value[name]) for name, one in checks.items()}

    return checked


def list_of(one: Check, limit: int) -> Check:
    """A list of what `one` takes."""

    def checked(where: str, value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or len(value) > limit:
            raise ProtocolError(where, expected=f"a list of at most {limit}", got=shown(value))
        return tuple(one(f"{where}[{i}]", item) for i, item in enumerate(value))

    return checked


def table_of(one: Check, limit: int) -> Check:
    """What `one` takes, by short texts."""

    def checked(where: str, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping) or len(value) > limit:
            raise ProtocolError(where, expected=f"an object of at most {limit} entries", got=shown(value))
        return {SHORT(f"{where}: key", key): one(f"{where}: entry", item) for key, item in value.items()}

    return checked


DEVICE: dict[str, Check] = {
    "name": check.device,
    "job": check.optional(check.job),
    "online": truth,
    "state": check.choice(*DEVICE_STATES),
    "doing": SHORT,
    "profile": SHORT,
    "slot": check.optional(check.choice("a", "b")),
    "release": check.optional(COUNT),
    "update": check.optional(row_of({"number": COUNT, "state": SHORT, "reason": TEXT, "at": TIME})),
    "density": check.optional(SHARE),
    "parameters": check.optional(COUNT),
    "samples": check.optional(COUNT),
    "seen_at": check.optional(TIME),
    "temperature_c": check.optional(check.number(-100.0, 300.0)),
    "versions": table_of(SHORT, 8),
    "bytes_down": COUNT,
    "bytes_up": COUNT,
    "seconds": check.optional(SECONDS),
    "accuracy": check.optional(SHARE),
    "loss": check.optional(check.number()),
    "staleness": check.optional(COUNT),
    "quarantine": check.optional(row_of({"until": check.optional(TIME), "reason": TEXT})),
    "status": check.choice(*STATUSES),
    "key": check.optional(check.text(64)),
    "behind": check.optional(SHORT),
    "excluded": check.optional(TEXT),
}
"""A device's row. Each device has one, whatever jobs it takes part in; `job` is the one that has it, or had it last.

`slot` and `release` are those that run there; `update` is where the latest rollout's release stands.
"""

FIGURE: dict[str, Check] = {
    "what": check.choice(*FIGURES),
    "unit": check.choice("s", "bytes", "J"),
    "predicted": check.optional(check.number(0.0)),
    "measured": check.optional(check.number(0.0)),
}
"""Something that was foretold or measured of a device's rounds."""

ROLLOUT: dict[str, Check] = {
    "name": SHORT,
    "number": COUNT,
    "release": SHORT,
    "stage": check.whole(-1),
    "stages": COUNT,
    "of": COUNT,
    "done": COUNT,
    "failed": COUNT,
    "given": COUNT,
    "waiting": COUNT,
    "state": SHORT,
    "why": TEXT,
    "at": TIME,
    "failures": table_of(TEXT, 50),
    "subject": COUNT,
    "before": check.optional(SHORT),
    "leaves": check.optional(COUNT),
}

"""`subject` is the release's number, `before` what its boards had before and may be taken back to, `leaves` the number
of the release that it takes boards back from."""

GROUP: dict[str, Check] = {
    "name": SHORT,
    "channels": COUNT,
    "held": list_of(row_of({"channels": check.whole(1), "share": SHARE}), 8192),
}
"""A group of channels: runs of neighbouring ones, by rank, that the same share of the devices holds."""

HELD: dict[str, Check] = {
    "group": SHORT,
    "kept": COUNT,
    "of": COUNT,
    "which": check.optional(check.hexadecimal(0, 16_384)),
}
"""What a device holds of a group of channels."""

LINE: dict[str, Check] = {
    "at": TIME,
    "received": TIME,
    "level": check.choice(*LEVELS),
    "count": check.whole(1),
    "text": TEXT,
}
"""A line of a board's own log: when by its clock, and by the server's."""

CRASH: dict[str, Check] = {
    "at": TIME,
    "received": TIME,
    "cause": SHORT,
    "text": TEXT,
    "release": SHORT,
    "slot": SHORT,
    "uptime_s": check.optional(SECONDS),
    "temperature_c": check.optional(check.number(-100.0, 300.0)),
    "memory_available": check.optional(COUNT),
    "memory_total": check.optional(COUNT),
    "frames": list_of(check.text(300), 16),
}
"""How a board's run ended that nobody had ended."""
