"""Events of a job: everything that a coordinator learns. Blobs are named by digest, as in `commands`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.jobs.failure_kind import FailureKind


@dataclass(frozen=True)
class DeviceBorn:
    """A device announced itself, perhaps not for the first time, or has become free for this job.

    Attributes:
        session: Number of its connection.
        profile, probe: Its hardware profile, and what it measured of itself, as JSON.
        is_last_of_batch: False if births of further devices follow at once: a round begins only after the last of them.
    """

    device: str
    session: int
    profile: dict[str, Any]
    samples: int
    probe: dict[str, Any] | None = None
    codecs: tuple[str, ...] = ()
    is_last_of_batch: bool = True


@dataclass(frozen=True)
class DeviceDied:
    """A device's connection ended; counts only for the session that it names.

    Attributes:
        heard_at: When the device's last message came, in seconds since 1970; None if unknown. The broker may tell of an
            end much later.
    """

    device: str
    session: int
    heard_at: float | None = None


@dataclass(frozen=True)
class Scored:
    """The ranking of this round is stored under `ranking` (a selection at full width), importances under `order`.
    `model` and `memory` are those with which the round begins, if not with the command's."""

    round: int
    ranking: str
    order: str | None = None
    model: str = ""
    memory: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Extracted:
    """A device's submodel is stored; `offer` is all that its offer needs."""

    round: int
    device: str
    attempt: int
    offer: dict[str, Any]


@dataclass(frozen=True)
class PartEvent:
    """An event about one attempt of a device at a round."""

    device: str
    round: int
    attempt: int


@dataclass(frozen=True)
class WorkReported(PartEvent):
    """A device that has answered nothing since it connected works on its offer."""


@dataclass(frozen=True)
class UpdateAnnounced(PartEvent):
    """A device has an update: `weights` is a blob reference's JSON body, `base` what it was trained from. Without
    `weights` it keeps the update, to mask it."""

    base: str
    weights: dict[str, Any]
    samples: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Unmasked:
    """The sums of a round's masked updates are known.

    Attributes:
        sums: `fedprune.coordination.commands.CohortSum`s, as JSON.
        dropped: By device, why its update is in none of them.
        cohorts: How the sum of each cohort went: its number of `boards`, how many were `summed` and, by step of the
            protocol, those `lost` at it.
        false: The devices of each sum that came to nothing by the fault of one of them.
        silent: By device that was silent at a step while it was connected, which step.
        answer_s: By device and step, what its answers took, in seconds.
    """

    round: int
    sums: list[dict[str, Any]]
    dropped: dict[str, str] = field(default_factory=dict)
    cohorts: list[dict[str, Any]] = field(default_factory=list)
    false: list[list[str]] = field(default_factory=list)
    silent: dict[str, str] = field(default_factory=dict)
    answer_s: dict[str, dict[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class UpdateStored(PartEvent):
    """An announced update's weights are on the server's disk."""

    weights: str


@dataclass(frozen=True)
class UpdateRejected(PartEvent):
    """An update can't be received, or failed its checks, and must not count. `kind` is a `FailureKind`."""

    reason: str
    kind: str = FailureKind.OTHER


@dataclass(frozen=True)
class OfferRefused(PartEvent):
    """A device can't carry out its offer. `kind` is a `FailureKind`."""

    reason: str
    kind: str = FailureKind.OTHER


@dataclass(frozen=True)
class Folded(PartEvent):
    """A stored update has passed its checks and is in the round's sums."""


@dataclass(frozen=True)
class Closed:
    """The round's sums have become a new global model.

    Attributes:
        memory: All that the job remembers from now on, by name.
        rejected: Devices whose updates didn't count after all, since they stand out among the others or can't be
            used, and why. If no update is left, model and memory stay as they were.
        limited: Devices of whose update much less counted than they sent, and why.
        kinds: The `FailureKind` of each rejection.
        reduced: Number of updates of which less counted than was sent, by however little.
        spent_bytes: Payload bytes to and from all devices since the job began, which the shell adds: what a worker made
            is compared without it.
        spent_macs: The same of MACs of their training, where the shell counts them.
    """

    round: int
    model: str
    memory: dict[str, str] = field(default_factory=dict)
    rejected: dict[str, str] = field(default_factory=dict)
    limited: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    reduced: int = 0
    spent_bytes: int = field(default=0, compare=False)
    spent_macs: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Evaluated:
    """The new global model was measured on the server's data."""

    round: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Ticked:
    """Time has passed."""


@dataclass(frozen=True)
class Paused:
    """An operator pauses or resumes the job: while it is `paused`, nothing new begins."""

    paused: bool


@dataclass(frozen=True)
class Resumed:
    """A shell continues with a state that an earlier one has saved."""


UpdateEvent = WorkReported | UpdateAnnounced | UpdateStored | UpdateRejected | OfferRefused | Folded
RoundEvent = Scored | Extracted | Unmasked | Closed | Evaluated
Event = UpdateEvent | RoundEvent | DeviceBorn | DeviceDied | Ticked | Paused | Resumed
