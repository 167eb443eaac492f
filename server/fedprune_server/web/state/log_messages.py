"""What a server tells its console as it happens: alerts, lines of logs, and what boards say of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check
from fedprune_server.web.state.row_checks import (
    COUNT,
    CRASH,
    LEVELS,
    LINE,
    SEVERITIES,
    SHORT,
    TEXT,
    TIME,
    list_of,
    row_of,
    truth,
)


@dataclass(frozen=True)
class AlertNews(CheckedMessage):
    """Something that an operator should know, or, with `gone_at`, that it is over."""

    id: str
    at: float
    alert: str
    severity: str
    device: str | None
    job: str | None
    text: str
    gone_at: float | None = None

    kind: ClassVar[str] = "alert"
    checks: ClassVar[Mapping[str, Check]] = {
        "id": check.text(128),
        "at": TIME,
        "alert": SHORT,
        "severity": check.choice(*SEVERITIES),
        "device": check.optional(check.device),
        "job": check.optional(check.job),
        "text": TEXT,
        "gone_at": check.optional(TIME),
    }


@dataclass(frozen=True)
class LogLine(CheckedMessage):
    """A line of the server's log, or, with `board`, of a board's own."""

    at: float
    level: str
    text: str
    device: str | None = None
    job: str | None = None
    round: int | None = None
    board: bool = False

    kind: ClassVar[str] = "log"
    checks: ClassVar[Mapping[str, Check]] = {
        "at": TIME,
        "level": check.choice(*LEVELS),
        "text": TEXT,
        "device": check.optional(check.device),
        "job": check.optional(check.job),
        "round": check.optional(COUNT),
        "board": truth,
    }


@dataclass(frozen=True)
class BoardLog(CheckedMessage):
    """What a board told of its log, and how its runs ended that nobody had ended.

    Attributes:
        name: The board.
        lines: Its latest lines, newest first, as `LINE`.
        crashes: Its latest crashes, newest first, as `CRASH`.
    """

    name: str
    lines: tuple[dict[str, Any], ...]
    crashes: tuple[dict[str, Any], ...]

    kind: ClassVar[str] = "board_log"
    checks: ClassVar[Mapping[str, Check]] = {
        "name": check.device,
        "lines": list_of(row_of(LINE), 100),
        "crashes": list_of(row_of(CRASH), 10),
    }
