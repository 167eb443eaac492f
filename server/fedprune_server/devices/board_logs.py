"""Logs and crash reports of boards on the server's disk, with limits per board and in all.

Not in the job's database, because boards belong to the fleet and not to a job, and because losing it costs
nothing but these lines. The daemon collects what comes and writes it a few times a second at most; a board lets go of
a line when it is told that the server's disk has it.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core.closing import Closing
from fedprune.core.errors import StorageError
from fedprune.core.text import one_line
from fedprune.output.log_lines import log_context
from fedprune.wire.fleet_messages import CrashReport, LogReport, LogRequest
from fedprune_server.storage.sqlite_file import LOOP_BUSY_TIMEOUT_S, SqliteFile, connect_reader, sqlite_errors

log = logging.getLogger("fedprune.server")

FILE = "board-logs.db"
"""In the state folder."""

LINES, BYTES = 60, 16_384
"""Limits of a board's reports per hour."""

PER_BOARD, CRASHES, IN_ALL = 200, 10, 50_000
"""Lines and crashes of a board that are kept, and rows of all boards."""

_WAITING = 4096
"""Rows that wait to be written; more than that are left out."""

_HOUR_S = 3600.0
_LATEST = 253_402_214_400
"""Seconds from 1970 to the last day that calendars know, of the year 9999: a board's clock may say anything."""

_FORMAT = 1
_HINT = "It may be deleted: it holds boards' lines alone."
_TABLE = """
CREATE TABLE IF NOT EXISTS told (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, number INTEGER NOT NULL, kind TEXT NOT NULL,
    at REAL NOT NULL, received REAL NOT NULL, level TEXT NOT NULL, count INTEGER NOT NULL, text TEXT NOT NULL,
    body TEXT NOT NULL, UNIQUE (device, number))
"""
_INSERT = """
INSERT OR IGNORE INTO told (device, number, kind, at, received, level, count, text, body) VALUES (?,?,?,?,?,?,?,?,?)
"""
_TRIM = """
DELETE FROM told WHERE device = ? AND kind = ? AND id <= (
    SELECT id FROM told WHERE device = ? AND kind = ? ORDER BY id DESC LIMIT 1 OFFSET ?)
"""
_TRIM_ALL = "DELETE FROM told WHERE id <= (SELECT id FROM told ORDER BY id DESC LIMIT 1 OFFSET ?)"


@dataclass(frozen=True)
class BoardReport:
    """A line of a board's log, or a crash.

    Attributes:
        id: Grows with each that came.
        kind: `line` or `crash`.
        at: When, in seconds since 1970, by the board's clock.
        received: The same by the server's.
        level: `warning` or `error`.
        count: How often the line came.
        body: A crash's `cause`, `frames`, `release`, `slot`, `uptime_s`, `temperature_c` and memory; nothing for lines.
    """

    id: int
    device: str
    kind: str
    at: float
    received: float
    level: str
    count: int
    text: str
    body: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    @property
    def stamp(self) -> str:
        """Time on the board's clock."""
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(self.at, _LATEST)))

    def __str__(self) -> str:
        times = f" ({self.count} times)" if self.count > 1 else ""
        return f"{self.stamp} {self.device} {self.level}: {self.text}{times}"


class BoardLogs(Closing):
    """Boards' log lines and crashes in a state folder; a board may send `lines` lines in an hour, none with 0.

    Raises `StorageError` if the file is damaged, of another version, or the disk fails.
    """

    def __init__(
        self,
        folder: Path,
        lines: int = LINES,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lines, self._clock, self._monotonic = lines, clock, monotonic
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._answers: set[str] = set()
        self._kept: dict[str, int] = {}
        self._hours: dict[str, tuple[float, int]] = {}
        self._complained = False
        self.told: Callable[[BoardReport], None] = lambda row: None
        """Called with each line and crash that is new on the disk."""
        self._file = SqliteFile(folder / FILE, _TABLE, _FORMAT, _HINT, busy_timeout_s=LOOP_BUSY_TIMEOUT_S)
        with self._file.errors():
            self._kept.update(self._file.connection.execute("SELECT device, max(number) FROM told GROUP BY device"))

    def close(self) -> None:
        self._file.close()

    def wanted(self, device: str) -> LogRequest:
        """The request that is sent to a board: its quota, and what has arrived."""
        return LogRequest(self._lines, BYTES, self._kept.get(device))

    def lines(self, message: LogReport) -> None:
        """Take a board's lines; those above its quota are dropped."""
        device, now = message.device, self._clock()
        allowed = self._allowance(device, len(message.lines))
        for line in message.lines[:allowed]:
            row = (line["number"], "line", line["at"], now, line["level"], line["count"], one_line(line["text"]), "{}")
            self._put((device, *row))
        self._answers.add(device)

    def crashed(self, message: CrashReport) -> None:
        now, text = self._clock(), one_line(message.text, 1000)
        where = [{**f, "module": one_line(f["module"], 128), "function": one_line(f["function"], 128)}
                 for f in message.frames]  # fmt: skip
        body = {
            "cause": one_line(message.cause, 64),
            "frames": where,
            "release": one_line(message.release, 256),
            "slot": one_line(message.slot, 64),
            "uptime_s": message.uptime_s,
            "temperature_c": message.temperature_c,
            "memory_available": message.memory_available,
            "memory_total": message.memory_total,
        }
        self._answers.add(message.device)
        if not self._allowance(message.device, 1):
            return
        row = (message.number, "crash", message.at, now, "error", 1, text, json.dumps(body, sort_keys=True))
        self._put((message.device, *row))

    def save(self) -> dict[str, LogRequest]:
        """Save new lines, and return what to answer boards, by name. If the disk fails, lines are lost here, and boards
        send them again.
        """
        if not self._answers:
            return {}
        rows, answers = list(self._waiting), self._answers
        self._waiting.clear()
        self._answers = set()
        try:
            new = self._write(rows) if rows else []
        except StorageError as error:
            if not self._complained:
                self._complained = True
                log.warning("%s: lines of boards' logs are not kept", error)
            return {}
        self._complained = False
        for row in rows:
            self._kept[row[0]] = max(self._kept.get(row[0], 0), row[1])
        for told in new:
            with log_context(device=told.device):
                if told.kind == "crash":
                    log.warning("device %s crashed: %s%s", told.device, told.text, _place(told.body))
                else:
                    log.debug("device %s, at %s by its clock: %s", told.device, told.stamp, told.text)
            self.told(told)
        return {device: self.wanted(device) for device in sorted(answers)}

    def _put(self, row: tuple[Any, ...]) -> None:
        if len(self._waiting) < _WAITING:
            self._waiting.append(row)

    def _allowance(self, device: str, wanted: int) -> int:
        """A board's quota of lines: twice the announced one, since clocks differ."""
        now = self._monotonic()
        since, used = self._hours.get(device, (now, 0))
        if now - since >= _HOUR_S:
            since, used = now, 0
        allowed = max(0, min(wanted, 2 * self._lines + CRASHES - used))
        self._hours[device] = since, used + allowed
        return allowed

    def _write(self, rows: list[tuple[Any, ...]]) -> list[BoardReport]:
        with self._file.transaction() as connection:
            last = connection.execute("SELECT max(id) FROM told").fetchone()[0] or 0
            connection.executemany(_INSERT, rows)
            found = [_row(r) for r in connection.execute(f"{_SELECT} WHERE id > ? ORDER BY id", (last,))]
            for device, kind in {(r.device, r.kind) for r in found}:
                most = CRASHES if kind == "crash" else PER_BOARD
                connection.execute(_TRIM, (device, kind, device, kind, most))
            connection.execute(_TRIM_ALL, (IN_ALL,))
        return found


_SELECT = "SELECT id, device, kind, at, received, level, count, text, body FROM told"


def read_logs(folder: Path, device: str | None = None, after: int = 0, most: int = 1000) -> list[BoardReport]:
    """The latest `most` lines and crashes of all boards or of one, with an `id` above `after`, oldest first."""
    path = folder / FILE
    if not path.is_file():
        return []
    query, values = f"{_SELECT} WHERE id > ?", [after]
    if device is not None:
        query, values = f"{query} AND device = ?", [after, device]  # type: ignore[list-item]
    with sqlite_errors(path, _HINT), closing(connect_reader(path)) as connection:
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            return []  # made this moment
        rows = connection.execute(f"{query} ORDER BY id DESC LIMIT ?", (*values, most)).fetchall()
    return [_row(r) for r in reversed(rows)]


def frames_of(told: BoardReport) -> list[str]:
    """A crash's stack frames, as lines."""
    rows = []
    for frame in told.body.get("frames", ()):
        at = f"{frame['module']}:{frame['line']} in {frame['function']}" if frame["line"] else frame["module"]
        rows.append(at)
    return rows


def _row(values: tuple[Any, ...]) -> BoardReport:
    try:
        number, device, kind, at, received, level, count, text, body = values
        return BoardReport(number, device, kind, at, received, level, count, text, json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"a row of boards' logs is damaged ({error})", hint=f"Delete {FILE}.") from error


def _place(body: Mapping[str, Any]) -> str:
    ours = [f for f in body["frames"] if f["line"]]
    return f" ({ours[0]['module']}:{ours[0]['line']})" if ours else ""
