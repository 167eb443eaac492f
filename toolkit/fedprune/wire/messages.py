"""Messages between devices and server: small JSON objects with a version, a type and strictly checked fields.

A message is checked when it is made as well as when it is read, so what was sent can be received. Unknown keys are
ignored (a newer peer may say more); an unknown type or version is an error. Any message may arrive twice, late or
never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, get_args

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.wire import validation as check
from fedprune.wire.checked_message import MAX_MESSAGE, CheckedMessage, read_checked
from fedprune.wire.join_messages import MAX_AUTHORITIES, JoinAnswer, JoinRequest
from fedprune.wire.log_messages import BoardLines, CrashReport, LogWanted
from fedprune.wire.offer import Offer
from fedprune.wire.release_messages import ReleaseFromServer, ReleaseReport
from fedprune.wire.server_messages import ServerPresence, ServerQuery
from fedprune.wire.validation import Check

MAX_WANT = 1024
"""Leaves or pieces that one `Want` may ask for."""

_MOST_CODECS = 64
MAX_SUCCESSIONS = 32
"""Successions of a signing key that a server keeps."""

_MOST_ABILITIES = 64

TO = "to"
"""Ability of a board: it sends the chunks that a want asks for to the receiver that the want names."""

PHASES = ("download", "train", "evaluate")
PARTS = ("data", "leaves")

_COUNT = check.whole()
_SHORT = check.text(256)
_LONG = check.text(4096)
_PINS = check.list_of(check.hexadecimal(24), "pins of authorities", MAX_AUTHORITIES)
_ASSIGNMENT: dict[str, Check] = {"job": check.job, "round": _COUNT, "attempt": _COUNT}


@dataclass(frozen=True)
class Birth(CheckedMessage):
    """A device is there.

    Attributes:
        device: The device's name.
        session: Number of this connection, larger than that of every earlier one.
        profile: Name of the hardware profile.
        samples: Local training samples.
        software: What runs there, with versions.
        probe: What the board measured of itself.
        held: The job, round and attempt that it works on or whose update it still has to deliver.
        codecs: Names of the codecs in which it can send updates (`fedprune.codec`); None where it knows none.
        answer_s: Seconds that answers take on its way, as far as it knows.
        abilities: What else it knows of the protocol, such as `TO`; None where it says nothing of that.
        server_key: Id of the signing key by which it knows its server; None without an identity.
        authorities: Pins of the certificate authorities that it trusts, up to the one that issued its certificate, the
            oldest first; None without an identity.
    """

    device: str
    session: int
    profile: str
    samples: int
    software: str
    probe: dict[str, Any] | None = None
    held: dict[str, Any] | None = None
    codecs: tuple[str, ...] | None = None
    answer_s: float | None = field(default=None, compare=False)
    abilities: tuple[str, ...] | None = None
    server_key: str | None = field(default=None, compare=False)
    authorities: tuple[str, ...] | None = field(default=None, compare=False)

    kind: ClassVar[str] = "birth"
    newer: ClassVar[frozenset[str]] = frozenset({"codecs", "answer_s", "abilities", "server_key", "authorities"})
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        "session": _COUNT,
        "profile": _SHORT,
        "samples": _COUNT,
        "software": _SHORT,
        "probe": check.optional(check.plain),
        "held": check.optional(check.assignment),
        "codecs": check.optional(check.names(_MOST_CODECS)),
        "answer_s": check.optional(check.number(0.0, 3600.0)),
        "abilities": check.optional(check.names(_MOST_ABILITIES)),
        "server_key": check.optional(check.hexadecimal(16)),
        "authorities": check.optional(_PINS),
    }


@dataclass(frozen=True)
class Death(CheckedMessage):
    """A device is gone; the broker says so in its name (a will), or the device itself as it leaves.

    Attributes:
        device: The device's name.
        session: The connection that ended; deaths of older connections than the last birth's mean nothing.
    """

    device: str
    session: int

    kind: ClassVar[str] = "death"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device, "session": _COUNT}


@dataclass(frozen=True)
class Alive(CheckedMessage):
    """A device is still there, and has said nothing else for minutes.

    Attributes:
        device: The device's name.
        session: Its connection.
    """

    device: str
    session: int

    kind: ClassVar[str] = "alive"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device, "session": _COUNT}


@dataclass(frozen=True)
class Progress(CheckedMessage):
    """How far a device is.

    Attributes:
        device: The device's name.
        job: The job.
        round: The round.
        attempt: The attempt.
        phase: What it is doing.
        done: Units done in this phase.
        total: Units of this phase.
    """

    device: str
    job: str
    round: int
    attempt: int
    phase: str
    done: int
    total: int

    kind: ClassVar[str] = "progress"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        **_ASSIGNMENT,
        "phase": check.choice(*PHASES),
        "done": _COUNT,
        "total": _COUNT,
    }


@dataclass(frozen=True)
class Refusal(CheckedMessage):
    """A device can't or won't do what it was offered.

    Attributes:
        device: The device's name.
        job: The job.
        round: The round.
        attempt: The attempt.
        reason: Why, in words.
        exit_code: The code of the error behind it, see `fedprune.core.errors.ExitCode`.
    """

    device: str
    job: str
    round: int
    attempt: int
    reason: str
    exit_code: int

    kind: ClassVar[str] = "refusal"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        **_ASSIGNMENT,
        "reason": _LONG,
        "exit_code": check.whole(0, 255),
    }


@dataclass(frozen=True)
class Update(CheckedMessage):
    """A device has trained; the server pulls the weights.

    Attributes:
        device: The device's name.
        job: The job.
        round: The round.
        attempt: The attempt.
        base: sha256 of the weights that training started from; an update of an earlier run of a job of the same name is
            known by it.
        weights: The trained weights.
        samples: Local samples behind them.
        steps: Optimiser steps taken.
        metrics: What was measured, by name; finite numbers, at most 64.
    """

    device: str
    job: str
    round: int
    attempt: int
    base: str
    weights: BlobRef
    samples: int
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)

    kind: ClassVar[str] = "update"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        **_ASSIGNMENT,
        "base": check.digest,
        "weights": check.blob,
        "samples": _COUNT,
        "steps": _COUNT,
        "metrics": check.metrics,
    }


@dataclass(frozen=True)
class Hello(CheckedMessage):
    """The server is up: devices answer with a birth and repeat an update that is not yet accepted.

    Attributes:
        time: The server's, in seconds since 1970, by which boards with a wrong clock know which certificates are over.
        successions: Of the server's signing key, the oldest first, by which boards follow it to the present key; None
            where the key was never replaced.
        authorities: Pins of the certificate authorities that the fleet trusts, the oldest first; the last one issues
            the devices' certificates. None where the authority was never replaced.
    """

    time: int | None = None
    successions: tuple[str, ...] | None = None
    authorities: tuple[str, ...] | None = None

    kind: ClassVar[str] = "hello"
    checks: ClassVar[Mapping[str, Check]] = {
        "time": check.optional(_COUNT),
        "successions": check.optional(check.successions(MAX_SUCCESSIONS)),
        "authorities": check.optional(_PINS),
    }
    newer: ClassVar[frozenset[str]] = frozenset({"time", "successions", "authorities"})


@dataclass(frozen=True)
class Accepted(CheckedMessage):
    """An update is durable at the server; the device may forget it.

    Attributes:
        job: The job.
        round: The round.
        attempt: The attempt.
        weights: sha256 of the update's weights.
    """

    job: str
    round: int
    attempt: int
    weights: str

    kind: ClassVar[str] = "accepted"
    checks: ClassVar[Mapping[str, Check]] = {**_ASSIGNMENT, "weights": check.digest}


@dataclass(frozen=True)
class Cancelled(CheckedMessage):
    """A device's part in a round is void; what it does for it is in vain.

    Attributes:
        job: The job.
        round: The round.
        attempt: The attempt; a later one is not meant.
        reason: Why, in words.
    """

    job: str
    round: int
    attempt: int
    reason: str

    kind: ClassVar[str] = "cancelled"
    checks: ClassVar[Mapping[str, Check]] = {**_ASSIGNMENT, "reason": _LONG}


@dataclass(frozen=True)
class Finished(CheckedMessage):
    """A job has ended.

    Attributes:
        job: The job.
    """

    job: str

    kind: ClassVar[str] = "finished"
    checks: ClassVar[Mapping[str, Check]] = {"job": check.job}


@dataclass(frozen=True)
class Want(CheckedMessage):
    """Please send pieces of a blob.

    Attributes:
        sha256: The blob.
        part: `data` for its leaves, `leaves` for 32 KiB pieces of its leaf table.
        first: First leaf or piece.
        count: How many.
        shared: True where a device listens to the topic that all who pull this blob share, so that the answer may come
            there; None where it doesn't.
        most: How many leaves or pieces a chunk may hold; None where the sender's own limit will do.
        number: Drawn anew for every want: one that comes with the same number again is the same, doubled on its way.
        to: Tag of the server's receiver that the chunks are for; None for the server itself. Only for boards whose
            births name the ability `TO`.
    """

    sha256: str
    part: str
    first: int
    count: int
    shared: bool | None = None
    most: int | None = None
    number: int | None = field(default=None, compare=False)
    to: str | None = None

    kind: ClassVar[str] = "want"
    newer: ClassVar[frozenset[str]] = frozenset({"shared", "most", "number", "to"})
    checks: ClassVar[Mapping[str, Check]] = {
        "sha256": check.digest,
        "part": check.choice(*PARTS),
        "first": check.whole(0, 2**31 - 1),
        "count": check.whole(1, MAX_WANT),
        "shared": check.optional(check.true),
        "most": check.optional(check.whole(1, MAX_WANT)),
        "number": check.optional(check.whole(0, 2**31 - 1)),
        "to": check.optional(check.tag),
    }


@dataclass(frozen=True)
class Gone(CheckedMessage):
    """The wanted blob is not here (any more).

    Attributes:
        sha256: The blob.
    """

    sha256: str

    kind: ClassVar[str] = "gone"
    checks: ClassVar[Mapping[str, Check]] = {"sha256": check.digest}


FromDevice = (
    Birth
    | Death
    | Alive
    | Progress
    | Refusal
    | Update
    | Want
    | Gone
    | JoinRequest
    | ReleaseReport
    | BoardLines
    | CrashReport
)
FromServer = Hello | Offer | Accepted | Cancelled | Finished | Want | Gone | JoinAnswer | ReleaseFromServer | LogWanted
BetweenServers = ServerQuery | ServerPresence
Message = FromDevice | FromServer | BetweenServers

_TYPES: dict[str, type[Any]] = {c.kind: c for c in get_args(Message)}


def parse(raw: bytes) -> Message:
    """Read and check a message.

    Raises:
        ProtocolError: Too long, not JSON, of an unknown version or type, or a field is missing or wrong; the error
            names the field.
    """
    if len(raw) > MAX_MESSAGE:
        raise ProtocolError("message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw))
    message: Message = read_checked(raw, "message", _TYPES)
    return message
