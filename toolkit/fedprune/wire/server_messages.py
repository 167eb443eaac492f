"""Messages by which servers of one identity find each other; no device gets them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from fedprune.wire import validation as check
from fedprune.wire.checked_message import CheckedMessage
from fedprune.wire.validation import Check

_RANDOM = check.hexadecimal(32)


@dataclass(frozen=True)
class ServerQuery(CheckedMessage):
    """A question to the site's servers: which of you serve?

    Attributes:
        instance: Random id of the process that asks.
        nonce: Random; answers repeat it, so that an old answer counts for nothing.
        mutual: True where those who answer are to ask in turn, since the process serves the site itself; else null.
        host: Name of the machine of a process that serves the site or wants to; null where it only looks.
        folder: That process's state folder; null where it only looks.
        lease: As in `ServerPresence`.
    """

    instance: str
    nonce: str
    mutual: bool | None
    host: str | None
    folder: str | None
    lease: str | None

    kind: ClassVar[str] = "server-query"
    checks: ClassVar[Mapping[str, Check]] = {
        "instance": _RANDOM,
        "nonce": _RANDOM,
        "mutual": check.optional(check.true),
        "host": check.optional(check.text(256)),
        "folder": check.optional(check.text(4096)),
        "lease": check.optional(_RANDOM),
    }


@dataclass(frozen=True)
class ServerPresence(CheckedMessage):
    """A server's answer to a `ServerQuery`: it serves this site.

    Attributes:
        nonce: The query's.
        instance: Random id of the process that answers.
        host: Name of its machine.
        folder: Its state folder.
        since: When it began to serve, in seconds since 1970.
        claim: The epoch with which it began to serve; of two settled servers the larger claim wins.
        epoch: The last epoch that it has written down. A server that takes over begins later ones.
        settled: True once it has taken over on purpose or served for half a minute; else null.
        lease: Id of the database whose lease it holds; null where that is a file of its own. Between two servers of
            one database the lease decides.
        embedded: True where the broker is part of it, and ends with it; else null.
    """

    nonce: str
    instance: str
    host: str
    folder: str
    since: int
    claim: int
    epoch: int
    settled: bool | None
    lease: str | None
    embedded: bool | None = None

    kind: ClassVar[str] = "server-presence"
    newer: ClassVar[frozenset[str]] = frozenset({"embedded"})
    checks: ClassVar[Mapping[str, Check]] = {
        "nonce": _RANDOM,
        "instance": _RANDOM,
        "host": check.text(256),
        "folder": check.text(4096),
        "since": check.whole(),
        "claim": check.whole(),
        "epoch": check.whole(),
        "settled": check.optional(check.true),
        "lease": check.optional(_RANDOM),
        "embedded": check.optional(check.true),
    }
