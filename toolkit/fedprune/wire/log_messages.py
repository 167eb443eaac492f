"""Messages with which boards report problems to their server: lines of their log, and crashes.

A board sends none before the server's `LogRequest`, which older servers never send; and a server sends it only to
boards with the ability `LOG`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypedDict

from fedprune.wire.checked_message import CheckedMessage, newer
from fedprune.wire.fields import Count, Device, Items, choice, number, text, whole

LOG = "log"
"""Ability of a board: on request it sends warnings and errors of its log, and reports of crashes."""

LEVELS = ("warning", "error")
MAX_LINES = 64
MAX_TEXT = 500
MAX_FRAMES = 16
"""Lines of one message, characters of one line, frames of a crash."""

Measured = Annotated[float, number(-1e12, 1e12)]


class LogEntry(TypedDict):
    """A line of a board's log, numbered in rising order, with its time by the board's clock (seconds since 1970) and
    how often it came."""

    number: Count
    at: Count
    level: Annotated[str, choice(*LEVELS)]
    count: Annotated[int, whole(1, 2**31 - 1)]
    text: Annotated[str, text(MAX_TEXT)]


class Frame(TypedDict):
    """A frame of a crash's traceback."""

    module: Annotated[str, text(128)]
    line: Annotated[int, whole(0, 2**31 - 1)]
    function: Annotated[str, text(128)]


@dataclass(frozen=True)
class LogReport(CheckedMessage, kind="log"):
    """Warnings and errors of a board's log."""

    device: Device
    lines: Annotated[tuple[LogEntry, ...], Items(MAX_LINES)]
    """Each with `number` (larger than that of every earlier one), `at` (seconds since 1970, by the board's clock),
    `level`, `count` (how often it came) and `text`."""


@dataclass(frozen=True)
class CrashReport(CheckedMessage, kind="crash"):
    """An unexpected end of a board's last run."""

    device: Device
    number: Count
    """A number as those of lines, from the same counter."""
    at: Count
    """Time in seconds since 1970 by the board's clock."""
    cause: Annotated[str, text(64)]
    """`error` (one with an exit code), `exception`, `thread`, `signal` or `killed`; others may come."""
    text: Annotated[str, text(2 * MAX_TEXT)]
    """The exception or signal, for people."""
    frames: Annotated[tuple[Frame, ...], Items(MAX_FRAMES)]
    """The traceback, innermost frame first."""
    release: Annotated[str, text(256)]
    """The runtime that ran, with its version."""
    slot: Annotated[str, text(64)]
    """Which of two installed releases it was; empty without a launcher."""
    uptime_s: Measured | None = None
    """Seconds that it had run, or None."""
    temperature_c: Measured | None = None
    """The board's temperature, or None."""
    memory_available: Count | None = None
    """Bytes of memory that were free, or None."""
    memory_total: Count | None = None
    """Bytes of memory, or None."""


@dataclass(frozen=True)
class LogRequest(CheckedMessage, kind="log_wanted"):
    """A server's request for a board's log, after every birth with the ability `LOG` and whenever it has stored
    lines."""

    lines: Annotated[int, whole(0, 100000)]
    """Lines per hour; 0 for none."""
    bytes: Annotated[int, whole(0, 2**31 - 1)]
    """Bytes of their texts per hour."""
    kept: Count | None = newer()
    """The highest number of a line or crash that is on the server's disk; None for none yet."""
