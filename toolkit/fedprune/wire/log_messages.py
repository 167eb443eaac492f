"""Messages by which boards tell their server what went wrong with them: lines of their log, and reports of crashes.

A board says none of it before its server has asked (`LogWanted`), which older servers never do; and a server asks only
boards whose births name the ability `LOG`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedprune.core.errors import ProtocolError, shown
from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.schema import Schema, described, schema_of
from fedprune.wire.validation import Check

LOG = "log"
"""Ability of a board: it sends warnings and errors of its log, and reports of crashes, to a server that asks."""

LEVELS = ("warning", "error")
MAX_LINES = 64
MAX_TEXT = 500
MAX_FRAMES = 16
"""Lines of one message, characters of one line, frames of a crash."""

_COUNT = check.whole()
_REAL = check.optional(check.number(-1e12, 1e12))


def _rows(limit: int, checks: Mapping[str, Check]) -> Check:
    """A list of objects, each with these keys; what else they have is left out."""
    row: Schema = {
        "type": "object",
        "properties": {key: schema_of(checked) for key, checked in checks.items()},
        "required": list(checks),
    }

    @described({"type": "array", "maxItems": limit, "items": row})
    def rows(where: str, value: object) -> tuple[dict[str, Any], ...]:
        if not isinstance(value, (list, tuple)) or len(value) > limit:
            raise ProtocolError(where, expected=f"a list of at most {limit} objects", got=shown(value))
        found = []
        for i, each in enumerate(value):
            if not isinstance(each, Mapping):
                raise ProtocolError(f"{where}[{i}]", expected="an object", got=shown(each))
            for key in checks:
                if key not in each:
                    raise ProtocolError(f"{where}[{i}].{key}", expected="a value", got="nothing")
            found.append({key: checked(f"{where}[{i}].{key}", each[key]) for key, checked in checks.items()})
        return tuple(found)

    return rows


_LINES = _rows(
    MAX_LINES,
    {
        "number": _COUNT,
        "at": _COUNT,
        "level": check.choice(*LEVELS),
        "count": check.whole(1, 2**31 - 1),
        "text": check.text(MAX_TEXT),
    },
)
_FRAMES = _rows(MAX_FRAMES, {"module": check.text(128), "line": check.whole(0, 2**31 - 1), "function": check.text(128)})


@dataclass(frozen=True)
class BoardLines(CheckedMessage):
    """Warnings and errors of a board's log.

    Attributes:
        device: The board.
        lines: Each with `number` (larger than that of every earlier one), `at` (seconds since 1970, by the board's
            clock), `level`, `count` (how often it came) and `text`.
    """

    device: str
    lines: tuple[dict[str, Any], ...]

    kind: ClassVar[str] = "log"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device, "lines": _LINES}


@dataclass(frozen=True)
class CrashReport(CheckedMessage):
    """How a board's last run ended, where nobody had asked it to end.

    Attributes:
        device: The board.
        number: As a line's, of the same count.
        at: When, in seconds since 1970 by the board's clock.
        cause: `error` (one with an exit code), `exception`, `thread`, `signal` or `killed`; others may come.
        text: The exception or signal, in words.
        frames: Where, the innermost first: `module`, `line`, `function`.
        release: The runtime that ran, with its version.
        slot: Which of two installed releases it was; empty without a launcher.
        uptime_s: Seconds that it had run, or None.
        temperature_c: The board's temperature, or None.
        memory_available: Bytes of memory that were free, or None.
        memory_total: Bytes of memory, or None.
    """

    device: str
    number: int
    at: int
    cause: str
    text: str
    frames: tuple[dict[str, Any], ...]
    release: str
    slot: str
    uptime_s: float | None = None
    temperature_c: float | None = None
    memory_available: int | None = None
    memory_total: int | None = None

    kind: ClassVar[str] = "crash"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        "number": _COUNT,
        "at": _COUNT,
        "cause": check.text(64),
        "text": check.text(2 * MAX_TEXT),
        "frames": _FRAMES,
        "release": check.text(256),
        "slot": check.text(64),
        "uptime_s": _REAL,
        "temperature_c": _REAL,
        "memory_available": check.optional(_COUNT),
        "memory_total": check.optional(_COUNT),
    }


@dataclass(frozen=True)
class LogWanted(CheckedMessage):
    """The server takes a board's log; said after every birth that names `LOG`, and when something of it is kept.

    Attributes:
        lines: How many lines of it an hour; 0 for none.
        bytes: How many bytes of their texts an hour.
        kept: The highest number of a line or crash that is on the server's disk; None where nothing came yet.
    """

    lines: int
    bytes: int
    kept: int | None = None

    kind: ClassVar[str] = "log_wanted"
    checks: ClassVar[Mapping[str, Check]] = {
        "lines": check.whole(0, 100_000),
        "bytes": check.whole(0, 2**31 - 1),
        "kept": check.optional(_COUNT),
    }
    newer: ClassVar[frozenset[str]] = frozenset({"kept"})
