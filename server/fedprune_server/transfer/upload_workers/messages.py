"""What the server and its receivers say to each other over pipes: lines of JSON, checked like messages of devices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, get_args

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError
from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.messages import MAX_WANT, PARTS
from fedprune.wire.validation import Check
from fedprune_server.process.line_process import checked_line

MAX_LINE = 4096
"""Bytes that no line may exceed."""

MAX_REASON = 500

_COUNT = check.whole()
_PATH = check.text(512)
_PART: dict[str, Check] = {"device": check.device, "round": _COUNT, "attempt": _COUNT}


@dataclass(frozen=True)
class Begin(CheckedMessage):
    """The first line to a receiver: what it is.

    Attributes:
        url: The broker's address, with user and password if it has any.
        site: The site.
        tag: The receiver's.
        blobs: Folder of the blobs.
        pulls: From how many devices it pulls at a time.
        max_packet: Bytes of an MQTT packet that the broker lets through.
        authority: Path of the authority's certificate for TLS; this and the next two are None where it does without.
        certificate: Path of the server's own.
        key: Path of that one's key.
        floor: Seconds since 1970; the true time is not before it.
        parent: The server's process id.
    """

    url: str
    site: str
    tag: str
    blobs: str
    pulls: int
    max_packet: int
    authority: str | None
    certificate: str | None
    key: str | None
    floor: int
    parent: int

    kind: ClassVar[str] = "begin"
    checks: ClassVar[Mapping[str, Check]] = {
        "url": _PATH,
        "site": check.name,
        "tag": check.tag,
        "blobs": _PATH,
        "pulls": check.whole(1, 1000),
        "max_packet": check.whole(1),
        "authority": check.optional(_PATH),
        "certificate": check.optional(_PATH),
        "key": check.optional(_PATH),
        "floor": _COUNT,
        "parent": _COUNT,
    }


@dataclass(frozen=True)
class Fetch(CheckedMessage):
    """Fetch an update from a device, which is there on connection `session` (None: nobody knows)."""

    device: str
    round: int
    attempt: int
    blob: BlobRef
    session: int | None
    answer_s: float

    kind: ClassVar[str] = "fetch"
    checks: ClassVar[Mapping[str, Check]] = {
        **_PART,
        "blob": check.blob,
        "session": check.optional(_COUNT),
        "answer_s": check.number(0.0, 3600.0),
    }


@dataclass(frozen=True)
class Drop(CheckedMessage):
    """Stop fetching from a device."""

    device: str

    kind: ClassVar[str] = "drop"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device}


@dataclass(frozen=True)
class There(CheckedMessage):
    """A device has announced its update again."""

    device: str

    kind: ClassVar[str] = "there"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device}


@dataclass(frozen=True)
class Born(CheckedMessage):
    """A device has announced itself: what was on the way on another connection is lost."""

    device: str
    session: int
    answer_s: float

    kind: ClassVar[str] = "born"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        "session": _COUNT,
        "answer_s": check.number(0.0, 3600.0),
    }


@dataclass(frozen=True)
class Interrupted(CheckedMessage):
    """The server's connection was lost, and is there again: who is there shows as devices announce themselves."""

    kind: ClassVar[str] = "interrupted"
    checks: ClassVar[Mapping[str, Check]] = {}


@dataclass(frozen=True)
class Asks(CheckedMessage):
    """A receiver wants pieces of an update; the server signs that and says it."""

    device: str
    sha256: str
    part: str
    first: int
    count: int
    most: int | None

    kind: ClassVar[str] = "asks"
    checks: ClassVar[Mapping[str, Check]] = {
        "device": check.device,
        "sha256": check.digest,
        "part": check.choice(*PARTS),
        "first": check.whole(0, 2**31 - 1),
        "count": check.whole(1, MAX_WANT),
        "most": check.optional(check.whole(1, MAX_WANT)),
    }


@dataclass(frozen=True)
class Stored(CheckedMessage):
    """An update is whole, verified and on the disk."""

    device: str
    round: int
    attempt: int
    sha256: str

    kind: ClassVar[str] = "stored"
    checks: ClassVar[Mapping[str, Check]] = {**_PART, "sha256": check.digest}


@dataclass(frozen=True)
class Failed(CheckedMessage):
    """An update can't be had."""

    device: str
    round: int
    attempt: int
    reason: str

    kind: ClassVar[str] = "failed"
    checks: ClassVar[Mapping[str, Check]] = {**_PART, "reason": check.text(MAX_REASON)}


@dataclass(frozen=True)
class Took(CheckedMessage):
    """So many bytes have come from a device since that was last said, and so many leaves of its update are here."""

    device: str
    size: int
    leaves: int

    kind: ClassVar[str] = "took"
    checks: ClassVar[Mapping[str, Check]] = {"device": check.device, "size": _COUNT, "leaves": _COUNT}


@dataclass(frozen=True)
class Beat(CheckedMessage):
    """A receiver lives; `up` is 1 if it is connected to the broker."""

    up: int

    kind: ClassVar[str] = "beat"
    checks: ClassVar[Mapping[str, Check]] = {"up": check.whole(0, 1)}


ToReceiver = Begin | Fetch | Drop | There | Born | Interrupted
ToServer = Asks | Stored | Failed | Took | Beat

_TYPES: dict[str, type[Any]] = {c.kind: c for c in get_args(ToReceiver | ToServer)}


def line(word: ToReceiver | ToServer) -> bytes:
    """A word as it goes through a pipe.

    Raises:
        ProtocolError: It is too long.
    """
    raw = word.to_bytes() + b"\n"
    if len(raw) > MAX_LINE:
        raise ProtocolError(f"{word.kind}: line is too long", expected=f"at most {MAX_LINE} bytes", got=len(raw))
    return raw


def read(stream: BinaryIO) -> ToReceiver | ToServer | None:
    """The next word of a pipe; None at its end.

    Raises:
        ProtocolError: It is none, or too long.
    """
    raw = stream.readline(MAX_LINE + 1)
    return parse_line(raw) if raw else None


def parse_line(raw: bytes) -> ToReceiver | ToServer:
    """Read and check a line.

    Raises:
        ProtocolError: It is too long or cut short, no JSON, or a field is missing or wrong.
    """
    word: ToReceiver | ToServer = checked_line(raw, MAX_LINE, "line of a pipe", _TYPES)
    return word
