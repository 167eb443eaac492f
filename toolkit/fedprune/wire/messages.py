"""Messages between devices and server: small JSON objects with a version, a type and strictly checked fields.

A message is checked when it is made as well as when it is read, so what was sent can be received. Unknown keys are
ignored (a newer peer may say more); an unknown type or version is an error. Any message may arrive twice, late or
never.
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
"""Leaves or pieces that one `BlobRequest` may ask for."""

_MOST_CODECS = 64
MAX_SUCCESSIONS = 32
"""Successions of a signing key that a server keeps."""

_MOST_ABILITIES = 64

TO = "to"
"""Ability of a board: it sends the chunks that a want asks for to the receiver that the want names."""

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
    """A device is there."""

    device: Device
    session: Count
    """Number of this connection, larger than that of every earlier one."""
    profile: ShortText
    """Name of the hardware profile."""
    samples: Count
    """Local training samples."""
    software: ShortText
    """What runs there, with versions."""
    probe: FreeObject | None = None
    """What the board measured of itself."""
    held: Assignment | None = None
    """The job, round and attempt that it works on or whose update it still has to deliver."""
    codecs: Annotated[tuple[Name, ...], Items(_MOST_CODECS, "names")] | None = newer()
    """Names of the codecs in which it can send updates (`fedprune.updates`); None where it knows none."""
    answer_s: Annotated[float, number(0.0, 3600.0)] | None = newer(compare=False)
    """Seconds that answers take on its way, as far as it knows."""
    abilities: Annotated[tuple[Name, ...], Items(_MOST_ABILITIES, "names")] | None = newer()
    """What else it knows of the protocol, such as `TO`; None where it says nothing of that."""
    server_key: Annotated[str, hexadecimal(16)] | None = newer(compare=False)
    """Id of the signing key by which it knows its server; None without an identity."""
    authorities: Pins | None = newer(compare=False)
    """Pins of the certificate authorities that it trusts, up to the one that issued its certificate, the oldest first;
    None without an identity."""


@dataclass(frozen=True)
class Death(CheckedMessage, kind="death"):
    """A device is gone; the broker says so in its name (a will), or the device itself as it leaves."""

    device: Device
    session: Count
    """The connection that ended; deaths of older connections than the last birth's mean nothing."""


@dataclass(frozen=True)
class Alive(CheckedMessage, kind="alive"):
    """A device is still there, and has said nothing else for minutes."""

    device: Device
    session: Count
    """Its connection."""


@dataclass(frozen=True)
class Progress(CheckedMessage, kind="progress"):
    """How far a device is."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    phase: Annotated[str, choice(*PHASES)]
    """What it is doing."""
    done: Count
    """Units done in this phase."""
    total: Count
    """Units of this phase."""


@dataclass(frozen=True)
class Refusal(CheckedMessage, kind="refusal"):
    """A device can't or won't do what it was offered."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    reason: Reason
    """Why, in words."""
    exit_code: Annotated[int, whole(0, 255)]
    """The code of the error behind it, see `fedprune.core.errors.ExitCode`."""


@dataclass(frozen=True)
class Update(CheckedMessage, kind="update"):
    """A device has trained; the server pulls the weights."""

    device: Device
    job: Job
    round: Round
    attempt: Attempt
    base: Digest
    """sha256 of the weights that training started from; an update of an earlier run of a job of the same name is known
    by it."""
    weights: Blob
    """The trained weights."""
    samples: Count
    """Local samples behind them."""
    steps: Count
    """Optimiser steps taken."""
    metrics: Metrics = field(default_factory=dict)
    """What was measured, by name; finite numbers, at most 64."""


@dataclass(frozen=True)
class Hello(CheckedMessage, kind="hello"):
    """The server is up: devices answer with a birth and repeat an update that is not yet accepted."""

    time: Count | None = newer()
    """The server's, in seconds since 1970, by which boards with a wrong clock know which certificates are over."""
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
    """An update is durable at the server; the device may forget it."""

    job: Job
    round: Round
    attempt: Attempt
    weights: Digest
    """sha256 of the update's weights."""


@dataclass(frozen=True)
class Cancelled(CheckedMessage, kind="cancelled"):
    """A device's part in a round is void; what it does for it is in vain."""

    job: Job
    round: Round
    attempt: Attempt
    """The attempt; a later one is not meant."""
    reason: Reason
    """Why, in words."""


@dataclass(frozen=True)
class Finished(CheckedMessage, kind="finished"):
    """A job has ended."""

    job: Job


@dataclass(frozen=True)
class BlobRequest(CheckedMessage, kind="want"):
    """Please send pieces of a blob."""

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
    """How many leaves or pieces a chunk may hold; None where the sender's own limit will do."""
    number: Annotated[int, whole(0, 2**31 - 1)] | None = newer(compare=False)
    """Drawn anew for every want: one that comes with the same number again is the same, doubled on its way."""
    to: Tag | None = newer()
    """Tag of the server's receiver that the chunks are for; None for the server itself. Only for boards whose births
    name the ability `TO`."""


@dataclass(frozen=True)
class BlobNotFound(CheckedMessage, kind="gone"):
    """The wanted blob is not here (any more)."""

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
    """Read and check a message.

    Raises:
        ProtocolError: Too long, not JSON, of an unknown version or type, or a field is missing or wrong; the error
            names the field.
    """
    if len(raw) > MAX_MESSAGE:
        raise ProtocolError("message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw))
    message: Message = read_checked(raw, "message", _TYPES)
    return message
