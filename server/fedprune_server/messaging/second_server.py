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
from fedprune.security.signed_envelope import seal, unseal
from fedprune.wire.fleet_messages import ServerPresence, ServerQuery
from fedprune.wire.link import BrokerLink
from fedprune.wire.messages import parse_message
from fedprune.wire.queues import ConnectionUp, Event, Inbox
from fedprune.wire.topics import Topics
from fedprune_server.enrollment.pki import IdentityFolder

log = logging.getLogger("fedprune.server")

_CONNECT_TIMEOUT_S = 10.0

# Seconds in which other servers have to answer, once this one has received its own question from the broker.
_ANSWER_TIMEOUT_S = 1.0

# Seconds between two questions of a server that serves: two servers that don't know of each other do harm with every
# round.
ASK_INTERVAL_S = 60.0

# Maximum number of messages that are read per second: each costs a signature check, and servers send few.
_MAX_MESSAGES_PER_S = 20.0

_INBOX_BYTES = 2**18
_MAX_NONCES = 8


class OtherServerError(FedpruneError):
    """Another server of this identity serves the site."""

    exit_code = ExitCode.OTHER_SERVER


@dataclass(frozen=True)
class ServerInstance:
    """A server as others of its identity learn of it.

    Attributes:
        folder: Its state folder.
        lease: Id of the shared database whose lease it holds; None for a database of its own.
        owns_broker: Whether the broker is embedded in it: all other servers at that broker give way.
        only_looks: Whether it will never serve, like `doctor`.
    """

    folder: Path
    lease: str | None = None
    owns_broker: bool = False
    only_looks: bool = False


class SecondServerGuard:
    """Finds other servers of an identity, and tells them that this one serves.

    It has a thread and a connection (`link`, not started yet) of its own, so that it answers while the server's loop is
    busy. `stopping` is set once this server has to give way to another one."""

    def __init__(
        self,
        link: BrokerLink,
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
        self._lease, self._owns_broker, self._only_looks = server.lease, server.owns_broker, server.only_looks
        self._lock = threading.Lock()
        self._nonces: deque[str] = deque(maxlen=_MAX_NONCES)
        self._others: dict[str, ServerPresence] = {}
        self._successor: ServerPresence | None = None
        self._serving_since: int | None = None  # while this server serves
        self._asked_at = self._refilled_at = 0.0
        self._budget = _MAX_MESSAGES_PER_S
        self._question_echoed, self._closed = threading.Event(), threading.Event()
        link.subscribe([self._topic])
        link.start(patient=True)
        self._thread = threading.Thread(target=self._run, name="second-server", daemon=True)
        self._thread.start()

    def others(self) -> list[ServerPresence]:
        """Servers of this identity that answer now, without those that share this one's lease.

        If the broker can't be reached the list is empty. If it doesn't deliver this server's own question, the log
        warns.
        """
        deadline = self._clock() + _CONNECT_TIMEOUT_S
        while not self._question_echoed.wait(0.05) and self._clock() < deadline:
            if self._link.trouble:
                return []
        if not self._question_echoed.is_set():
            log.warning(
                "whether another server of this identity runs can't be seen: the broker doesn't deliver %s to servers. "
                "Write its rules again: fedprune-server broker-config",
                self._topic,
            )
            return []
        self._closed.wait(_ANSWER_TIMEOUT_S)
        with self._lock:
            return list(self._others.values())

    def enter(self) -> None:
        """Serve the site. Raises `OtherServerError` if another server answers."""
        if not self._owns_broker:
            self.others()
        with self._lock:
            presence = next(iter(self._others.values()), None)
            if presence is None:
                self._serving_since = int(time.time())
                return
        raise OtherServerError(
            f"another server runs this fleet: {server_text(presence)}", hint="Stop that one, then start this one."
        )

    def confirm(self) -> None:
        """Raise `OtherServerError` if this server had to give way to another one."""
        if self._successor is not None:
            raise OtherServerError(
                f"another server runs this fleet: {server_text(self._successor)}",
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
            if isinstance(item, tuple) and self._take_budget():
                try:
                    self._on_message(item[1])
                except ProtocolError as error:
                    log.debug("%s: %s", self._topic, error)
            elif not self._owns_broker and (isinstance(item, ConnectionUp) or self._is_question_due()):
                self._asked_at = self._clock()
                self._ask()

    def _is_question_due(self) -> bool:
        """Whether a server that serves has to ask again. If it was suspended when another one began, or if brokers of a
        cluster were cut off from each other without a broken connection, both would serve and not know of it."""
        return self._serving_since is not None and self._clock() >= self._asked_at + ASK_INTERVAL_S

    def _ask(self) -> None:
        nonce = secrets.token_hex(16)
        with self._lock:
            self._nonces.append(nonce)
        self._publish(ServerQuery(self._instance, nonce, self._claimed_since, self._lease))

    def _publish(self, message: ServerQuery | ServerPresence) -> None:
        self._link.publish(self._topic, seal(self._key, self._topic, 0, 0, message.to_bytes()))

    def _on_message(self, raw: bytes) -> None:
        """Handle a message of another server, or this server's own question as the broker returns it."""
        message = parse_message(unseal(self._key.verifying_key, self._topic, raw).body)
        if isinstance(message, ServerQuery):
            if message.instance == self._instance:
                self._question_echoed.set()
            elif not self._only_looks and not self._shares_lease(message.lease):
                self._answer(message)
        elif isinstance(message, ServerPresence) and message.instance != self._instance:
            self._give_way(message)

    @property
    def _claimed_since(self) -> int:
        """Since when this server claims to serve; 0 while it begins. At its embedded broker it does from the start."""
        return self._serving_since or (int(time.time()) if self._owns_broker else 0)

    def _answer(self, query: ServerQuery) -> None:
        """Answer a server that asks, if this one has precedence: the one that serves before one that begins; if both
        begin or both come back, the one with the smaller id. Without precedence, ask the other."""
        serves_since = self._claimed_since
        if bool(serves_since) == bool(query.since):
            is_asking = not serves_since or self._clock() < self._asked_at + _ANSWER_TIMEOUT_S
            has_precedence = not is_asking or self._owns_broker or query.instance > self._instance
        else:
            has_precedence = bool(serves_since)
        if has_precedence:
            own_fields = (self._host, self._folder, serves_since, self._lease)
            self._publish(ServerPresence(query.nonce, self._instance, *own_fields))
        else:
            self._ask()  # the question may be a replayed one: only an answer shows that the other server runs

    def _give_way(self, presence: ServerPresence) -> None:
        """Note another server that answers. If this one serves, it has to give way."""
        with self._lock:
            if presence.nonce not in self._nonces or self._shares_lease(presence.lease):
                return
            if self._serving_since is not None and not presence.since:
                return  # it only begins: it answered before this one served, and learns of this one now
            self._others[presence.instance] = presence
            if self._serving_since is None or self._successor is not None:
                return
            self._successor = presence
        self._stopping.set()

    def _shares_lease(self, lease: str | None) -> bool:
        return lease is not None and lease == self._lease

    def _take_budget(self) -> bool:
        """Take a message from the rate's budget, if it allows one: a flood must not keep a core busy."""
        now = self._clock()
        self._budget = min(_MAX_MESSAGES_PER_S, self._budget + (now - self._refilled_at) * _MAX_MESSAGES_PER_S)
        self._refilled_at = now
        if self._budget < 1:
            return False
        self._budget -= 1
        return True


def server_text(server: ServerPresence) -> str:
    since_text = "which begins now"
    if server.since:
        since_text = time.strftime("since %Y-%m-%d %H:%M:%S", time.localtime(server.since))
    return f"on {server.host}, state folder {server.folder}, {since_text}"


@contextmanager
def second_server_guard(
    url: str, identity: IdentityFolder, ca: Path | None, server: ServerInstance, stopping: threading.Event | None = None
) -> Iterator[SecondServerGuard]:
    """A guard with a connection of its own, which is closed at the end. `ca` is the authority of the broker's
    certificate, the server's own by default. Raises `IdentityError` if the identity's or the authorities' files can't
    be used."""
    inbox = Inbox[Event](_INBOX_BYTES)
    link = BrokerLink(url, f"fedprune-{secrets.token_hex(12)}", tls=lambda: identity.tls_context(ca), inbox=inbox)
    guard = SecondServerGuard(link, identity.site, identity.key, server, stopping)
    try:
        yield guard
    finally:
        guard.close()
