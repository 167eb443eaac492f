"""Reads boards' crash reports for the console."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedprune.core.errors import StorageError
from fedprune.core.text import one_line
from fedprune.core.validation import is_whole
from fedprune_server.devices.crash_store import MAX_CRASHES_PER_BOARD, BoardCrash, frames_of, read_crashes
from fedprune_server.web.state.records import BoardCrashes
from fedprune_server.web.state.rows import number_or_none

# The console's page shows the innermost frames; a report of a deep recursion has hundreds.
_MAX_FRAMES = 16


def board_crashes(folder: Path, device: str) -> BoardCrashes:
    """A board's latest crashes in a state folder; none if they can't be read, which `doctor` reports."""
    try:
        crashes = read_crashes(folder, device, limit=MAX_CRASHES_PER_BOARD)[::-1]
    except StorageError:
        crashes = []
    return BoardCrashes(device, tuple(map(_crash_row, crashes)))


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
