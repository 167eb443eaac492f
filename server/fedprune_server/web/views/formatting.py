"""Writes numbers, times and states as texts for the console's pages; templates use these functions as filters."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from fedprune.core.metrics import METRICS

# The text for an unknown value: an empty cell would look like a mistake.
UNKNOWN = "–"

# The class of each word's mark, whose shape differs as well as its colour: not everybody can tell the colours apart.
STATE_MARKS = {
    # devices
    "ready": "good", "folded": "good", "stored": "good", "training": "work", "pulling": "work", "offered": "work",
    "extracting": "work", "queued": "off", "elsewhere": "off", "offline": "off", "unknown": "off", "waiting": "warn",
    "refused": "bad", "late": "warn", "lost": "warn", "gone": "warn", "excluded": "warn", "revoked": "bad",
    "quarantine": "bad",
    # jobs
    "finished": "good", "scoring": "work", "closing": "work", "evaluating": "work", "paused": "warn",
    # rollouts
    "running": "work", "stopping": "warn", "pausing": "warn", "resuming": "work", "done": "good", "stopped": "bad",
    "failed": "bad",
    # releases on a board
    "downloading": "work", "staged": "work", "trial": "work", "committed": "good", "rolled back": "bad",
    # alerts and logs
    "info": "off", "warning": "warn", "critical": "bad", "error": "bad", "debug": "off",
}  # fmt: skip


# States with another name on pages than in records, whose names programs compare.
STATE_WORDS = {"folded": "aggregated", "extracting": "being cut", "stored": "uploaded", "elsewhere": "at another job"}

_SIZES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
_LENGTHS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def state_word(state: str) -> str:
    return STATE_WORDS.get(state, state)


def state_mark(word: str) -> str:
    return STATE_MARKS.get(word, "off")


def size_text(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    for unit, name in _SIZES:
        if value >= unit * 0.9995:
            return f"{_three_digits(value / unit)} {name}"
    return f"{value:.0f} B"


def share_text(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"


def decimal_text(value: float | None, digits: int) -> str:
    return UNKNOWN if value is None else f"{value:.{digits}f}"


def number_text(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def count_text(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def seconds_text(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    if value == 0:
        return "0 s"
    if 0 < value < 0.9995:
        return f"{_three_digits(value * 1e3)} ms" if value >= 9.995e-4 else f"{value * 1e6:.0f} µs"
    if value < 119.5:
        return f"{_three_digits(value)} s"
    if value < 600:
        return f"{value / 60:.1f} min"
    if value < 5400:
        return f"{value / 60:.0f} min"
    return f"{value / 3600:.1f} h" if value < 36 * 3600 else f"{value / 86400:.1f} d"


def energy_text(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    return f"{_three_digits(value)} J" if value >= 0.9995 or value == 0 else f"{_three_digits(value * 1e3)} mJ"


def release_text(row: Mapping[str, Any]) -> str:
    """Release number and slot that a device runs."""
    texts = [str(row[k]) for k in ("release", "slot") if row[k] is not None]
    return "/".join(texts) or UNKNOWN


def axis_of_sizes(highest: float) -> tuple[float, str]:
    """Bytes per unit of an axis up to `highest`, and the unit's name."""
    return next(((unit, name) for unit, name in _SIZES if highest >= unit), (1.0, "B"))


def axis_of_lengths(highest: float) -> tuple[float, str]:
    """Seconds per unit of an axis up to `highest`, and the unit's name."""
    return next(((unit, name) for unit, name in _LENGTHS if highest >= 2 * unit), (1.0, "s"))


def time_text(at: float | None) -> str:
    return UNKNOWN if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", _calendar(at))


def machine_time(at: float | None) -> str:
    """A time for HTML's `time`."""
    return "" if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", _calendar(at))


def age_text(at: float | None, now: float | None = None) -> str:
    """How long ago, or how far ahead, a time is."""
    if at is None:
        return UNKNOWN
    elapsed = (time.time() if now is None else now) - at
    distance = abs(elapsed)
    if distance < 1.5:
        return "now"
    unit, name = next((u, n) for u, n in _LENGTHS if distance >= 1.5 * u or u == 1)
    text = f"{distance / unit:.0f} {name}"
    return f"{text} ago" if elapsed > 0 else f"in {text}"


def metric_pairs(values: Mapping[str, float]) -> list[tuple[str, str]]:
    return [
        (METRICS[k].title, METRICS[k].value_text(v)) if k in METRICS else (k, number_text(v))
        for k, v in sorted(values.items())
        if k != "samples"
    ]


def version_text(values: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in sorted(values.items())) or UNKNOWN


def plural_text(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def action_text(entry: Mapping[str, Any]) -> str:
    details, action = entry["what"], entry["action"]
    text = _ACTION_TEXTS.get(action, action.replace("_", " "))
    text = text.format_map({k: details.get(k) or "–" for k in ("job", "device", "key", "release", "operator", "role")})
    if action == "rollout_start":
        boards, stages = details.get("devices") or (), details.get("groups") or ()
        text += f" to {', '.join(boards)}" if boards else " to all boards"
        text += f" in stages of {', '.join(f'{s:.0%}' for s in stages)}" if stages else ""
    if details.get("unlisted before"):
        text += f" (after {details['unlisted before']:,} more that are not listed)"
    return f"{text} ({details['reason']})" if details.get("reason") else text


_ACTION_TEXTS = {
    "login": "log in",
    "logout": "log out",
    "pause": "pause job {job}",
    "resume": "resume job {job}",
    "approve": "approve {device} with key {key}",
    "deny": "deny {device}",
    "revoke": "revoke {device}",
    "release_quarantine": "end the quarantine of {device}",
    "rollout_start": "roll out {release}",
    "rollout_pause": "pause the rollout",
    "rollout_resume": "resume the rollout",
    "rollout_stop": "stop the rollout",
    "rollout_back": "roll back release {release}",
    "operator_add": "add operator {operator} as {role}",
    "operator_password": "change the password of {operator}",  # nosec B105  # words for the audit log
    "operator_remove": "remove operator {operator}",
}

# By the names that templates use.
FILTERS: dict[str, Any] = {
    "mark": state_mark, "word": state_word, "size": size_text, "share": share_text, "number": number_text,
    "decimals": decimal_text, "count": count_text, "seconds": seconds_text, "clock": time_text,
    "machine_time": machine_time, "ago": age_text, "metrics": metric_pairs,
    "versions": version_text, "plural": plural_text, "runs": release_text, "action_text": action_text,
}  # fmt: skip


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"


def _calendar(at: float) -> time.struct_time:
    return time.gmtime(min(max(at, 0.0), 253402300799.0))
