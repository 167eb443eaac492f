"""What the server and its workers say to each other over pipes: lines of JSON, checked like messages of devices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, get_args

from fedprune.core.errors import ProtocolError, shown
from fedprune.wire.fields import (
    Attempt,
    Blob,
    CheckedMessage,
    Count,
    Device,
    Digest,
    Name,
    Round,
    Tag,
    choice,
    number,
    read_checked,
    text,
    whole,
)
from fedprune.wire.messages import MAX_REQUEST, PARTS
from fedprune_server.transfer.uploads import Arrived, FailedUpload

MAX_LINE = 4096
"""Bytes that no line may exceed."""

PathText = Annotated[str, text(512)]


@dataclass(frozen=True)
class Begin(CheckedMessage, kind="begin"):
    """The first line to an upload worker: what it is."""

    url: PathText
    """The broker's address, with user and password if it has any."""
    site: Name
    """The site."""
    tag: Tag
    """The worker's."""
    blobs: PathText
    """Folder of the blobs."""
    pulls: Annotated[int, whole(1, 1000)]
    """From how many devices it pulls at a time."""
    max_packet: Annotated[int, whole(1)]
    """Bytes of an MQTT packet that the broker lets through."""
    authority: PathText | None
    """Path of the authority's certificate for TLS; this and the next two are None where it does without."""
    certificate: PathText | None
    """Path of the server's own."""
    key: PathText | None
    """Path of that one's key."""
    floor: Count
    """Seconds since 1970; the true time is not before it."""
    parent: Count
    """The server's process id."""


@dataclass(frozen=True)
class Fetch(CheckedMessage, kind="fetch"):
    """Fetch an update from a device, which is there on connection `session` (None: nobody knows)."""

    device: Device
    round: Round
    attempt: Attempt
    blob: Blob
    session: Count | None
    answer_s: Annotated[float, number(0.0, 3600.0)]


@dataclass(frozen=True)
class Drop(CheckedMessage, kind="drop"):
    """Stop fetching from a device."""

    device: Device


@dataclass(frozen=True)
class There(CheckedMessage, kind="there"):
    """A device has announced its update again."""

    device: Device


@dataclass(frozen=True)
class Born(CheckedMessage, kind="born"):
    """A device has announced itself: what was on the way on another connection is lost."""

    device: Device
    session: Count
    answer_s: Annotated[float, number(0.0, 3600.0)]


@dataclass(frozen=True)
class Interrupted(CheckedMessage, kind="interrupted"):
    """The server's connection was lost, and is there again: who is there shows as devices announce themselves."""


@dataclass(frozen=True)
class Asks(CheckedMessage, kind="asks"):
    """An upload worker wants pieces of an update; the server signs that and says it."""

    device: Device
    sha256: Digest
    part: Annotated[str, choice(*PARTS)]
    first: Annotated[int, whole(0, 2**31 - 1)]
    count: Annotated[int, whole(1, MAX_REQUEST)]
    most: Annotated[int, whole(1, MAX_REQUEST)] | None


@dataclass(frozen=True)
class Took(CheckedMessage, kind="took"):
    """So many bytes have come from a device since that was last said, and so many leaves of its update are here."""

    device: Device
    size: Count
    leaves: Count


@dataclass(frozen=True)
class Beat(CheckedMessage, kind="beat"):
    """An upload worker lives; `up` is 1 if it is connected to the broker."""

    up: Annotated[int, whole(0, 1)]


ToWorker = Begin | Fetch | Drop | There | Born | Interrupted
ToServer = Asks | Arrived | FailedUpload | Took | Beat

_TYPES: dict[str, type[Any]] = {c.kind: c for c in get_args(ToWorker | ToServer)}


def line(message: ToWorker | ToServer) -> bytes:
    """A message as a line of a pipe. Raises `ProtocolError` if it is too long."""
    raw = message.to_bytes() + b"\n"
    if len(raw) > MAX_LINE:
        raise ProtocolError(f"{message.kind}: line is too long", expected=f"at most {MAX_LINE} bytes", got=len(raw))
    return raw


def read(stream: BinaryIO) -> ToWorker | ToServer | None:
    """The next message of a pipe; None at its end. Raises `ProtocolError` if it is none, or too long."""
    raw = stream.readline(MAX_LINE + 1)
    return parse_line(raw) if raw else None


def parse_line(raw: bytes) -> ToWorker | ToServer:
    """Read and check a line. Raises `ProtocolError` if it is too long or cut short, no JSON, or a field is missing or
    wrong."""
    what = "line of a pipe"
    if len(raw) > MAX_LINE or not raw.endswith(b"\n"):
        raise ProtocolError(what, expected=f"at most {MAX_LINE} bytes and its end", got=shown(raw[:80]))
    message: ToWorker | ToServer = read_checked(raw, what, _TYPES)
    return message
