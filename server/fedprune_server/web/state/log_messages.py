"""What a server tells its console as it happens: alerts, lines of logs, and what boards say of their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.fields import (
    Count,
    Device,
    Items,
    Job,
    choice,
    text,
)
from fedprune_server.web.state.row_types import (
    LEVELS,
    SEVERITIES,
    BoardCrash,
    BoardLine,
    LongText,
    Short,
    Time,
)


@dataclass(frozen=True)
class AlertNews(CheckedMessage, kind="alert"):
    """Something that an operator should know, or, with `gone_at`, that it is over."""

    id: Annotated[str, text(128)]
    at: Time
    alert: Short
    severity: Annotated[str, choice(*SEVERITIES)]
    device: Device | None
    job: Job | None
    text: LongText
    gone_at: Time | None = None


@dataclass(frozen=True)
class LogLine(CheckedMessage, kind="log"):
    """A line of the server's log, or, with `board`, of a board's own."""

    at: Time
    level: Annotated[str, choice(*LEVELS)]
    text: LongText
    device: Device | None = None
    job: Job | None = None
    round: Count | None = None
    board: bool = False


@dataclass(frozen=True)
class BoardLog(CheckedMessage, kind="board_log"):
    """What a board told of its log, and how its runs ended that nobody had ended."""

    name: Device
    """The board."""
    lines: Annotated[tuple[BoardLine, ...], Items(100)]
    """Its latest lines, newest first, as `BoardLine`."""
    crashes: Annotated[tuple[BoardCrash, ...], Items(10)]
    """Its latest crashes, newest first, as `BoardCrash`."""
