"""Warnings and errors of a board's log, kept for its server: few, small, and durable.

A repeated line is counted. What doesn't fit is left out, oldest first, and the number of lost lines is reported. The
file is written once a minute at most, to spare the card.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from fedprune.core import atomic_file
from fedprune.core.errors import FedpruneError
from fedprune.wire.fleet_messages import MAX_LINES, MAX_TEXT, LogEntry, LogReport
from fedprune_device.privacy.redaction import KEPT as WITHHELD
from fedprune_device.privacy.redaction import bare, private

FILE = "log.json"  # in the board's state directory

KEPT = 64
KEPT_BYTES = 16_384  # lines, and bytes of their texts, that wait for the server at most

_SAVE_S = 60.0
_HOUR_S = 3600.0
_MESSAGE_BYTES = 8192
_LAST = 2**53


class LogBuffer(logging.Handler):
    """Keeps the log lines for the server.

    If `quiet` (the board's samples are in a private job), lines are kept without the values that were filled in.
    """

    def __init__(
        self,
        folder: Path,
        device: str,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        quiet: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__(logging.WARNING)
        self._quiet, self._bare = quiet, False
        self._path, self._device, self._clock, self._monotonic = folder / FILE, device, clock, monotonic
        self._guard = threading.RLock()
        self._lines: list[dict[str, Any]] = []
        self._told: dict[tuple[str, str], int] = {}
        """The lines that were sent in this hour, and how often they were repeated since."""
        self._number = self._left_out = self._sent_lines = self._sent_bytes = 0
        self._hour = monotonic()
        self._save_at = monotonic()
        self._dirty = False
        self._load()

    @property
    def number(self) -> int:
        """A number for the next line or crash, larger than that of every earlier one."""
        with self._guard:
            self._number = max(self._number + 1, min(int(self._clock() * 1000), _LAST))
            self._dirty = True
            return self._number

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = record.getMessage()
            if record.exc_info and record.exc_info[1] is not None:
                text = f"{text}: {type(record.exc_info[1]).__name__}: {record.exc_info[1]}"
            level = "error" if record.levelno >= logging.ERROR else "warning"
            self._withhold()
            self._add(level, bare(record) if self._bare else private(text, MAX_TEXT), 1)
        except Exception:  # noqa: BLE001 - as every handler does: a line that can't be kept ends nothing
            self.handleError(record)

    def take(self, lines: int, size: int) -> LogReport | None:
        """The lines to send now, within `lines` per hour and `size` bytes of text; the same again until it is kept."""
        with self._guard:
            self._withhold()
            self._turn_of_the_hour()
            room, space = min(MAX_LINES, lines - self._sent_lines), min(_MESSAGE_BYTES, size - self._sent_bytes)
            told: list[dict[str, Any]] = []
            for line in self._lines:
                space -= _size(line)
                if len(told) >= room or space < 0:
                    break
                told.append(line)
            if not told:
                return None
            for line in told:
                line["told"] = True
            return LogReport(self._device, tuple(cast(LogEntry, line) for line in told))

    def kept(self, number: int) -> None:
        with self._guard:
            gone = [line for line in self._lines if line["number"] <= number and line.get("told")]
            if not gone:
                return
            self._sent_lines += len(gone)
            self._sent_bytes += sum(map(_size, gone))
            for line in gone:
                if len(self._told) < KEPT:
                    self._told.setdefault((line["level"], line["text"]), 0)
            self._lines = [line for line in self._lines if line not in gone]
            self._dirty = True

    def save(self, *, now: bool = False) -> None:
        """Write the file if it is due, or at once if `now`; if the disk fails, these lines are lost."""
        with self._guard:
            if not self._dirty or (not now and self._monotonic() < self._save_at):
                return
            self._dirty, self._save_at = False, self._monotonic() + _SAVE_S
            body = {
                "number": self._number,
                "left_out": self._left_out,
                "bare": self._bare,
                "lines": [_plain(x) for x in self._lines],
            }
        try:
            atomic_file.write_document(self._path, body)
        except FedpruneError:  # saying so would be another line
            self._dirty = True

    def _withhold(self) -> None:
        """Let lines from before the board was private wait no longer with what they say."""
        quiet = self._quiet()
        with self._guard:
            if quiet and not self._bare:
                self._told = {}
                for line in self._lines:
                    line["text"] = f"a line of before {WITHHELD}"
            self._bare = quiet

    def _add(self, level: str, text: str, count: int) -> None:
        with self._guard:
            self._turn_of_the_hour()
            key = (level, text)
            self._dirty = True
            if key in self._told:
                self._told[key] += count
                return
            for line in self._lines:
                if (line["level"], line["text"]) == key and not line.get("told"):
                    line["count"], line["at"] = min(line["count"] + count, 2**31 - 1), self._now()
                    return
            self._lines.append({"number": self.number, "at": self._now(), "level": level, "count": count, "text": text})
            while len(self._lines) > KEPT or sum(map(_size, self._lines)) > KEPT_BYTES:
                self._left_out += self._lines.pop(0)["count"]

    def _turn_of_the_hour(self) -> None:
        """Every hour renew the allowance, report repeated lines once more and the number of lost ones."""
        now = self._monotonic()
        if now - self._hour < _HOUR_S:
            return
        self._hour, self._sent_lines, self._sent_bytes = now, 0, 0
        again, self._told = {k: n for k, n in self._told.items() if n}, {}
        for (level, text), count in again.items():
            self._add(level, text, count)
        if self._left_out:
            left, self._left_out = self._left_out, 0
            self._add("warning", "lines of this board's log were left out, since there were too many", left)

    def _now(self) -> int:
        return max(0, min(int(self._clock()), _LAST))

    def _load(self) -> None:
        """Take up what an earlier run left; a damaged file is as good as none."""
        try:
            body = atomic_file.read_document(self._path) or {}
            lines = LogReport(self._device, tuple(body.get("lines", ())[:KEPT])).lines
            number, left = int(body.get("number", 0)), int(body.get("left_out", 0))
        except (FedpruneError, TypeError, ValueError, KeyError, AttributeError, OverflowError):
            return
        self._lines = [dict(line) for line in lines]
        self._number, self._left_out = max(0, min(number, _LAST)), max(0, left)
        self._bare = body.get("bare") is True


def _size(line: dict[str, Any]) -> int:
    return len(line["text"].encode())


def _plain(line: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in line.items() if k != "told"}
