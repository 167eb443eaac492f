"""Records that a server publishes for its console: one dataclass for each kind of record in `status.db`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

LOG_LEVELS = ("debug", "info", "warning", "error")

# A device's membership; the order is that of a page's filter.
MEMBER_STATUSES = ("member", "waiting", "revoked")

# A device's activity, as a page filters by it: its part's progress or, without one, the reason.
DEVICE_STATES = (
    "ready", "queued", "extracting", "offered", "training", "pulling", "stored", "folded", "refused", "late",
    "lost", "gone", "excluded", "elsewhere", "offline", "waiting", "revoked", "unknown",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True)
class StatusRecord:
    """A record; a later one of the same kind, `scope` and `key` replaces it."""

    kind: ClassVar[str]
    _scope: ClassVar[str]
    _key: ClassVar[str]

    def __init_subclass__(cls, *, kind: str, scope: str = "", key: str = "") -> None:
        cls.kind, cls._scope, cls._key = kind, scope, key

    @property
    def scope(self) -> str:
        """The job or device that the record is about; empty for none."""
        return str(getattr(self, self._scope) or "") if self._scope else ""

    @property
    def key(self) -> str | int:
        """The key of the record among those of its kind and scope."""
        return getattr(self, self._key) if self._key else ""


@dataclass(frozen=True)
class Site(StatusRecord, kind="site"):
    version: str
    site: str
    jobs: tuple[str, ...]
    started_at: float
    connected: bool
    broker: str
    database: str
    blobs: str
    insecure: bool


@dataclass(frozen=True)
class PublishedJob(StatusRecord, kind="job", scope="name"):
    """A job's current state. `parts` counts the devices of the round by progress."""

    name: str
    round: int
    rounds: int
    phase: str
    deadline_at: float | None
    paused: bool
    metrics: dict[str, float]
    strategy: str
    model_digest: str
    parts: dict[str, int]
    parameters: int


@dataclass(frozen=True)
class FinishedRound(StatusRecord, kind="round", scope="job", key="round"):
    """A finished round, with rejected updates by reason. None stands for numbers that a restart has lost."""

    job: str
    round: int
    at: float
    seconds: float | None
    metrics: dict[str, float]
    counted: int | None
    devices: int | None
    refused: dict[str, int]
    bytes_down: int | None
    bytes_up: int | None
    staleness: dict[str, float] | None
    model: str


@dataclass(frozen=True)
class DeviceDetails(StatusRecord, kind="device", scope="name"):
    """A device's plan, its predictions next to its measurements, its latest rounds and its channels.

    Attributes:
        plan: Density, limits and the binding limit; None without a plan.
        history: The device's part in the latest rounds, newest first.
        widths: Kept channels per group and, where the ranking is here, which: a bit for each channel of the group, the
            first one highest, as hex.
    """

    name: str
    job: str
    plan: Row | None
    figures: tuple[Row, ...]
    history: tuple[Row, ...]
    widths: tuple[Row, ...]
    at: float


@dataclass(frozen=True)
class BoardCrashes(StatusRecord, kind="crashes", scope="name"):
    """A board's latest crashes and last warnings, newest first."""

    name: str
    crashes: tuple[Row, ...]
    warnings: tuple[Row, ...] = ()


@dataclass(frozen=True)
class ChannelCoverage(StatusRecord, kind="coverage", scope="job"):
    """The share of devices that holds each channel: per group, runs of channels in the order of their rank."""

    job: str
    round: int
    groups: tuple[Row, ...]
    at: float


@dataclass(frozen=True)
class Rollouts(StatusRecord, kind="rollouts"):
    """The latest rollouts, newest first, and the names of releases that can be rolled out."""

    rows: tuple[Row, ...]
    releases: tuple[str, ...] = ()


@dataclass(frozen=True)
class AlertStatus(StatusRecord, kind="alert", key="id"):
    """An alert; `gone_at` is set once it is closed."""

    id: str
    at: float
    alert: str
    severity: str
    device: str | None
    job: str | None
    text: str
    gone_at: float | None = None


@dataclass(frozen=True)
class LogLine(StatusRecord, kind="log", scope="device"):
    """A line of the server's log."""

    at: float
    level: str
    text: str
    device: str | None = None
    job: str | None = None
    round: int | None = None
