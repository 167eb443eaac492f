"""Messages between devices and server: small JSON objects with a version, a type and strictly checked fields.

Messages are checked when they are made as well as when they are read, so that whatever was sent can be received.
Unknown keys are ignored (a newer peer may send more); an unknown type or version is an error. Any message may arrive
twice, late or never.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict, get_args

from fedprune.core.errors import ProtocolError
from fedprune.wire.checked_message import MAX_MESSAGE, CheckedMessage, newer, read_checked
from fedprune.wire.fields import (
    Attempt,
    Blob,
    Count,
    Device,
    Digest,
    FreeObject,
    Items,
    Job,
    Metrics,
    Name,
    Round,
    Tag,
    TrueOrAbsent,
    choice,
    hexadecimal,
    number,
    text,
    whole,
)
from fedprune.wire.join_messages import MAX_AUTHORITIES, JoinAnswer, JoinRequest
from fedprune.wire.log_messages import CrashReport, LogReport, LogRequest
from fedprune.wire.offer import Offer
from fedprune.wire.release_messages import ReleaseFromServer, ReleaseReport
from fedprune.wire.server_messages import ServerPresence, ServerQuery

MAX_REQUEST = 1024
"""Leaves or pieces of one `BlobRequest`."""

_MOST_CODECS = 64
MAX_SUCCESSIONS = 32
"""Successions of a signing key that a server keeps."""

_MOST_ABILITIES = 64

TO = "to"
"""Ability of a board: it sends chunks to the receiver that a blob request names."""

PHASES = ("download", "train", "evaluate")
PARTS = ("data", "leaves")

ShortText = Annotated[str, text(256)]
Reason = Annotated[str, text(4096)]
Pins = Annotated[tuple[Annotated[str, hexadecimal(24)], ...], Items(MAX_AUTHORITIES, "pins of authorities")]


class Assignment(TypedDict):
    """The job, round and attempt that a device works on."""

    job: Job
    round: Count
    attempt: Count


@dataclass(frozen=True)
class Birth(CheckedMessage, kind="birth"):
    """A device is online."""

    device: Device
    session: Count
    """Number of this connection, larger than that of every earlier one."""
    profile: ShortText
    """Name of the hardware profile."""
    samples: Count
    """Local training samples."""
    software: ShortText
    """Software on the device, with versions."""
    probe: FreeObject | None = None
    """The board's measurements of itself."""
    held: Assignment | None = None
    """The job, round and attempt that it works on or whose update it still has to deliver."""
    codecs: Annotated[tuple[Name, ...], Items(_MOST_CODECS, "names")] | None = newer()
    """Names of the codecs in which it can send updates (`fedprune.updates`); None where it knows none."""
    answer_s: Annotated[float, number(0.0, 3600.0)] | None = newer(compare=False)
    """Its estimate of response times on its link, in seconds."""
    abilities: Annotated[tuple[Name, ...], Items(_MOST_ABILITIES, "names")] | None = newer()
    """Optional parts of the protocol that it supports, such as `TO`."""
    server_key: Annotated[str, hexadecimal(16)] | None = newer(compare=False)
    """Id of the signing key by which it knows its server; None without an identity."""
    authorities: Pins | None = newer(compare=False)
    """Pins of the certificate authorities that it trusts, up to the one that issued its certificate, the oldest first;
    None without an identity."""


@dataclass(frozen=True)
class Death(CheckedMessage, kind="death"):
    """A device is offline: sent by the broker as its will, or by the device itself as it disconnects."""

    device: Device
    session: Count
    """The connection that ended; a death of an older connection than the last birth's is ignored."""


@dataclass(frozen=True)
class Alive(CheckedMessage, kind="alive"):
    """A device is still online, after minutes without another message."""

    device: Device
    session: Count
    """Its connection."""


@dataclass(frozen=True)
class Progress(CheckedMessage, kind="progress"):
    """Progress of a device in a round."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    phase: Annotated[str, choice(*PHASES)]
    """The current phase."""
    done: Count
    """Units done in this phase."""
    total: Count
    """Units of this phase."""


@dataclass(frozen=True)
class Refusal(CheckedMessage, kind="refusal"):
    """A device can't or won't accept an offer."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    reason: Reason
    """The reason, for people."""
    exit_code: Annotated[int, whole(0, 255)]
    """Exit code of the underlying error (`fedprune.core.errors.ExitCode`)."""


@dataclass(frozen=True)
class Update(CheckedMessage, kind="update"):
    """A device has trained; the server pulls the weights."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    base: Digest
    """sha256 of the weights that training started from, which tells updates of an earlier job of the same name
    apart."""
    weights: Blob
    """The trained weights."""
    samples: Count
    """Local samples that they were trained on."""
    steps: Count
    """Optimiser steps taken."""
    metrics: Metrics = field(default_factory=dict)
    """Measurements by name; finite numbers, at most 64."""


@dataclass(frozen=True)
class Hello(CheckedMessage, kind="hello"):
    """The server is online: devices answer with a birth and repeat an update that is not yet accepted."""

    time: Count | None = newer()
    """The server's time in seconds since 1970, by which boards with a wrong clock recognise expired certificates."""
    successions: (
        Annotated[tuple[Annotated[str, hexadecimal(256)], ...], Items(MAX_SUCCESSIONS, "successions")] | None
    ) = newer()
    """Of the server's signing key, the oldest first, by which boards follow it to the present key; None where the key
    was never replaced."""
    authorities: Pins | None = newer()
    """Pins of the certificate authorities that the fleet trusts, the oldest first; the last one issues the devices'
    certificates. None where the authority was never replaced."""


@dataclass(frozen=True)
class Accepted(CheckedMessage, kind="accepted"):
    """An update is durable at the server; the device may delete it."""

    job: Job
    round: Round
    attempt: Attempt
    weights: Digest
    """sha256 of the update's weights."""


@dataclass(frozen=True)
class Cancelled(CheckedMessage, kind="cancelled"):
    """A device's part in a round is cancelled."""

    job: Job
    round: Round
    attempt: Attempt
    """The cancelled attempt; later ones are not affected."""
    reason: Reason
    """The reason, for people."""


@dataclass(frozen=True)
class Finished(CheckedMessage, kind="finished"):
    """A job has ended."""

    job: Job


@dataclass(frozen=True)
class BlobRequest(CheckedMessage, kind="want"):
    """A request for leaves of a blob, or for pieces of its leaf table."""

    sha256: Digest
    """The blob."""
    part: Annotated[str, choice(*PARTS)]
    """`data` for its leaves, `leaves` for 32 KiB pieces of its leaf table."""
    first: Annotated[int, whole(0, 2**31 - 1)]
    """First leaf or piece."""
    count: Annotated[int, whole(1, MAX_REQUEST)]
    """How many."""
    shared: TrueOrAbsent | None = newer()
    """True where a device listens to the topic that all who pull this blob share, so that the answer may come there;
    None where it doesn't."""
    most: Annotated[int, whole(1, MAX_REQUEST)] | None = newer()
    """Leaves or pieces that a chunk may hold; None for the sender's own limit."""
    number: Annotated[int, whole(0, 2**31 - 1)] | None = newer(compare=False)
    """Random number of the request: another delivery with the same number is a duplicate."""
    to: Tag | None = newer()
    """Tag of the server's receiver that the chunks are for; None for the server itself. Only for boards whose births
    name the ability `TO`."""


@dataclass(frozen=True)
class BlobNotFound(CheckedMessage, kind="gone"):
    """The requested blob is not, or no longer, available."""

    sha256: Digest
    """The blob."""


FromDevice = (
    Birth
    | Death
    | Alive
    | Progress
    | Refusal
    | Update
    | BlobRequest
    | BlobNotFound
    | JoinRequest
    | ReleaseReport
    | LogReport
    | CrashReport
)
FromServer = (
    Hello
    | Offer
    | Accepted
    | Cancelled
    | Finished
    | BlobRequest
    | BlobNotFound
    | JoinAnswer
    | ReleaseFromServer
    | LogRequest
)
BetweenServers = ServerQuery | ServerPresence
Message = FromDevice | FromServer | BetweenServers

_TYPES: dict[str, type[Any]] = {c.kind: c for c in get_args(Message)}


def parse(raw: bytes) -> Message:
    """Read and check a message. Raises `ProtocolError`, which names a missing or wrong field."""
    if len(raw) > MAX_MESSAGE:
        raise ProtocolError("message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw))
    message: Message = read_checked(raw, "message", _TYPES)
    return message
