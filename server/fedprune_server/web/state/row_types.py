"""Rows in what a server tells its console: devices, rollouts, groups of channels, lines of logs."""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from fedprune.wire.fields import (
    Count,
    Device,
    Items,
    Job,
    Metrics,
    Real,
    choice,
    hexadecimal,
    number,
    record,
    text,
    whole,
)

DEVICE_STATES = (
    "offline",
    "ready",
    "queued",
    "extracting",
    "offered",
    "training",
    "pulling",
    "stored",
    "folded",
    "refused",
    "excluded",
    "elsewhere",
    "waiting",
    "revoked",
    "unknown",
)
"""What a device is doing, as it can be filtered by; `doing` says it in words."""

FIGURES = (
    "round",
    "step",
    "train",
    "transfer",
    "latency",
    "memory",
    "serving_memory",
    "storage",
    "download",
    "upload",
    "step_energy",
    "latency_energy",
)
STATUSES = ("member", "waiting", "revoked")
SEVERITIES = ("info", "warning", "critical")
LEVELS = ("debug", "info", "warning", "error")
ORDER_KINDS = (
    "approve",
    "coverage",
    "deny",
    "look",
    "pause",
    "release_quarantine",
    "resume",
    "revoke",
    "rollout_back",
    "rollout_pause",
    "rollout_resume",
    "rollout_start",
    "rollout_stop",
)

Time = Annotated[float, number(0.0)]
"""Seconds since 1970."""

Seconds = Annotated[float, number(0.0)]
Share = Annotated[float, number(0.0, 1.0)]
Short = Annotated[str, text(200)]
LongText = Annotated[str, text(2000)]


class Installation(TypedDict):
    """A device's progress with the latest rollout's release."""

    number: Count
    state: Short
    reason: LongText
    at: Time


class Quarantine(TypedDict):
    until: Time | None
    reason: LongText


class ChannelRun(TypedDict):
    """Neighbouring channels, by rank, that the same share of the devices holds."""

    channels: Annotated[int, whole(1)]
    share: Share


class Spread(TypedDict):
    mean: Annotated[float, number(0.0)]
    max: Annotated[float, number(0.0)]


class Part(TypedDict):
    """A device's part in a round."""

    round: Count
    at: Time
    progress: Short
    density: Share
    samples: Count
    metrics: Metrics
    reason: LongText


class DeviceColumns(TypedDict):
    """The columns of a device's row: one for each device, whatever jobs it takes part in.

    `job` is the one that has it, or had it last; `slot` and `release` are those that run there."""

    name: Device
    job: Job | None
    online: bool
    state: Annotated[str, choice(*DEVICE_STATES)]
    doing: Short
    profile: Short
    slot: Annotated[str, choice("a", "b")] | None
    release: Count | None
    update: Installation | None
    density: Share | None
    parameters: Count | None
    samples: Count | None
    seen_at: Time | None
    temperature_c: Annotated[float, number(-100.0, 300.0)] | None
    versions: Annotated[dict[Short, Short], Items(8, "entries")]
    bytes_down: Count
    bytes_up: Count
    seconds: Seconds | None
    accuracy: Share | None
    loss: Real | None
    staleness: Count | None
    quarantine: Quarantine | None
    status: Annotated[str, choice(*STATUSES)]
    key: Annotated[str, text(64)] | None
    behind: Short | None
    excluded: LongText | None


class Figure(TypedDict):
    """A quantity that was predicted or measured of a device's rounds."""

    what: Annotated[str, choice(*FIGURES)]
    unit: Annotated[str, choice("s", "bytes", "J")]
    predicted: Annotated[float, number(0.0)] | None
    measured: Annotated[float, number(0.0)] | None


class RolloutColumns(TypedDict):
    """The columns of a rollout's row.

    `subject` is the release's number, `before` what its boards had before and may be taken back to, `leaves` the number
    of the release that it takes boards back from."""

    name: Short
    number: Count
    release: Short
    stage: Annotated[int, whole(-1)]
    stages: Count
    of: Count
    done: Count
    failed: Count
    given: Count
    waiting: Count
    state: Short
    why: LongText
    at: Time
    failures: Annotated[dict[Short, LongText], Items(50, "entries")]
    subject: Count
    before: Short | None
    leaves: Count | None


class ChannelGroup(TypedDict):
    """A group of channels, as runs."""

    name: Short
    channels: Count
    held: Annotated[tuple[ChannelRun, ...], Items(8192)]


class HeldChannels(TypedDict):
    """The channels of a group that a device holds."""

    group: Short
    kept: Count
    of: Count
    which: Annotated[str, hexadecimal(0, 16384)] | None


class BoardLine(TypedDict):
    """A line of a board's own log: `at` by its clock, `received` by the server's."""

    at: Time
    received: Time
    level: Annotated[str, choice(*LEVELS)]
    count: Annotated[int, whole(1)]
    text: LongText


class BoardCrash(TypedDict):
    """An unexpected end of a board's run."""

    at: Time
    received: Time
    cause: Short
    text: LongText
    release: Short
    slot: Short
    uptime_s: Seconds | None
    temperature_c: Annotated[float, number(-100.0, 300.0)] | None
    memory_available: Count | None
    memory_total: Count | None
    frames: Annotated[tuple[Annotated[str, text(300)], ...], Items(16)]


DeviceRow = Annotated[dict[str, Any], record(DeviceColumns)]
RolloutRow = Annotated[dict[str, Any], record(RolloutColumns)]
