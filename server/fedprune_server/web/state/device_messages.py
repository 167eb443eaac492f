"""What a server tells its console of devices: their rows, what was asked of one, and which channels the fleet holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.fields import (
    Count,
    Device,
    FreeObject,
    Items,
    Job,
    whole,
)
from fedprune_server.web.state.row_types import (
    ChannelGroup,
    DeviceRow,
    Figure,
    HeldChannels,
    Part,
)

MAX_ROWS = 200
"""Devices of which one line tells."""


@dataclass(frozen=True)
class Devices(CheckedMessage, kind="devices"):
    """Rows of devices that have changed, as `DeviceRow`, and names of those that are there no more."""

    rows: Annotated[tuple[DeviceRow, ...], Items(MAX_ROWS)]
    gone: Annotated[tuple[Device, ...], Items(MAX_ROWS)] = ()


@dataclass(frozen=True)
class DeviceDetails(CheckedMessage, kind="device"):
    """What an operator asked to see of a device."""

    name: Device
    """The device."""
    job: Job
    """The job that this is about."""
    plan: FreeObject | None
    """The plan: density, limits, which of them binds; None where there is none."""
    figures: Annotated[tuple[Figure, ...], Items(32)]
    """What was foretold of its rounds beside what was measured."""
    history: Annotated[tuple[Part, ...], Items(100)]
    """Its parts in the latest rounds, newest first."""
    widths: Annotated[tuple[HeldChannels, ...], Items(2000)]
    """Kept channels per group and, where it is known, which of the group's own order: a bit each, the first one
    highest, as hex."""


@dataclass(frozen=True)
class Coverage(CheckedMessage, kind="coverage"):
    """Which share of the devices holds which channels. It may come in several lines, of which one is the last."""

    job: Job
    round: Count
    part: Annotated[int, whole(0, 10000)]
    last: bool
    groups: Annotated[tuple[ChannelGroup, ...], Items(2000)]
