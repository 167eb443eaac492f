"""Crash reports and last warnings of boards on the server's disk, with limits per board and in all.

They have a file of their own, because boards belong to the fleet and not to a job, and because its loss costs nothing
but these reports. The server collects reports and writes them a few times a second at most. A board keeps its report
until the server acknowledges that it is on the disk.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core.closeable import Closeable
from fedprune.core.errors import StorageError
from fedprune.core.text import one_line
from fedprune.output.log_lines import log_context
from fedprune.wire.fleet_messages import CrashReport, CrashStored
from fedprune.wire.messages import MAX_WARNING_TEXT, MAX_WARNINGS, BoardWarning
from fedprune_server.storage.sqlite_file import LOOP_BUSY_TIMEOUT_S, SqliteFile, connect_reader, sqlite_errors

log = logging.getLogger("fedprune.server")

# File of the state folder.
CRASH_FILE = "crashes.db"

# Maximum number of kept crashes: of one board, which may also send no more in an hour, and of all boards. A board that
# crashes in a loop must not push out the reports of the others.
MAX_CRASHES_PER_BOARD, MAX_CRASHES = 10, 10_000
MAX_ALL_WARNINGS = 100_000

# Maximum number of crashes that wait to be written: it bounds memory while the disk is slow. Others are dropped here,
# and their boards send them again.
_MAX_WAITING_CRASHES = 4096

_HOUR_S = 3600.0

# Seconds from 1970 to the last day of the year 9999, beyond which `time.localtime` may fail: a board's clock may show
# any time.
_LATEST_TIME_S = 253_402_214_400

_FORMAT = 2
_HINT = "It may be deleted: it holds boards' crash reports and warnings alone."
_TABLE = """
CREATE TABLE IF NOT EXISTS crashes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, number INTEGER NOT NULL, at REAL NOT NULL,
    received REAL NOT NULL, text TEXT NOT NULL, body TEXT NOT NULL, UNIQUE (device, number));
CREATE TABLE IF NOT EXISTS warnings (
    id INTEGER PRIMARY KEY AUTOINCREMENT, device TEXT NOT NULL, at REAL NOT NULL, text TEXT NOT NULL,
    UNIQUE (device, text))
"""
_INSERT_WARNING = "INSERT OR REPLACE INTO warnings (device, at, text) VALUES (?,?,?)"
_INSERT = "INSERT OR IGNORE INTO crashes (device, number, at, received, text, body) VALUES (?,?,?,?,?,?)"
_TRIM = """
DELETE FROM crashes WHERE device = ? AND id <= (
    SELECT id FROM crashes WHERE device = ? ORDER BY id DESC LIMIT 1 OFFSET ?)
"""
_TRIM_ALL = "DELETE FROM crashes WHERE id <= (SELECT id FROM crashes ORDER BY id DESC LIMIT 1 OFFSET ?)"
_TRIM_WARNINGS, _TRIM_ALL_WARNINGS = (statement.replace("crashes", "warnings") for statement in (_TRIM, _TRIM_ALL))


@dataclass(frozen=True)
class BoardCrash:
    """A crash of a board.

    Attributes:
        id: Number of the crash, in the order of arrival.
        at: Time of the crash by the board's clock, in seconds since 1970.
        received: Time of the report's arrival by the server's clock.
        text: One line about the crash.
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
        return f"{board_time(self.at)} {self.device}: {self.text}"


class CrashStore(Closeable):
    """Boards' crashes in a state folder.

    Raises `StorageError` if the file is damaged, of another version, or the disk fails.
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock, self._monotonic = clock, monotonic
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._acknowledgements: dict[str, int] = {}
        self._new_warnings: dict[str, list[tuple[str, int, str]]] = {}
        self._last_warnings: dict[str, int] = {}  # hashes of what boards sent last: many births repeat it
        self._hourly_counts: dict[str, tuple[float, int]] = {}
        self._complained = False
        self._file = SqliteFile(folder / CRASH_FILE, _TABLE, _FORMAT, _HINT, busy_timeout_s=LOOP_BUSY_TIMEOUT_S)

    def close(self) -> None:
        self._file.close()

    def add(self, message: CrashReport) -> None:
        """Add a board's crash. One above its quota is not kept but acknowledged, so that the board stops sending it."""
        now, text = self._clock(), one_line(message.text, 1000)
        frames = [{**frame, "module": one_line(frame["module"], 128), "function": one_line(frame["function"], 128)}
                 for frame in message.frames]  # fmt: skip
        body = {
            "cause": one_line(message.cause, 64),
            "frames": frames,
            "release": one_line(message.release, 256),
            "slot": one_line(message.slot, 64),
            "uptime_s": message.uptime_s,
            "temperature_c": message.temperature_c,
            "memory_available": message.memory_available,
            "memory_total": message.memory_total,
        }
        if len(self._waiting) >= _MAX_WAITING_CRASHES:
            return  # the board sends it again
        self._acknowledgements[message.device] = message.number
        if self._has_quota(message.device):
            self._waiting.append((message.device, message.number, message.at, now, text, json.dumps(body)))

    def note_warnings(self, device: str, warnings: Sequence[BoardWarning]) -> None:
        """Note the last warnings of a board, to be saved with crashes. Those of its earlier runs stay beside them."""
        rows = [(device, w["at"], one_line(w["text"], MAX_WARNING_TEXT)) for w in warnings]
        if rows and self._last_warnings.get(device) != hash(tuple(rows)):
            self._last_warnings[device], self._new_warnings[device] = hash(tuple(rows)), rows

    def save(self) -> dict[str, CrashStored]:
        """Save new crashes; returns the acknowledgements by board. If the disk fails, boards send them again."""
        if not self._acknowledgements and not self._new_warnings:
            return {}
        rows, answers, warnings = list(self._waiting), self._acknowledgements, self._new_warnings
        self._waiting.clear()
        self._acknowledgements, self._new_warnings = {}, {}
        try:
            crashes = self._write(rows, warnings) if rows or warnings else []
        except StorageError as error:
            self._hourly_counts.clear()  # a crash that is sent again must not count twice
            self._last_warnings.clear()  # the next birth brings them again
            if not self._complained:  # logged once per failure of the disk, not with every report
                self._complained = True
                log.warning("%s: boards' crash reports are not kept", error)
            return {}
        self._complained = False
        for crash in crashes:
            own_code = [f" ({f['module']}:{f['line']})" for f in crash.body["frames"] if f["line"]]
            with log_context(device=crash.device):
                log.warning("device %s crashed: %s%s", crash.device, crash.text, "".join(own_code[:1]))
        return {device: CrashStored(number) for device, number in sorted(answers.items())}

    def _has_quota(self, device: str) -> bool:
        """Whether a board may have another crash in this hour."""
        now = self._monotonic()
        hour_began_at, count = self._hourly_counts.get(device, (now, 0))
        if now - hour_began_at >= _HOUR_S:
            hour_began_at, count = now, 0
        self._hourly_counts[device] = hour_began_at, count + 1
        return count < MAX_CRASHES_PER_BOARD

    def _write(
        self, rows: list[tuple[Any, ...]], warnings: Mapping[str, list[tuple[str, int, str]]]
    ) -> list[BoardCrash]:
        with self._file.transaction() as connection:
            last_id = connection.execute("SELECT max(id) FROM crashes").fetchone()[0] or 0
            connection.executemany(_INSERT, rows)
            crashes = [_crash_of_row(r) for r in connection.execute(f"{_SELECT} WHERE id > ? ORDER BY id", (last_id,))]
            for device in {crash.device for crash in crashes}:
                connection.execute(_TRIM, (device, device, MAX_CRASHES_PER_BOARD))
            connection.execute(_TRIM_ALL, (MAX_CRASHES,))
            for device, device_rows in warnings.items():
                connection.executemany(_INSERT_WARNING, device_rows)
                connection.execute(_TRIM_WARNINGS, (device, device, MAX_WARNINGS))
            connection.execute(_TRIM_ALL_WARNINGS, (MAX_ALL_WARNINGS,))
        return crashes


_SELECT = "SELECT id, device, at, received, text, body FROM crashes"


def read_crashes(folder: Path, device: str | None = None, limit: int = 1000) -> list[BoardCrash]:
    """The latest `limit` crashes of all boards or of one, oldest first."""
    where = "" if device is None else "WHERE device = ?"
    values = [limit] if device is None else [device, limit]
    rows = _read_rows(folder / CRASH_FILE, f"{_SELECT} {where} ORDER BY id DESC LIMIT ?", values)
    return [_crash_of_row(r) for r in reversed(rows)]


def read_warnings(folder: Path, device: str) -> list[BoardWarning]:
    """The last warnings that a board has reported, oldest first."""
    rows = _read_rows(folder / CRASH_FILE, "SELECT at, text FROM warnings WHERE device = ? ORDER BY id", [device])
    return [{"at": int(at), "text": text} for at, text in rows]


def board_time(at: float) -> str:
    """A time on a board's clock, which may show any."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(min(at, _LATEST_TIME_S)))


def _read_rows(path: Path, query: str, values: Sequence[object]) -> list[tuple[Any, ...]]:
    if not path.is_file():
        return []
    with sqlite_errors(path, _HINT), closing(connect_reader(path)) as connection:
        if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
            return []  # another process has just created the file, without tables yet
        return connection.execute(query, values).fetchall()


def frames_of(crash: BoardCrash) -> list[str]:
    """A crash's stack frames, as lines."""
    return [
        f"{frame['module']}:{frame['line']} in {frame['function']}" if frame["line"] else frame["module"]
        for frame in crash.body.get("frames", ())
    ]


def _crash_of_row(values: tuple[Any, ...]) -> BoardCrash:
    try:
        number, device, at, received, text, body = values
        return BoardCrash(number, device, at, received, text, json.loads(body))
    except (ValueError, TypeError, RecursionError) as error:
        raise StorageError(f"a row of boards' crashes is damaged ({error})", hint=f"Delete {CRASH_FILE}.") from error
