"""Log lines for the console: the server's own as they are written, and boards' lines and crashes."""

from __future__ import annotations

import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprune.core.errors import ProtocolError, StorageError
from fedprune.core.text import one_line
from fedprune.core.validation import is_whole
from fedprune.output.log_lines import current_log_context
from fedprune.wire.topics import check_device
from fedprune_server.devices.board_logs import CRASHES, BoardReport, frames_of, read_logs
from fedprune_server.web.state.records import LEVELS, BoardLog, LogLine
from fedprune_server.web.state.rows import number

KEPT = 1000
"""Lines that wait to be published; of more, the oldest are dropped."""

LATEST = 200
"""Lines of all boards that are published at the start."""

OF_BOARD = 60
"""Lines of one board that are shown with it."""

_TEXT, _FRAMES = 1000, 16
_DEVICE = re.compile(r"\bdevice ([A-Za-z0-9][A-Za-z0-9_.-]{0,63})")
_LEVELS = {logging.DEBUG: "debug", logging.INFO: "info", logging.WARNING: "warning"}


class LogTap(logging.Handler):
    """Collects lines of the server's log, from any thread.

    Args:
        known: Whether a name that follows the word "device" in a line is a device's; called by `take`.
    """

    def __init__(self, known: Callable[[str], bool]) -> None:
        super().__init__(logging.INFO)
        self._known = known
        self._lines: deque[tuple[LogLine, bool]] = deque(maxlen=KEPT)  # and whether its device is only read from it

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, without control characters."""
        try:
            text = one_line(record.getMessage(), 1500)
            facts: dict[str, Any] = {n: v for n, v in current_log_context().items() if n in ("device", "job", "round")}
            found = None if "device" in facts else _DEVICE.search(text)
            if found is not None:
                facts["device"] = found[1].rstrip(".")
            try:
                check_device(facts.get("device", "x"))
            except ProtocolError:  # part of a foreign topic, which need not be a device's name
                facts = {}
            level = _LEVELS.get(record.levelno, "error")
            line = LogLine(max(0.0, record.created), level, text, **facts)
            self._lines.append((line, found is not None))
        except Exception:  # noqa: BLE001 - a line that can't be shown must not stop its author
            self.handleError(record)

    def take(self, most: int) -> list[LogLine]:
        found = [self._lines.popleft() for _ in range(min(most, len(self._lines)))]
        return [
            replace(line, device=None) if guess and not self._known(line.device or "") else line
            for line, guess in found
        ]


class BoardLogTap:
    """Log lines and crashes of boards, from the state folder and as they arrive."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._new: deque[LogLine] = deque(maxlen=KEPT)

    def hear(self, told: BoardReport) -> None:
        """Collect a line that has arrived; a crash is in the server's own log already."""
        if told.kind == "line":
            self._new.append(_line(told))

    def take(self, most: int) -> list[LogLine]:
        return [self._new.popleft() for _ in range(min(most, len(self._new)))]

    def latest(self) -> list[LogLine]:
        """The latest lines and crashes of all boards, oldest first, including those not taken yet."""
        self._new.clear()
        return [_line(told) for told in read_logs(self._folder, most=LATEST)]

    def of(self, device: str) -> BoardLog:
        """A board's latest lines and crashes; empty if they can't be read, which `doctor` reports."""
        try:
            found = read_logs(self._folder, device)[::-1]
        except StorageError:
            found = []
        lines = [_row(t) for t in found if t.kind == "line"][:OF_BOARD]
        return BoardLog(device, tuple(lines), tuple([_crash(t) for t in found if t.kind == "crash"][:CRASHES]))


def _line(told: BoardReport) -> LogLine:
    times = f" ({told.count} times)" if told.count > 1 else ""
    text = f"crashed: {told.text}" if told.kind == "crash" else told.text
    return LogLine(max(0.0, told.received), _level(told), f"{one_line(text, _TEXT)}{times}", told.device, board=True)


def _row(told: BoardReport) -> dict[str, Any]:
    return {
        "at": max(0.0, told.at),
        "received": max(0.0, told.received),
        "level": _level(told),
        "count": max(1, told.count),
        "text": one_line(told.text, _TEXT),
    }


def _crash(told: BoardReport) -> dict[str, Any]:
    body = told.body
    return {
        "at": max(0.0, told.at),
        "received": max(0.0, told.received),
        "cause": one_line(str(body.get("cause", "")), 64),
        "text": one_line(told.text, _TEXT),
        "release": one_line(str(body.get("release", "")), 150),
        "slot": one_line(str(body.get("slot", "")), 64),
        "uptime_s": number(body.get("uptime_s"), 0.0, 1e12),
        "temperature_c": number(body.get("temperature_c"), -100.0, 300.0),
        "memory_available": _count(body.get("memory_available")),
        "memory_total": _count(body.get("memory_total")),
        "frames": tuple(one_line(f, 290) for f in frames_of(told)[:_FRAMES]),
    }


def _level(told: BoardReport) -> str:
    return told.level if told.level in LEVELS else "error"


def _count(value: Any) -> int | None:
    return value if is_whole(value) else None
