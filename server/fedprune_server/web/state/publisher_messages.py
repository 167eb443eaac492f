"""What the server and its console say to each other over pipes: lines of JSON, checked like messages of devices.

The server tells what there is to see; the console passes on what operators order. Both check what they read: names of
devices and their texts come from boards, and orders from a process that speaks with browsers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, get_args

from fedprune.wire import validation as check
from fedprune.wire.checked_message import MAX_MESSAGE, CheckedMessage
from fedprune.wire.validation import Check
from fedprune_server.process.line_process import checked_line
from fedprune_server.web.state.device_messages import Coverage, DeviceDetails, Devices
from fedprune_server.web.state.log_messages import AlertNews, BoardLog, LogLine
from fedprune_server.web.state.order_messages import Answer, Order
from fedprune_server.web.state.row_checks import (
    COUNT,
    ROLLOUT,
    SECONDS,
    SHORT,
    TEXT,
    TIME,
    list_of,
    row_of,
    table_of,
    truth,
)

MAX_LINE = MAX_MESSAGE + 1
"""Bytes that no line may exceed."""

MAX_ORDER = 8192
"""Bytes that no order may exceed."""


@dataclass(frozen=True)
class Begin(CheckedMessage):
    """The first line to a console: what it is.

    Attributes:
        address: Where it listens.
        port: On which port; 0 for a free one.
        database: Path of its accounts.
        certificate: Path of a certificate for TLS; None to do without.
        key: Path of that one's key.
        insecure: Whether it may listen without TLS where others than this machine reach it.
        orders: What orders the server takes: `none`, `look` or `all`.
        hosts: Names by which browsers may call it beside its address; empty for any.
        proxied: Whether a reverse proxy on this machine speaks for browsers, and does TLS.
        parent: The server's process id.
    """

    address: str
    port: int
    database: str
    certificate: str | None
    key: str | None
    insecure: bool
    orders: str
    hosts: tuple[str, ...]
    proxied: bool
    parent: int

    kind: ClassVar[str] = "begin"
    checks: ClassVar[Mapping[str, Check]] = {
        "address": SHORT,
        "port": check.whole(0, 65535),
        "database": check.text(4096),
        "certificate": check.optional(check.text(4096)),
        "key": check.optional(check.text(4096)),
        "insecure": truth,
        "orders": check.choice("none", "look", "all"),
        "hosts": list_of(SHORT, 32),
        "proxied": truth,
        "parent": COUNT,
    }


@dataclass(frozen=True)
class Site(CheckedMessage):
    """The server as a whole. All that was told before it is of another start, and forgotten."""

    version: str
    site: str
    jobs: tuple[str, ...]
    started_at: float
    connected: bool
    broker: str
    database: str
    blobs: str
    insecure: bool

    kind: ClassVar[str] = "site"
    checks: ClassVar[Mapping[str, Check]] = {
        "version": SHORT,
        "site": check.name,
        "jobs": list_of(check.job, 1000),
        "started_at": TIME,
        "connected": truth,
        "broker": TEXT,
        "database": TEXT,
        "blobs": TEXT,
        "insecure": truth,
    }


@dataclass(frozen=True)
class JobNews(CheckedMessage):
    """A job as it stands. `parts` counts the round's parts by how far they are."""

    name: str
    round: int
    rounds: int
    phase: str
    deadline_at: float | None
    paused: bool
    metrics: dict[str, float]
    strategy: str
    model_digest: str
    weight: float
    parts: dict[str, int]
    parameters: int

    kind: ClassVar[str] = "job"
    checks: ClassVar[Mapping[str, Check]] = {
        "name": check.job,
        "round": COUNT,
        "rounds": COUNT,
        "phase": SHORT,
        "deadline_at": check.optional(TIME),
        "paused": truth,
        "metrics": check.metrics,
        "strategy": SHORT,
        "model_digest": SHORT,
        "weight": check.number(0.0),
        "parts": table_of(COUNT, 32),
        "parameters": COUNT,
    }


@dataclass(frozen=True)
class RoundNews(CheckedMessage):
    """A finished round. `refused` counts updates that didn't count by why; bytes are those of all devices since the
    round before ended. Of rounds before the server's start some of it isn't known any more."""

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

    kind: ClassVar[str] = "round"
    checks: ClassVar[Mapping[str, Check]] = {
        "job": check.job,
        "round": COUNT,
        "at": TIME,
        "seconds": check.optional(SECONDS),
        "metrics": check.metrics,
        "counted": check.optional(COUNT),
        "devices": check.optional(COUNT),
        "refused": table_of(COUNT, 100),
        "bytes_down": check.optional(COUNT),
        "bytes_up": check.optional(COUNT),
        "staleness": check.optional(row_of({"mean": check.number(0.0), "max": check.number(0.0)})),
        "model": SHORT,
    }


@dataclass(frozen=True)
class Rollouts(CheckedMessage):
    """The rollout that was begun last, if there is one, and the names of releases that an order may begin."""

    rows: tuple[dict[str, Any], ...]
    releases: tuple[str, ...] = ()

    kind: ClassVar[str] = "rollouts"
    checks: ClassVar[Mapping[str, Check]] = {
        "rows": list_of(row_of(ROLLOUT), 50),
        "releases": list_of(check.name, 200),
    }


@dataclass(frozen=True)
class Beat(CheckedMessage):
    """The server lives, and has nothing left to tell. `whole`: the console has heard of all devices."""

    at: float
    whole: bool = True

    kind: ClassVar[str] = "beat"
    checks: ClassVar[Mapping[str, Check]] = {"at": TIME, "whole": truth}


@dataclass(frozen=True)
class Listening(CheckedMessage):
    """The console listens, at this address."""

    url: str

    kind: ClassVar[str] = "listening"
    checks: ClassVar[Mapping[str, Check]] = {"url": SHORT}


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
