"""The connection to the broker: paho-mqtt behind one thread-safe queue of what has arrived, the inbox.

A network thread fills the inbox: `get` returns messages and connection events in the order in which they happened.
Sessions are clean: devices and server repeat what must not be lost, so that every connection starts from nothing. A
connection is reported as up once its subscriptions are granted.

The protocol is MQTT 3.1.1: nothing here needs more, every broker speaks it, and some never answer a version 5 CONNECT.
"""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import closing, suppress
from pathlib import Path
from secrets import SystemRandom
from typing import Any

from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode

from fedprune.core.closeable import Closeable
from fedprune.core.errors import BrokerError, ConfigError, FedpruneError, path_remedy
from fedprune.wire.connection_failure import REFUSED_CONNECTION, SILENT_END, connection_failure, connection_remedy
from fedprune.wire.network_client import NetworkClient
from fedprune.wire.queues import (
    LOW_WATER,
    OUTBOX_MESSAGES,
    ConnectionDown,
    ConnectionUp,
    Event,
    Inbox,
    RetainedMessage,
    UnsentMessages,
)
from fedprune.wire.subscriptions import Subscriptions
from fedprune.wire.urls import BrokerUrl


def tls_context(ca: Path | None = None) -> ssl.SSLContext:
    """A client's TLS context with these authorities, by default the system's. Raises `ConfigError` if the file can't be
    used."""
    try:
        return ssl.create_default_context(cafile=str(ca) if ca is not None else None)
    except OSError as error:
        raise authorities_error(ca, error) from error


def authorities_error(ca: Path | None, error: OSError) -> ConfigError:
    """The error about a file of authorities that OpenSSL can't use. Its own texts name its source, and no remedy."""
    if isinstance(error, ssl.SSLError):
        hint = "Is it the authority's certificate, and not a key? `--ca system` trusts the system's authorities."
        return ConfigError(f"{ca} holds no certificate", expected="certificates in PEM form", got="none", hint=hint)
    return ConfigError(f"can't read the CA file {ca}: {error.strerror}", hint=path_remedy(error))


log = logging.getLogger(__name__)

# Unsent bytes in the kernel, where no message can overtake them. Linux' default is several MiB.
_KERNEL_BYTES = 128 * 1024

Will = tuple[str, bytes]


def max_pause(failures: int, spread_s: float = 0.0) -> float:
    """The limit, in seconds, of the random pause before a connection is tried again."""
    return max(spread_s, min(MAX_RECONNECT_PAUSE_S, 0.5 * 2.0 ** min(failures, 10)))


MAX_RECONNECT_PAUSE_S = 60.0
# Seconds after which a connection counts as good, so that the back-off starts again.
_STEADY_S = 10.0
_MAX_SLEEP_S = 60.0
_POLL_S = 1.0

_BAD_CREDENTIALS = 134  # return code 4 of MQTT 3.1.1, as paho numbers it
# Seconds that a broker may take for each answer, in addition to the time-out for connecting.
_ANSWER_TIMEOUT_S = 5.0


class BrokerLink(Closeable):
    """A connection to a broker that reconnects by itself.

    Args:
        client_id: The client's name at the broker, which disconnects an earlier client of the same name.
        will: Topic and payload that the broker publishes (QoS 1, not retained) when the connection is lost; or a
            function that returns them for each connection.
        keepalive: Seconds of silence before a ping; a dead connection is detected after about twice that.
        tls: Returns the TLS context for each connection, so that certificates can be renewed.
        pause_s: Seconds for which the connection is closed when the inbox is full; 0 to drop messages instead.
        wake: Called in the network thread for each received message.
        ignores: Whether to drop a topic's messages at once; called in the network thread.
        marks_retained: Whether retained messages come as `RetainedMessage`; by default they come as all others do.
        qos: Quality of service of received messages. As sessions are clean, messages in flight are lost with the
            connection at 1, too; at 0 this side acknowledges nothing.
    """

    def __init__(
        self,
        url: str,
        client_id: str,
        *,
        will: Will | Callable[[], Will] | None = None,
        keepalive: int = 30,
        tls: Callable[[], ssl.SSLContext] = tls_context,
        inbox: Inbox[Event] | None = None,
        pause_s: float = 0.0,
        wake: Callable[[], None] = lambda: None,
        ignores: Callable[[str], bool] = lambda topic: False,
        marks_retained: bool = False,
        qos: int = 1,
    ) -> None:
        self.url = BrokerUrl.parse(url)
        self.client_id = client_id
        self.dropped_count = 0  # messages that didn't fit into the inbox
        # The least limit of the pause before a reconnection, in seconds: many clients share a broker.
        self.spread_s = 0.0
        # Topic prefix of the sender whose messages last filled the inbox; empty if there were many senders.
        self.flooding_prefix = ""
        self._pause_s = pause_s
        self._wake = wake
        self._ignores = ignores
        self._marks_retained = marks_retained
        self._will = will
        self._will_topic = ""  # of this connection's will
        self._keepalive = keepalive
        self._tls = tls
        self._inbox = inbox or Inbox[Event]()
        self._state = threading.Condition(threading.RLock())
        self._client: paho.Client | None = None
        self._is_up = False
        self._requested_at = self._last_answer_at = 0.0  # of this connection's request, and of the last answer
        self._failure = ""
        self._reported = set[str]()  # reasons that were logged since the connection was last up
        self._logs_failures = False
        self._subscriptions = Subscriptions(qos)
        self._unsent = UnsentMessages()
        self._is_flooded = False
        self._away_s: float | None = None  # seconds for which the connection is closed, or is about to be
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, timeout: float = 10.0, *, patient: bool = False) -> None:
        """Connect within `timeout` seconds, and stay connected from now on.

        A `patient` link returns at once and keeps trying; another one raises `BrokerError` and is closed if the first
        attempt fails.
        """
        self._logs_failures = patient  # otherwise the exception reports the first failure
        self._thread = threading.Thread(target=self._run, name=f"link-{self.client_id}", daemon=True)
        self._thread.start()
        if patient:
            return
        with self._state:
            self._state.wait_for(lambda: bool(self._is_up or self._failure), timeout)
            if self._is_up:
                return
            reason = self._failure or f"no answer within {timeout:g} s"
        self.close()
        raise BrokerError(f"can't connect to the MQTT broker at {self.url}: {reason}", hint=connection_remedy(reason))

    @property
    def connected(self) -> bool:
        return self._is_up

    @property
    def is_away(self) -> bool:
        """Whether `leave` has closed the connection for a time."""
        return self._away_s is not None and not self._is_up

    @property
    def trouble(self) -> str:
        """The reason why the connection is down; empty if it is up or the reason is unknown."""
        return "" if self._is_up else self._failure

    def subscribe(self, topics: Iterable[str], timeout: float = 10.0) -> None:
        """Listen to these topics, now and after every reconnection. Raises `BrokerError` if the link is connected
        and the broker refuses or doesn't answer."""
        with self._state:
            new_topics = self._subscriptions.add(topics)
            client = self._client
            if not self._is_up or client is None or not new_topics:
                return
            self._failure = ""
            self._subscriptions.request(client)
            self._state.wait_for(lambda: self._client is not client or not self._subscriptions.is_awaiting, timeout)
            if self._client is not client:
                return  # the connection went; the next one subscribes to everything
            if self._subscriptions.is_awaiting or self._failure:
                raise BrokerError(
                    f"the MQTT broker at {self.url} doesn't grant a subscription",
                    expected=", ".join(new_topics),
                    got=self._failure or "no answer",
                    hint="Check the broker's access control for this user.",
                )

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        """Queue a message without waiting; returns whether it was queued.

        It isn't while the connection is down or too much is unsent. The caller repeats what matters.
        """
        with self._state:
            client = self._client
            if not self._is_up or client is None or not self.room:
                return False
            info = client.publish(topic, payload, qos)
            if info.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
                return False
            # The network thread removes sent messages from this list under the same lock, hence never before this.
            self._unsent.add(info, len(payload), qos)
            return True

    @property
    def room(self) -> bool:
        """Whether `publish` would take a message now (if connected)."""
        return self._unsent.has_room

    @property
    def unsent(self) -> int:
        return self._unsent.payload_bytes

    def flush(self, timeout: float) -> bool:
        """Wait until everything is sent and, at QoS 1, acknowledged; returns whether that was within `timeout`."""
        with self._state:
            self._state.wait_for(lambda: not self._unsent or not self._is_up, timeout)
            return not self._unsent

    def get(self, timeout: float | None = 0.0) -> tuple[str, bytes] | Event | None:
        """The next message (topic, payload) or event within `timeout` seconds (None: without limit).

        Returns None if nothing came, or as soon as the unsent bytes fall below `LOW_WATER`.
        """
        return self._inbox.get(timeout)

    def wake(self) -> None:
        """Let a waiting `get` return; may be called in any thread."""
        self._inbox.wake()

    def leave(self, seconds: float) -> None:
        """Disconnect without the will being published, and connect again after this time."""
        with self._state:
            client = self._client
            if not self._is_up or client is None:
                return
            self._away_s, self._failure = seconds, f"away for {seconds:.0f} s"
        client.disconnect()

    def close(self, timeout: float = 2.0) -> None:
        """Send what is queued, disconnect without the will being published, and stop; may be called twice."""
        self.flush(timeout)
        self._closing.set()
        with self._state:
            client = self._client
        if client is not None:
            client.disconnect()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout + 5)

    def _run(self) -> None:
        attempt = 0
        while not self._closing.is_set():
            started_at = time.monotonic()
            try:
                with closing(self._new_client()) as client:
                    reason = self._run_client(client)
            except (OSError, FedpruneError) as error:
                reason = connection_failure(error)
            except Exception as error:
                log.warning("connection to %s failed unexpectedly", self.url, exc_info=True)
                reason = f"{type(error).__name__}: {error}"
            self._on_connection_end(reason)
            if self._away_s is not None:
                self._wait(self._away_s)
                self._away_s, attempt = None, 0
                continue
            if self._is_flooded:  # no failure: a flood that continues must not lengthen the pauses
                self._is_flooded = False
                self._closing.wait(self._pause_s)
                continue
            # Only a connection that has lasted resets the back-off: two clients of one name disconnect each other at
            # once.
            attempt = 0 if time.monotonic() - started_at > _STEADY_S else attempt + 1
            self._closing.wait(SystemRandom().uniform(0, max_pause(attempt, self.spread_s)))

    def _wait(self, seconds: float) -> None:
        """Wait by the monotonic clock, unless the link is closed."""
        deadline = time.monotonic() + seconds
        while not self._closing.is_set() and (remaining_s := deadline - time.monotonic()) > 0:
            self._closing.wait(min(remaining_s, _MAX_SLEEP_S))

    def _run_client(self, client: NetworkClient) -> str:
        """Run one connection from CONNECT to its end; returns why it ended."""
        client.connect(self.url.host, self.url.port, self._keepalive)
        with self._state:
            self._client, self._failure = client, ""
        self._requested_at = self._last_answer_at = time.monotonic()
        was_up, closed_at = False, 0.0
        code = MQTTErrorCode.MQTT_ERR_SUCCESS
        try:
            while code == MQTTErrorCode.MQTT_ERR_SUCCESS:
                _acknowledge_promptly(client.socket())
                code = client.run_once(_POLL_S)
                self._remove_sent()
                was_up = was_up or self._is_up
                if not was_up and time.monotonic() > self._last_answer_at + client.connect_timeout + _ANSWER_TIMEOUT_S:
                    return self._failure or "it accepts connections but doesn't answer an MQTT CONNECT"
                if self._closing.is_set():  # DISCONNECT is on its way and ends the loop, unless the network is stuck
                    closed_at = closed_at or time.monotonic()
                    if time.monotonic() - closed_at > 2:
                        break
        finally:
            with self._state:
                failure = self._failure
            with suppress(OSError, ValueError):
                client.disconnect()
            if (sock := client.socket()) is not None:
                sock.close()
        if failure or not self.url.tls or self._last_answer_at > self._requested_at or self._closing.is_set():
            return failure or paho.error_string(code).rstrip(".").lower()
        return f"{SILENT_END}, as if this client's certificate were revoked"

    def _new_client(self) -> NetworkClient:
        # Before the client, which opens sockets: a file of TLS may be missing.
        tls = self._tls() if self.url.tls else None
        will = self._will() if callable(self._will) else self._will
        # A new client for each connection: paho would otherwise send everything that the last one left unsent.
        client = NetworkClient(
            CallbackAPIVersion.VERSION2,
            client_id=self.client_id,
            clean_session=True,
            protocol=paho.MQTTv311,
            reconnect_on_failure=False,
        )
        client.max_queued_messages_set(OUTBOX_MESSAGES)
        client.username_pw_set(self.url.user, self.url.password)
        if tls is not None:
            client.tls_set_context(tls)
        if will is not None:
            self._will_topic = will[0]
            client.will_set(will[0], will[1], qos=1, retain=False)
        client.on_socket_open = lambda _client, _user, sock: send_promptly(sock)
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_message = self._on_message
        return client

    def _on_connect(self, client: paho.Client, _user: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        with self._state:
            self._last_answer_at = time.monotonic()
            if reason.is_failure:
                self._failure = f"{REFUSED_CONNECTION} ({str(reason).lower()})"
                if self._will_topic and reason.value != _BAD_CREDENTIALS:  # some brokers refuse wills, or this topic
                    self._failure += f"; it must allow a will on {self._will_topic}"
            else:
                self._failure = ""
                self._subscriptions.request(client)
                if not self._subscriptions.is_awaiting:
                    self._report_up()

    def _on_subscribe(self, client: paho.Client, _user: Any, mid: int, reasons: Any, _properties: Any) -> None:
        with self._state:
            is_refused = any(r.is_failure for r in reasons)
            topic = self._subscriptions.note_answer(mid)
            if is_refused:
                self._failure = f"it refuses the subscription to {topic}"
                log.error("MQTT broker %s: %s", self.url, self._failure)
            if not self._subscriptions.is_awaiting and not self._is_up:
                if self._failure:
                    client.disconnect()
                elif self._subscriptions.is_complete:
                    self._report_up()
                else:
                    self._subscriptions.request(client)
            self._state.notify_all()

    def _report_up(self) -> None:
        self._is_up = self._logs_failures = True
        self._failure = ""
        self._inbox.put_event(ConnectionUp(time.monotonic() - self._requested_at))
        self._state.notify_all()

    def _on_connection_end(self, reason: str) -> None:
        with self._state:
            was_up, self._is_up = self._is_up, False
            # The user of a connection that was up logs its end.
            is_new_reason = not was_up and reason not in self._reported
            self._reported = set() if was_up else self._reported | {reason}
            self._client, self._failure = None, reason
            self._subscriptions.clear()
            self._unsent.clear()
            if was_up and not self._closing.is_set():
                self._inbox.put_event(ConnectionDown(reason))
            self._state.notify_all()
        if is_new_reason and self._logs_failures and not self._closing.is_set() and not self.is_away:
            log.warning("no connection to the MQTT broker at %s: %s", self.url, reason)

    def _on_message(self, client: paho.Client, _user: Any, message: paho.MQTTMessage) -> None:
        try:
            topic, payload = message.topic, bytes(message.payload)
        except UnicodeDecodeError:
            return
        if self._ignores(topic):
            return
        if message.retain and self._marks_retained:
            has_room = self._inbox.put_retained(RetainedMessage(topic, payload))
        else:
            has_room = self._inbox.put_message(topic, payload)
        if has_room:
            self._wake()
            return
        self.dropped_count += 1
        if self._pause_s and not self._is_flooded:
            self._is_flooded, self.flooding_prefix = True, self._inbox.flooding_prefix()
            # The session is clean: messages of the flood that wait at the broker are lost with the connection.
            client.disconnect()
        elif self.dropped_count == 1 and not self._pause_s:
            log.warning("inbox of %s is full: messages are dropped", self.client_id)

    def _remove_sent(self) -> None:
        with self._state:
            size_before = self._unsent.payload_bytes
            if self._unsent.remove_sent():
                if size_before >= LOW_WATER > self._unsent.payload_bytes:
                    self._inbox.wake()
                self._state.notify_all()


def send_promptly(sock: Any) -> None:
    """Send small packets at once, and keep little in the kernel, where no message can overtake it."""
    for option, value in (("TCP_NODELAY", 1), ("TCP_NOTSENT_LOWAT", _KERNEL_BYTES)):
        with suppress(OSError, AttributeError):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _acknowledge_promptly(sock: Any) -> None:
    """Let Linux acknowledge the next packet at once: a broker that gathers small packets (Nagle) waits for that."""
    with suppress(OSError, AttributeError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
