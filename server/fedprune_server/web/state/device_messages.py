"""What a server tells its console of devices: their rows, what was asked of one, and which channels the fleet holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check
from fedprune_server.web.state.row_checks import (
    COUNT,
    DEVICE,
    FIGURE,
    GROUP,
    HELD,
    SHARE,
    SHORT,
    TEXT,
    TIME,
    list_of,
    row_of,
    truth,
)

MAX_ROWS = 200
"""Devices of which one line tells."""


@dataclass(frozen=True)
class Devices(CheckedMessage):
    """Rows of devices that have changed, as `DEVICE`, and names of those that are there no more."""

    rows: tuple[dict[str, Any], ...]
    gone: tuple[str, ...] = ()

    kind: ClassVar[str] = "devices"
    checks: ClassVar[Mapping[str, Check]] = {
        "rows": list_of(row_of(DEVICE), MAX_ROWS),
        "gone": list_of(check.device, MAX_ROWS),
    }


@dataclass(frozen=True)
class DeviceDetails(CheckedMessage):
    """What an operator asked to see of a device.

    Attributes:
        name: The device.
        job: The job that this is about.
        plan: The plan: density, limits, which of them binds; None where there is none.
        figures: What was foretold of its rounds beside what was measured.
        history: Its parts in the latest rounds, newest first.
        widths: Kept channels per group and, where it is known, which of the group's own order: a bit each, the first
            one highest, as hex.
    """

    name: str
    job: str
    plan: dict[str, Any] | None
    figures: tuple[dict[str, Any], ...]
    history: tuple[dict[str, Any], ...]
    widths: tuple[dict[str, Any], ...]

    kind: ClassVar[str] = "device"
    checks: ClassVar[Mapping[str, Check]] = {
        "name": check.device,
        "job": check.job,
        "plan": check.optional(check.plain),
        "figures": list_of(row_of(FIGURE), 32),
        "history": list_of(
            row_of(
                {
                    "round": COUNT,
                    "at": TIME,
                    "progress": SHORT,
                    "density": SHARE,
                    "samples": COUNT,
                    "metrics": check.metrics,
                    "reason": TEXT,
                }
            ),
            100,
        ),
        "widths": list_of(row_of(HELD), 2000),
    }


@dataclass(frozen=True)
class Coverage(CheckedMessage):
    """Which share of the devices holds which channels. It may come in several lines, of which one is the last."""

    job: str
    round: int
    part: int
    last: bool
    groups: tuple[dict[str, Any], ...]

    kind: ClassVar[str] = "coverage"
    checks: ClassVar[Mapping[str, Check]] = {
        "job": check.job,
        "round": COUNT,
        "part": check.whole(0, 10_000),
        "last": truth,
        "groups": list_of(row_of(GROUP), 2000),
    }
