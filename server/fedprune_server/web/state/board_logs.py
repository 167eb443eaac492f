"""Boards' own lines and crashes for the console: those that come, and on request those on the server's disk."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedprune.core.errors import ProtocolError, StorageError
from fedprune.core.text import one_line
from fedprune.core.validation import is_whole
from fedprune_server.devices.board_logs import CRASHES, Told, frames_of, read_logs
from fedprune_server.web.state.log_messages import BoardLog, LogLine
from fedprune_server.web.state.row_types import LEVELS, BoardCrash, BoardLine
from fedprune_server.web.state.rows import number

KEPT = 1000
"""Lines that wait for the console; of more the oldest are let go."""

LATEST = 200
"""Lines of all boards that a console is told of when it starts."""

OF_BOARD = 60
"""Lines of one board that are shown with it."""

_TEXT, _FRAMES = 1000, 16


class BoardTold:
    """What boards tell of their logs.

    Args:
        folder: The server's state folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._new: deque[LogLine] = deque(maxlen=KEPT)

    def hear(self, told: Told) -> None:
        """A line or a crash has come. Of a crash the server's own log has a line already, with its place."""
        if told.kind == "line":
            with suppress(ProtocolError):  # what can't be shown must not stop whoever keeps it
                self._new.append(_line(told))

    def take(self, most: int) -> list[LogLine]:
        """The next lines that came, at most so many."""
        return [self._new.popleft() for _ in range(min(most, len(self._new)))]

    def latest(self) -> list[LogLine]:
        """The latest lines and crashes of all boards, the oldest first; those that wait are among them.

        Raises:
            StorageError: They can't be read.
        """
        self._new.clear()
        return [_line(told) for told in read_logs(self._folder, most=LATEST)]

    def of(self, device: str) -> BoardLog:
        """What a board told last; nothing where it can't be read, which `doctor` says."""
        try:
            found = read_logs(self._folder, device)[::-1]
        except StorageError:
            found = []
        lines = [_row(t) for t in found if t.kind == "line"][:OF_BOARD]
        return BoardLog(device, tuple(lines), tuple([_crash(t) for t in found if t.kind == "crash"][:CRASHES]))


def _line(told: Told) -> LogLine:
    times = f" ({told.count} times)" if told.count > 1 else ""
    text = f"crashed: {told.text}" if told.kind == "crash" else told.text
    return LogLine(max(0.0, told.received), _level(told), f"{one_line(text, _TEXT)}{times}", told.device, board=True)


def _row(told: Told) -> BoardLine:
    return {
        "at": max(0.0, told.at),
        "received": max(0.0, told.received),
        "level": _level(told),
        "count": max(1, told.count),
        "text": one_line(told.text, _TEXT),
    }


def _crash(told: Told) -> BoardCrash:
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


def _level(told: Told) -> str:
    return told.level if told.level in LEVELS else "error"


def _count(value: Any) -> int | None:
    return value if is_whole(value) else None
