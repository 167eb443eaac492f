"""The embedded broker: amqtt in a child process, for a quick start and for tests.

It needs nothing but Python and no configuration. It has no access control: whoever reaches it can read what passes, and
crowd it. With a certificate it encrypts; without, it belongs on the loopback interface. A fleet in the field belongs
on Mosquitto, EMQX or a hosted broker.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import IO, Any, BinaryIO

from fedprune.core.errors import BrokerError, reason
from fedprune.output.extras import install_command
from fedprune.security.tls import unpinned_context
from fedprune_server.process.child_process import ChildProcess

log = logging.getLogger("fedprune.server")

_CONNECT = bytes.fromhex("100e00044d515454040200050002") + b"fp"
"""An MQTT 3.1.1 CONNECT: clean session, keepalive 5 s, client id `fp`."""

_TRIES = 5
_PORT_PATIENCE_S = 3.0
"""Seconds in which a port that is taken may become free: a server that was killed a moment ago may have left a broker
that is just ending."""
_PAUSE_S = 0.2
_CHILD = "fedprune_server.messaging.broker.child"


@dataclass(frozen=True)
class Traffic:
    """Payload bytes that passed a broker, by channel: up, up/blob, down, down/blob, other.

    Attributes:
        received: From publishers.
        delivered: To subscribers.
    """

    received: dict[str, int] = field(default_factory=dict)
    delivered: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(_sum(self.received, other.received), _sum(self.delivered, other.delivered))


@dataclass(frozen=True)
class TlsFiles:
    """What a broker needs to encrypt.

    Attributes:
        certificate: Its certificate, and those of its authorities (PEM).
        key: The key of that certificate (PEM).
        authority: Whose certificates of clients are right; a client needn't have one.
    """

    certificate: Path
    key: Path
    authority: Path


class EmbeddedBroker:
    """An MQTT 3.1.1 broker in a process of its own that ends with this one, even when this one is killed.

    Args:
        port: TCP port; 0 finds a free one.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 1883, tls: TlsFiles | None = None) -> None:
        self.host = host
        self.port = port
        self._tls = tls
        self._any_port = port == 0
        self._process: ChildProcess[dict[str, Any]] | None = None
        self._errors: IO[bytes] | None = None
        self._lock = threading.Lock()
        self._before = Traffic()
        self._latest = Traffic()

    @property
    def url(self) -> str:
        """What a link on this machine connects to."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104  # nosec B104  # compared with, not listened on
        return f"{'mqtt' if self._tls is None else 'mqtts'}://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.running

    def start(self, timeout: float = 20.0) -> None:
        """Start, and wait until it accepts MQTT connections; does nothing if it is running. Raises `BrokerError` if the
        port is taken, amqtt is missing, or it doesn't come up in time."""
        if self.alive:
            return
        self.stop()
        until = time.monotonic() + _PORT_PATIENCE_S
        for attempt in count(1):
            if self._any_port:
                self.port = _free_port(self.host)
            answer = self._spawn(timeout)
            if answer.get("ready"):
                break
            taken = answer.get("errno") == errno.EADDRINUSE
            if taken and (attempt < _TRIES if self._any_port else time.monotonic() < until):
                self.stop()
                time.sleep(0.0 if self._any_port else _PAUSE_S)  # someone was faster than we, or is just going
                continue
            raise self._failed(answer, taken)
        self._any_port = False  # a restart must come back where clients look for it
        try:
            self._wait_for_mqtt(timeout)
        except BrokerError:
            self.stop()
            raise

    def restart(self) -> None:
        """Stop if it is running, and start on the same port; raises as `start`. Clients connect again by themselves."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """End the child; may be called twice."""
        if self._process is None:
            return
        self.traffic()  # the last chance to learn it
        with self._lock:
            process, self._process = self._process, None
            if process is None:
                return
            self._before, self._latest = self._before + self._latest, Traffic()
            process.stop(5.0)
            if self._errors is not None:
                self._errors.close()

    def traffic(self) -> Traffic:
        """Payload bytes so far, over all restarts; the last known numbers if the child doesn't answer."""
        with self._lock:
            process = self._process
            if process is not None and process.running:
                process.send(b"traffic\n")
                answer = process.receive(5.0)
                if answer is not None and "received" in answer:
                    self._latest = Traffic(answer["received"], answer["delivered"])
            return self._before + self._latest

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _spawn(self, timeout: float) -> dict[str, Any]:
        command = [sys.executable, "-W", "ignore", "-m", _CHILD, "--host", self.host, "--port", str(self.port)]
        if self._tls is not None:
            command += ["--tls", str(self._tls.certificate), str(self._tls.key), str(self._tls.authority)]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `stop`
        command += ["--parent", str(os.getpid())]
        self._process = ChildProcess(command, "the embedded broker", _read_json, errors=self._errors)
        return self._process.receive(timeout) or {}

    def _failed(self, answer: dict[str, Any], taken: bool) -> BrokerError:
        reason = str(answer.get("error") or self._last_words() or "it doesn't answer")
        self.stop()
        if taken:
            return BrokerError(
                f"embedded broker: port {self.port} of {self.host} is taken",
                hint="If another server of this fleet runs there, stop it. Else use that broker (--broker URL) or "
                "another port.",
            )
        hint = install_command("server") if "amqtt" in reason else "Check the address, or use another broker."
        return BrokerError(f"embedded broker on {self.host}:{self.port} doesn't start ({reason})", hint=hint)

    def _last_words(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _wait_for_mqtt(self, timeout: float) -> None:
        host = self.url.partition("://")[2].rsplit(":", 1)[0].strip("[]")
        deadline = time.monotonic() + timeout
        reason = "no answer"
        while self.alive and time.monotonic() < deadline:
            try:
                with ExitStack() as stack:
                    connection = stack.enter_context(socket.create_connection((host, self.port), timeout=2))
                    if self._tls is not None:  # whether it answers is the question here, not who it is
                        connection = stack.enter_context(unpinned_context().wrap_socket(connection))
                    connection.sendall(_CONNECT)
                    answer = connection.recv(4)
                    connection.sendall(b"\xe0\x00")  # DISCONNECT
                if answer == b"\x20\x02\x00\x00":
                    return
                reason = f"it answers {answer.hex() or 'nothing'} to CONNECT"
            except OSError as error:
                reason = error.strerror or str(error)
            time.sleep(0.05)
        raise BrokerError(f"embedded broker on {self.host}:{self.port} doesn't accept connections ({reason})")


def _read_json(stream: BinaryIO) -> dict[str, Any] | None:
    line = stream.readline()
    if not line:
        return None
    answer: dict[str, Any] = json.loads(line)
    return answer


def _free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            raise BrokerError(f"embedded broker: can't listen on {host} ({error.strerror})") from error
        return int(probe.getsockname()[1])


def _sum(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
    return {key: a.get(key, 0) + b.get(key, 0) for key in {**a, **b}}


class BrokerSupervisor:
    """Starts a dead broker again, on a thread of its own: the server's loop doesn't wait for it.

    Args:
        broker: The embedded broker; None for an external broker.
    """

    def __init__(self, broker: EmbeddedBroker | None) -> None:
        self._broker = broker
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Begin a restart if the broker is dead and none is under way; one that failed is tried again."""
        broker = self._broker
        if broker is None or (self._thread is not None and self._thread.is_alive()) or broker.alive:
            return
        log.warning("the embedded broker has died and is started again")
        self._thread = threading.Thread(target=self._restart, args=(broker,), name="fedprune-broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for a restart that is under way, so that the broker that is stopped next is the last one."""
        if self._thread is not None:
            self._thread.join()

    def _restart(self, broker: EmbeddedBroker) -> None:
        try:
            broker.restart()
        except BrokerError as error:
            log.error("%s", error)
        except Exception as error:
            log.error("the embedded broker: %s: %s", type(error).__name__, reason(error), exc_info=error)
