"""Messages by which servers of one identity find each other; devices never receive them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fedprune.wire.checked_message import CheckedMessage, newer
from fedprune.wire.fields import Count, TrueOrAbsent, hexadecimal, text

Random = Annotated[str, hexadecimal(32)]


@dataclass(frozen=True)
class ServerQuery(CheckedMessage, kind="server-query"):
    """A query for the servers that serve a site."""

    instance: Random
    """Random id of the querying process."""
    nonce: Random
    """Random; answers repeat it, so that older answers are ignored."""
    mutual: TrueOrAbsent | None
    """True where those who answer are to ask in turn, since the process serves the site itself; else null."""
    host: Annotated[str, text(256)] | None
    """Name of the machine of a process that serves the site or wants to; null where it only looks."""
    folder: Annotated[str, text(4096)] | None
    """That process's state folder; null where it only looks."""
    lease: Random | None
    """As in `ServerPresence`."""


@dataclass(frozen=True)
class ServerPresence(CheckedMessage, kind="server-presence"):
    """A server's answer to a `ServerQuery`: it serves this site."""

    nonce: Random
    """The query's."""
    instance: Random
    """Random id of the answering process."""
    host: Annotated[str, text(256)]
    """Name of its machine."""
    folder: Annotated[str, text(4096)]
    """Its state folder."""
    since: Count
    """When it began to serve, in seconds since 1970."""
    claim: Count
    """The epoch with which it began to serve; of two settled servers the larger claim wins."""
    epoch: Count
    """The last epoch that it has written down. A server that takes over begins later ones."""
    settled: TrueOrAbsent | None
    """True once it has taken over on purpose or served for half a minute; else null."""
    lease: Random | None
    """Id of the database whose lease it holds; null where that is a file of its own. Between two servers of one
    database the lease decides."""
    embedded: TrueOrAbsent | None = newer()
    """True where the broker is part of it, and ends with it; else null."""
