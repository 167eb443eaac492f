"""One server per fleet: servers with one identity find each other at the broker, and all but one end.

A server asks at its start, and every few seconds while it serves, which other servers of its identity serve the site.
Answers repeat the question's nonce, so that neither a crashed server nor a repeated message keeps another from
starting, and nothing is retained at the broker. Between servers of one PostgreSQL database the lease decides instead.
"""

from __future__ import annotations

import logging
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from fedprune.core.errors import ExitCode, FedpruneError, ProtocolError
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import EpochFile, seal, unseal
from fedprune.wire.fleet_messages import ServerPresence, ServerQuery
from fedprune.wire.link import Link
from fedprune.wire.messages import parse
from fedprune.wire.queues import ConnectionUp, Event, Inbox
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder

log = logging.getLogger("fedprune.server")

ASKED_EVERY_S = 10.0
SETTLED_S = 30.0
"""A server that has served for so long without another one in sight is the site's server: one that was cut off
meanwhile yields to it. A younger one yields to the older one."""

_CONNECT_S = 10.0
_ANSWER_S = 1.0
"""Time that other servers have to answer, once this one has heard its own question."""

_HEARD_PER_S = 20.0
"""Limit of messages that are read: each costs a signature check, and a few servers send one every few seconds."""

_INBOX_BYTES = 2**18
_NONCES = 8
_CANDIDATES = 20


class OtherServerError(FedpruneError):
    """Another server of this identity serves the site."""

    exit_code = ExitCode.OTHER_SERVER


@dataclass(frozen=True)
class Candidate:
    """Another server of this identity that serves the site, or was started to.

    Attributes:
        since: When it was first heard, or began to serve if it has taken over, in seconds since 1970.
        heard_at: When it was last heard.
        leads: Whether it has taken over.
    """

    host: str
    folder: str
    since: float
    heard_at: float
    leads: bool = False


@dataclass(frozen=True)
class ServerInstance:
    """A server as others of its identity learn of it.

    Attributes:
        lease: Id of the shared database whose lease it holds; None for a database of its own.
        embedded: Whether the broker ends with it.
        looks_only: Whether it will never serve, as `doctor`.
    """

    folder: Path
    lease: str | None = None
    embedded: bool = False
    looks_only: bool = False


class Leadership:
    """A server's claim to be the one that serves its site.

    It has a connection and a thread of its own, so that it answers while the server's loop is busy.

    Args:
        link: Its connection, not started.
        stopping: Set once another server has taken the site over.
        clock: Monotonic clock.
    """

    def __init__(
        self,
        link: Link,
        site: str,
        key: SigningKey,
        server: ServerInstance,
        stopping: threading.Event | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stopping = stopping or threading.Event()
        self._link, self._topic, self._key, self._clock = link, Topics(site).servers(), key, clock
        self._instance = secrets.token_hex(16)
        self._host, self._folder = socket.gethostname()[:256], str(server.folder.resolve())[:4096]
        self._lease, self._embedded, self._looks_only = server.lease, server.embedded, server.looks_only
        self._lock = threading.Lock()
        self._nonces: deque[str] = deque(maxlen=_NONCES)
        self._others: dict[str, ServerPresence] = {}
        self._replaced: frozenset[str] = frozenset()
        self._candidates: dict[tuple[str, str], Candidate] = {}
        self._successor: ServerPresence | None = None
        self._epochs: EpochFile | None = None  # while this server serves
        self._claim = self._since = 0
        self._took_over = False
        self._served_at = self._asked_at = self._refilled_at = 0.0
        self._budget = _HEARD_PER_S
        self._echo, self._closed = threading.Event(), threading.Event()
        link.subscribe([self._topic])
        link.start(patient=True)
        self._thread = threading.Thread(target=self._run, name="leadership", daemon=True)
        self._thread.start()

    def others(self) -> list[ServerPresence]:
        """Servers of this identity that answer now; those that share this one's lease are left out.

        Where the broker can't be reached the list is empty; where it doesn't deliver the question itself, the log
        warns.
        """
        until = self._clock() + _CONNECT_S
        while not self._echo.wait(0.05) and self._clock() < until:
            if self._link.trouble:
                return []
        if not self._echo.is_set():
            log.warning(
                "whether another server of this identity runs can't be seen: the broker doesn't deliver %s to servers. "
                "Write its rules again: fedprune-server broker-config",
                self._topic,
            )
            return []
        self._closed.wait(_ANSWER_S)
        with self._lock:
            return list(self._others.values())

    def candidates(self) -> list[Candidate]:
        """Other servers that were heard while this one served; may be asked from any thread."""
        with self._lock:
            return list(self._candidates.values())

    def enter(self, epochs: EpochFile, *, take_over: bool, alone: bool = False) -> None:
        """Become the site's server.

        Args:
            epochs: The server's, of which the claim is one.
            take_over: Whether to replace a server that answers.
            alone: Whether no other server can have been at the broker yet, so that none is waited for.

        Raises:
            OtherServerError: Another server answers, and `take_over` is not set, or the broker ends with that server.
            StorageError: The claim's epoch can't be written down.
        """
        found = [] if alone else self.others()
        if hosts := [other for other in found if other.embedded]:
            raise OtherServerError(
                f"another server runs this fleet: {described(hosts[0])}",
                hint="The broker is part of that server and ends with it. Stop that server, then start this one with "
                "an embedded broker on the same port (without --broker): boards connect to it by themselves.",
            )
        if found and not take_over:
            raise OtherServerError(
                f"another server runs this fleet: {described(found[0])}",
                hint="Stop that one; or start this one with --take-over: then that one ends by itself, and boards "
                "follow this one.",
            )
        for other in found:
            log.warning("taking this fleet over from the server %s", described(other))
        if found:
            epochs.pass_over(max(o.epoch for o in found))
        with self._lock:
            self._others.clear()
            self._replaced = frozenset(o.instance for o in found)
            self._epochs, self._claim, self._took_over = epochs, epochs.next(), bool(found)
            self._since, self._served_at = int(time.time()), self._clock()
        self._ask()  # another server that hears it asks in turn, and learns of this one at once

    def confirm(self) -> None:
        """Raise `OtherServerError` if another server has taken over."""
        if self._successor is not None:
            raise OtherServerError(
                f"another server has taken this fleet over: {described(self._successor)}",
                hint="Boards follow that one, and nothing is wrong with them. To serve from here again: --take-over.",
            )

    def close(self) -> None:
        self._closed.set()
        self._thread.join()
        self._link.close()

    def _run(self) -> None:
        while not self._closed.is_set():
            item = self._link.get(0.2)
            if isinstance(item, tuple) and self._may_hear():
                try:
                    self._hear(item[1])
                except ProtocolError as error:
                    log.debug("%s: %s", self._topic, error)
            due = self._clock() >= self._asked_at + ASKED_EVERY_S and self._epochs is not None
            if isinstance(item, ConnectionUp) or (due and self._link.connected):
                self._ask()

    def _ask(self, *, mutual: bool = True) -> None:
        nonce = secrets.token_hex(16)
        with self._lock:
            self._nonces.append(nonce)
            self._asked_at = self._clock()
        mutual = mutual and self._epochs is not None
        host, folder = (None, None) if self._looks_only else (self._host, self._folder)
        self._say(ServerQuery(self._instance, nonce, mutual or None, host, folder, self._lease))

    def _say(self, message: ServerQuery | ServerPresence) -> None:
        self._link.publish(self._topic, seal(self._key, self._topic, 0, 0, message.to_bytes()))

    def _hear(self, raw: bytes) -> None:
        message = parse(unseal(self._key.verifying, self._topic, raw).body)
        if isinstance(message, ServerQuery):
            if message.instance == self._instance:
                self._echo.set()
            elif self._epochs is not None:
                self._say(self._presence(message.nonce))
                if message.host and message.folder and not self._expected(message):
                    with self._lock:
                        self._note(message.host, message.folder)
                if message.mutual:
                    self._ask(mutual=False)
        elif isinstance(message, ServerPresence) and message.instance != self._instance:
            self._judge(message)

    def _expected(self, query: ServerQuery) -> bool:
        """Whether a query comes from a server of the same lease, or one that this server has replaced."""
        return query.instance in self._replaced or (self._lease is not None and query.lease == self._lease)

    def _note(self, host: str, folder: str) -> None:
        """Remember a server that was heard; of many, the one that was silent for longest is forgotten."""
        now = time.time()
        before = self._candidates.pop((host, folder), Candidate(host, folder, now, now))
        self._candidates[host, folder] = replace(before, heard_at=now)
        if len(self._candidates) > _CANDIDATES:
            del self._candidates[next(iter(self._candidates))]

    def _may_hear(self) -> bool:
        """Whether the rate limit allows another message: a flood must not keep this thread, and so a core, busy."""
        now = self._clock()
        self._budget = min(_HEARD_PER_S, self._budget + (now - self._refilled_at) * _HEARD_PER_S)
        self._refilled_at = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True

    def _presence(self, nonce: str) -> ServerPresence:
        epoch = 0 if self._epochs is None else self._epochs.written
        settled = self._settled() or None
        place = self._host, self._folder, self._since
        return ServerPresence(
            nonce, self._instance, *place, self._claim, epoch, settled, self._lease, self._embedded or None
        )

    def _settled(self) -> bool:
        return self._took_over or self._clock() >= self._served_at + SETTLED_S

    def _judge(self, other: ServerPresence) -> None:
        with self._lock:
            if other.nonce not in self._nonces or (self._lease is not None and other.lease == self._lease):
                return
            self._others[other.instance] = other
            ours = _rank(self._settled(), self._claim, self._instance)
            theirs = _rank(bool(other.settled), other.claim, other.instance)
            if self._epochs is None or theirs <= ours or self._successor is not None:
                return
            self._successor = other
            self._note(other.host, other.folder)
            place = other.host, other.folder
            self._candidates[place] = replace(self._candidates[place], since=other.since, leads=True)
        self._stopping.set()


def _rank(settled: bool, claim: int, instance: str) -> tuple[bool, int, str]:
    """Of two servers the higher one stays: the settled one, of two settled the later, of two new the earlier."""
    return settled, claim if settled else -claim, instance


def described(server: ServerPresence) -> str:
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(server.since))
    return f"on {server.host}, state folder {server.folder}, since {since}"


@contextmanager
def leadership(
    url: str,
    identity: IdentityFolder,
    ca: Path | None,
    server: ServerInstance,
    stopping: threading.Event | None = None,
) -> Iterator[Leadership]:
    """A server's leadership over a connection of its own, which ends with the context.

    Args:
        ca: Who vouches for the broker; the server's own authority by default.
        server, stopping: As in `Leadership`.

    Raises:
        IdentityError: The identity's or the authorities' files can't be used.
    """
    inbox = Inbox[Event](_INBOX_BYTES)
    link = Link(url, f"fedprune-{secrets.token_hex(12)}", tls=lambda: identity.context(ca), inbox=inbox)
    made = Leadership(link, identity.site, identity.key, server, stopping)
    try:
        yield made
    finally:
        made.close()
