"""Crash reports of boards on the server's disk, with limits per board and in all.

Not in the job's database, because boards belong to the fleet and not to a job, and because losing it costs
nothing but these reports. The daemon collects what comes and writes it a few times a second at most; a board lets go of
a crash when it is told that the server's disk has it.
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
from fedprune.wire.fleet_messages import CrashReport, CrashStored
from fedprune_server.storage.sqlite_file import LOOP_BUSY_TIMEOUT_S, SqliteFile, connect_reader, sqlite_errors

log = logging.getLogger("fedprune.server")

FILE = "crashes.db"
"""In the state folder."""

PER_BOARD, IN_ALL = 10, 10_000
"""Crashes of a board that are kept, and that may come in an hour; crashes of all boards."""

_WAITING = 4096
"""Crashes that wait to be written; more than that are left out."""

_HOUR_S = 3600.0
_LATEST = 253_402_214_400
"""Seconds from 1970 to the last day that calendars know, of the year 9999: a board's clock may say anything."""

_FORMAT = 1
_HINT = "It may be deleted: it holds boards' crash reports alone."
_TABLE = """
CREATE TABLE IF NOT EXISTS crashes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, number INTEGER NOT NULL, at REAL NOT NULL,
    received REAL NOT NULL, text TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (device, number))
"""
_INSERT = "INSERT OR IGNORE INTO crashes (device, number, at, received, text, body) VALUES (?,?,?,?,?,?)"
_TRIM = """
DELETE FROM crashes WHERE device = ? AND id <= (
    SELECT id FROM crashes WHERE device = ? ORDER BY id DESC LIMIT 1 OFFSET ?)
"""
_TRIM_ALL = "DELETE FROM crashes WHERE id <= (SELECT id FROM crashes ORDER BY id DESC LIMIT 1 OFFSET ?)"


@dataclass(frozen=True)
class BoardCrash:
    """A crash of a board.

    Attributes:
        id: Grows with each that came.
        at: When, in seconds since 1970, by the board's clock.
        received: The same by the server's.
        body: `cause`, `frames`, `release`, `slot`, `uptime_s`, `temperature_c` and memory.
    """

    id: int
    device: str
    at: float
    received: float
    text: str
    body: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def __str__(self) -> str:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(self.at, _LATEST)))  # on the board's clock
        return f"{stamp} {self.device}: {self.text}"


class CrashStore(Closing):
    """Boards' crashes in a state folder.

    Raises `StorageError` if the file is damaged, of another version, or the disk fails.
    """

    def __init__(
        self,
        folder: Path,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, self._monotonic = clock, monotonic
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._answers: dict[str, int] = {}
        self._hours: dict[str, tuple[float, int]] = {}
        self._complained = False
        self._file = SqliteFile(folder / FILE, _TABLE, _FORMAT, _HINT, busy_timeout_s=LOOP_BUSY_TIMEOUT_S)

    def close(self) -> None:
        self._file.close()

    def add(self, message: CrashReport) -> None:
        """Take a board's crash; one above its quota is acknowledged, so that it comes no more, and not kept."""
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
        if len(self._waiting) >= _WAITING:
            return  # the board sends it again
        self._answers[message.device] = message.number
        if self._has_quota(message.device):
            self._waiting.append((message.device, message.number, message.at, now, text, json.dumps(body)))

    def save(self) -> dict[str, CrashStored]:
        """Save new crashes, and return what to answer boards, by name. If the disk fails, they are lost here, and
        boards send them again.
        """
        if not self._answers:
            return {}
        rows, answers = list(self._waiting), self._answers
        self._waiting.clear()
        self._answers = {}
        try:
            crashes = self._write(rows) if rows else []
        except StorageError as error:
            self._hours.clear()  # what is sent again counts once
            if not self._complained:
                self._complained = True
                log.warning("%s: boards' crash reports are not kept", error)
            return {}
        self._complained = False
        for crash in crashes:
            with log_context(device=crash.device):
                log.warning("device %s crashed: %s%s", crash.device, crash.text, _place(crash.body))
        return {device: CrashStored(number) for device, number in sorted(answers.items())}

    def _has_quota(self, device: str) -> bool:
        """Whether a board may have another crash in this hour."""
        now = self._monotonic()
        since, used = self._hours.get(device, (now, 0))
        if now - since >= _HOUR_S:
            since, used = now, 0
        self._hours[device] = since, used + 1
        return used < PER_BOARD

    def _write(self, rows: list[tuple[Any, ...]]) -> list[BoardCrash]:
        with self._file.transaction() as connection:
            last = connection.execute("SELECT max(id) FROM crashes").fetchone()[0] or 0
            connection.executemany(_INSERT, rows)
            crashes = [_row(r) for r in connection.execute(f"{_SELECT} WHERE id > ? ORDER BY id", (last,))]
            for device in {crash.device for crash in crashes}:
                connection.execute(_TRIM, (device, device, PER_BOARD))
            connection.execute(_TRIM_ALL, (IN_ALL,))
        return crashes


_SELECT = "SELECT id, device, at, received, text, body FROM crashes"


def read_crashes(folder: Path, device: str | None = None, most: int = 1000) -> list[BoardCrash]:
    """The latest `most` crashes of all boards or of one, oldest first."""
    path = folder / FILE
    if not path.is_file():
        return []
    where = "" if device is None else "WHERE device = ?"
    values = [most] if device is None else [device, most]
    with sqlite_errors(path, _HINT), closing(connect_reader(path)) as connection:
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            return []  # made this moment
        rows = connection.execute(f"{_SELECT} {where} ORDER BY id DESC LIMIT ?", values).fetchall()
    return [_row(r) for r in reversed(rows)]


def frames_of(crash: BoardCrash) -> list[str]:
    """A crash's stack frames, as lines."""
    rows = []
    for frame in crash.body.get("frames", ()):
        at = f"{frame['module']}:{frame['line']} in {frame['function']}" if frame["line"] else frame["module"]
        rows.append(at)
    return rows


def _row(values: tuple[Any, ...]) -> BoardCrash:
    try:
        number, device, at, received, text, body = values
        return BoardCrash(number, device, at, received, text, json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"a row of boards' crashes is damaged ({error})", hint=f"Delete {FILE}.") from error


def _place(body: Mapping[str, Any]) -> str:
    ours = [f for f in body["frames"] if f["line"]]
    return f" ({ours[0]['module']}:{ours[0]['line']})" if ours else ""
