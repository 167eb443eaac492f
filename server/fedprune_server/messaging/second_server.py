"""Keeps a fleet to one server: a server asks over the broker whether another one of its identity serves, and gives way.

A server asks at its start, and again on each new connection, because another one may have been started while it was cut
off: the one that serves stays. Of several that ask at once, the one with the smallest id stays. Answers repeat the
question's nonce, so that neither a crashed server nor a replayed message keeps another from starting, and nothing is
retained at the broker. Between servers of one PostgreSQL database the lease decides instead.
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
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.errors import ExitCode, FedpruneError, ProtocolError
from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import seal, unseal
from fedprune.wire.fleet_messages import ServerPresence, ServerQuery
from fedprune.wire.link import Link
from fedprune.wire.messages import parse
from fedprune.wire.queues import ConnectionUp, Event, Inbox
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder

log = logging.getLogger("fedprune.server")

_CONNECT_S = 10.0

# Seconds in which other servers have to answer, once this one has received its own question from the broker.
_ANSWER_S = 1.0

# Seconds between two questions of a server that serves: two servers that don't know of each other do harm with every
# round.
ASK_INTERVAL_S = 60.0

# Maximum number of messages that are read per second: each costs a signature check, and servers send few.
_HEARD_PER_S = 20.0

_INBOX_BYTES = 2**18
_NONCES = 8


class OtherServerError(FedpruneError):
    """Another server of this identity serves the site."""

    exit_code = ExitCode.OTHER_SERVER


@dataclass(frozen=True)
class ServerInstance:
    """A server as others of its identity learn of it.

    Attributes:
        folder: Its state folder.
        lease: Id of the shared database whose lease it holds; None for a database of its own.
        embedded: Whether the broker is embedded in it: all other servers at that broker give way.
        looks_only: Whether it will never serve, like `doctor`.
    """

    folder: Path
    lease: str | None = None
    embedded: bool = False
    looks_only: bool = False


class SecondServerGuard:
    """Finds other servers of an identity, and tells them that this one serves.

    It has a connection and a thread of its own, so that it answers while the server's loop is busy.

    Args:
        link: The guard's connection, not started.
        stopping: Set once this server has to give way to another one.
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
        self._successor: ServerPresence | None = None
        self._since: int | None = None  # while this server serves
        self._asked_at = self._refilled_at = 0.0
        self._budget = _HEARD_PER_S
        self._echo, self._closed = threading.Event(), threading.Event()
        link.subscribe([self._topic])
        link.start(patient=True)
        self._thread = threading.Thread(target=self._run, name="second-server", daemon=True)
        self._thread.start()

    def others(self) -> list[ServerPresence]:
        """Servers of this identity that answer now, without those that share this one's lease.

        If the broker can't be reached the list is empty. If it doesn't deliver this server's own question, the log
        warns.
        """
        deadline = self._clock() + _CONNECT_S
        while not self._echo.wait(0.05) and self._clock() < deadline:
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

    def enter(self) -> None:
        """Serve the site. Raises `OtherServerError` if another server answers."""
        if not self._embedded:
            self.others()
        with self._lock:
            presence = next(iter(self._others.values()), None)
            if presence is None:
                self._since = int(time.time())
                return
        raise OtherServerError(
            f"another server runs this fleet: {described(presence)}", hint="Stop that one, then start this one."
        )

    def confirm(self) -> None:
        """Raise `OtherServerError` if this server had to give way to another one."""
        if self._successor is not None:
            raise OtherServerError(
                f"another server runs this fleet: {described(self._successor)}",
                hint="It was started while this one was cut off from the broker. Boards follow it, and nothing is "
                "wrong with them. To serve from here again, stop that one first.",
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
            elif not self._embedded and (isinstance(item, ConnectionUp) or self._has_to_ask_again()):
                self._asked_at = self._clock()
                self._ask()

    def _has_to_ask_again(self) -> bool:
        """Whether a server that serves has to ask again. If it was suspended when another one began, or if brokers of a
        cluster were cut off from each other without a broken connection, both would serve and not know of it."""
        return self._since is not None and self._clock() >= self._asked_at + ASK_INTERVAL_S

    def _ask(self) -> None:
        nonce = secrets.token_hex(16)
        with self._lock:
            self._nonces.append(nonce)
        self._say(ServerQuery(self._instance, nonce, self._serves_since, self._lease))

    def _say(self, message: ServerQuery | ServerPresence) -> None:
        self._link.publish(self._topic, seal(self._key, self._topic, 0, 0, message.to_bytes()))

    def _hear(self, raw: bytes) -> None:
        """Handle a message of another server, or this server's own question as the broker returns it."""
        message = parse(unseal(self._key.verifying, self._topic, raw).body)
        if isinstance(message, ServerQuery):
            if message.instance == self._instance:
                self._echo.set()
            elif not self._looks_only and not self._shares(message.lease):
                self._answer(message)
        elif isinstance(message, ServerPresence) and message.instance != self._instance:
            self._give_way(message)

    @property
    def _serves_since(self) -> int:
        """Since when this server claims to serve; 0 while it begins. At its embedded broker it does from the start."""
        return self._since or (int(time.time()) if self._embedded else 0)

    def _answer(self, query: ServerQuery) -> None:
        """Answer a server that asks. A server that begins gives precedence to one that serves; of two that both begin,
        or both come back, only the one with the smaller id answers."""
        serves_since = self._serves_since
        if bool(serves_since) == bool(query.since):
            is_asking = not serves_since or self._clock() < self._asked_at + _ANSWER_S
            has_precedence = not is_asking or self._embedded or query.instance > self._instance
        else:
            has_precedence = bool(serves_since)
        if has_precedence:
            own_fields = (self._host, self._folder, serves_since, self._lease)
            self._say(ServerPresence(query.nonce, self._instance, *own_fields))
        else:
            self._ask()  # the question may be a replayed one: only an answer shows that the other server runs

    def _give_way(self, presence: ServerPresence) -> None:
        """Note another server that answers. If this one serves, it has to give way."""
        with self._lock:
            if presence.nonce not in self._nonces or self._shares(presence.lease):
                return
            if self._since is not None and not presence.since:
                return  # it only begins: it answered before this one served, and learns of this one now
            self._others[presence.instance] = presence
            if self._since is None or self._successor is not None:
                return
            self._successor = presence
        self._stopping.set()

    def _shares(self, lease: str | None) -> bool:
        return lease is not None and lease == self._lease

    def _may_hear(self) -> bool:
        """Take a message from the rate's budget, if it allows one: a flood must not keep a core busy."""
        now = self._clock()
        self._budget = min(_HEARD_PER_S, self._budget + (now - self._refilled_at) * _HEARD_PER_S)
        self._refilled_at = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True


def described(server: ServerPresence) -> str:
    since_text = "which begins now"
    if server.since:
        since_text = time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(server.since))
    return f"on {server.host}, state folder {server.folder}, {since_text}"


@contextmanager
def second_server_guard(
    url: str,
    identity: IdentityFolder,
    ca: Path | None,
    server: ServerInstance,
    stopping: threading.Event | None = None,
) -> Iterator[SecondServerGuard]:
    """A guard with a connection of its own, which is closed at the end.

    Args:
        ca: The authority of the broker's certificate; the server's own by default.
        server, stopping: As in `SecondServerGuard`.

    Raises:
        IdentityError: The identity's or the authorities' files can't be used.
    """
    inbox = Inbox[Event](_INBOX_BYTES)
    link = Link(url, f"fedprune-{secrets.token_hex(12)}", tls=lambda: identity.context(ca), inbox=inbox)
    guard = SecondServerGuard(link, identity.site, identity.key, server, stopping)
    try:
        yield guard
    finally:
        guard.close()
