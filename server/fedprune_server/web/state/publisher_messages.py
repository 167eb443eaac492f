"""What the server and its console say to each other over pipes: lines of JSON, checked like messages of devices.

The server tells what there is to see; the console passes on what operators order. Both check what they read: names of
devices and their texts come from boards, and orders from a process that speaks with browsers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, BinaryIO, get_args

from fedprune.wire.checked_message import MAX_MESSAGE, CheckedMessage
from fedprune.wire.fields import (
    Count,
    Items,
    Job,
    Metrics,
    Name,
    choice,
    number,
    text,
    whole,
)
from fedprune_server.process.line_process import checked_line
from fedprune_server.web.state.device_messages import Coverage, DeviceDetails, Devices
from fedprune_server.web.state.log_messages import AlertNews, BoardLog, LogLine
from fedprune_server.web.state.order_messages import Answer, Order
from fedprune_server.web.state.row_types import (
    LongText,
    RolloutRow,
    Seconds,
    Short,
    Spread,
    Time,
)

MAX_LINE = MAX_MESSAGE + 1
"""Bytes that no line may exceed."""

MAX_ORDER = 8192
"""Bytes that no order may exceed."""


@dataclass(frozen=True)
class Begin(CheckedMessage, kind="begin"):
    """The first line to a console: what it is."""

    address: Short
    """Where it listens."""
    port: Annotated[int, whole(0, 65535)]
    """On which port; 0 for a free one."""
    database: Annotated[str, text(4096)]
    """Path of its accounts."""
    certificate: Annotated[str, text(4096)] | None
    """Path of a certificate for TLS; None to do without."""
    key: Annotated[str, text(4096)] | None
    """Path of that one's key."""
    insecure: bool
    """Whether it may listen without TLS where others than this machine reach it."""
    orders: Annotated[str, choice("none", "look", "all")]
    """What orders the server takes: `none`, `look` or `all`."""
    hosts: Annotated[tuple[Short, ...], Items(32)]
    """Names by which browsers may call it beside its address; empty for any."""
    proxied: bool
    """Whether a reverse proxy on this machine speaks for browsers, and does TLS."""
    parent: Count
    """The server's process id."""


@dataclass(frozen=True)
class Site(CheckedMessage, kind="site"):
    """The server as a whole. All that was told before it is of another start, and forgotten."""

    version: Short
    site: Name
    jobs: Annotated[tuple[Job, ...], Items(1000)]
    started_at: Time
    connected: bool
    broker: LongText
    database: LongText
    blobs: LongText
    insecure: bool


@dataclass(frozen=True)
class JobNews(CheckedMessage, kind="job"):
    """A job as it stands. `parts` counts the round's parts by how far they are."""

    name: Job
    round: Count
    rounds: Count
    phase: Short
    deadline_at: Time | None
    paused: bool
    metrics: Metrics
    strategy: Short
    model_digest: Short
    weight: Annotated[float, number(0.0)]
    parts: Annotated[dict[Short, Count], Items(32, "entries")]
    parameters: Count


@dataclass(frozen=True)
class RoundNews(CheckedMessage, kind="round"):
    """A finished round. `refused` counts updates that didn't count by why; bytes are those of all devices since the
    round before ended. Of rounds before the server's start some of it isn't known any more."""

    job: Job
    round: Count
    at: Time
    seconds: Seconds | None
    metrics: Metrics
    counted: Count | None
    devices: Count | None
    refused: Annotated[dict[Short, Count], Items(100, "entries")]
    bytes_down: Count | None
    bytes_up: Count | None
    staleness: Spread | None
    model: Short


@dataclass(frozen=True)
class Rollouts(CheckedMessage, kind="rollouts"):
    """The rollout that was begun last, if there is one, and the names of releases that an order may begin."""

    rows: Annotated[tuple[RolloutRow, ...], Items(50)]
    releases: Annotated[tuple[Name, ...], Items(200)] = ()


@dataclass(frozen=True)
class Beat(CheckedMessage, kind="beat"):
    """The server lives, and has nothing left to tell. `whole`: the console has heard of all devices."""

    at: Time
    whole: bool = True


@dataclass(frozen=True)
class Listening(CheckedMessage, kind="listening"):
    """The console listens, at this address."""

    url: Short


ToConsole = (
    Begin
    | Site
    | JobNews
    | RoundNews
    | Devices
    | DeviceDetails
    | Coverage
    | Rollouts
    | AlertNews
    | LogLine
    | BoardLog
    | Answer
    | Beat
)
ToServer = Listening | Order

_NEWS: dict[str, type[Any]] = {c.kind: c for c in get_args(ToConsole)}
_ORDERS: dict[str, type[Any]] = {c.kind: c for c in get_args(ToServer)}


def line(word: ToConsole | ToServer) -> bytes:
    """A word as it goes through a pipe.

    Raises:
        ProtocolError: It is too long.
    """
    return word.to_bytes() + b"\n"


def read_news(stream: BinaryIO) -> ToConsole | None:
    """The server's next word; None at the end.

    Raises:
        ProtocolError: It is none, or too long.
    """
    raw = stream.readline(MAX_LINE + 1)
    return parse_news(raw) if raw else None


def read_order(stream: BinaryIO) -> ToServer | None:
    """The console's next word; None at the end.

    Raises:
        ProtocolError: It is none, or too long.
    """
    raw = stream.readline(MAX_ORDER + 1)
    return parse_order(raw) if raw else None


def parse_news(raw: bytes) -> ToConsole:
    """Read and check a line of the server's.

    Raises:
        ProtocolError: It is too long or cut short, no JSON, or a field is missing or wrong.
    """
    word: ToConsole = checked_line(raw, MAX_LINE, "line to the console", _NEWS)
    return word


def parse_order(raw: bytes) -> ToServer:
    """Read and check a line of the console's.

    Raises:
        ProtocolError: As `parse_news`.
    """
    word: ToServer = checked_line(raw, MAX_ORDER, "line of the console", _ORDERS)
    return word
