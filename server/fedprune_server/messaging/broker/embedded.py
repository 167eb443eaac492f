"""The embedded broker: Mosquitto or amqtt in a child process, for a quick start and for tests.

It needs no configuration. With an identity it has the limits and access rules of a fleet's broker (`broker_files`): one
port for members, and the next one for boards that join. Without, any client that reaches it can read its messages and
flood it, so that it belongs on the loopback interface.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from itertools import count
from typing import IO

from fedprune.core.errors import BrokerError, error_reason
from fedprune.core.imports import program_code
from fedprune.security.tls import unpinned_context
from fedprune_server.messaging.broker.programs import Program, TlsFiles, available_programs
from fedprune_server.process.child_process import wait_or_kill

log = logging.getLogger("fedprune.server")

# An MQTT 3.1.1 CONNECT: clean session, keepalive 5 s, client id `fp`.
_CONNECT_PACKET = bytes.fromhex("100e00044d515454040200050002") + b"fp"

_PORT_ATTEMPTS = 5

# Seconds for which a taken port may become free: a server that was killed a moment ago may have left a broker that is
# just ending.
_PORT_PATIENCE_S = 3.0
_PAUSE_S = 0.2

# Runs a command that dies with this process, however this one ends, and that no signal but SIGKILL ends: a terminal or
# a service manager may send the others to the whole group. This process handles them: it first receives the boards'
# remaining messages, then ends the broker.
_LAUNCHER = """\
import os, signal, sys
from fedprune.core.parent_death import set_parent_death_signal
set_parent_death_signal(signal.SIGKILL)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class PortTakenError(BrokerError):
    """Another program listens on the embedded broker's port."""


class EmbeddedBroker:
    """An MQTT 3.1.1 broker in a process of its own that ends with this one, even when this one is killed.

    Port 0 finds a free one. The first program of `candidates` that starts is the broker; by default the system's
    Mosquitto or else amqtt."""

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 1883,
        tls: TlsFiles | None = None,
        candidates: Sequence[Program] | None = None,
    ) -> None:
        self.host = host
        self.port = port
        self.program: Program | None = None
        """The running broker's program, once it has started."""
        self._tls = tls
        self._candidates = candidates
        self._takes_any_port = port == 0
        self._process: subprocess.Popen[bytes] | None = None
        self._errors: IO[bytes] | None = None
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """The address for connections from this machine."""
        host = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "[::1]"}.get(self.host, self.host)  # noqa: S104  # nosec B104  # compared with, not listened on
        return f"{'mqtt' if self._tls is None else 'mqtts'}://{host}:{self.port}"

    @property
    def _ports(self) -> tuple[int, ...]:
        """Its ports; the last one is open to clients without a certificate."""
        return (self.port,) if self._tls is None else (self.port, self.port + 1)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, timeout: float = 20.0) -> None:
        """Start, and wait until it accepts MQTT connections; does nothing if it is running. Raises `PortTakenError`, or
        `BrokerError` if no program comes up in time."""
        if self.is_alive:
            return
        self.stop()
        if self._candidates is None:
            self._candidates = available_programs()
        for number, program in enumerate(self._candidates, start=1):
            problem = self._start(program, timeout)
            if not problem:
                self.program = program
                self._takes_any_port = False  # a restart must come back where clients look for it
                return
            message = f"embedded broker ({program}) on {self.host}:{self.port} doesn't start ({problem})"
            if number == len(self._candidates):
                raise BrokerError(message, hint=program.hint)
            log.warning("%s; %s takes its place", message, self._candidates[number])

    def stop(self) -> None:
        """End the child; may be called twice."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            wait_or_kill(process, 5.0)
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def __enter__(self) -> EmbeddedBroker:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _start(self, program: Program, timeout: float) -> str:
        """Start a program on the port; returns the problem, empty if there is none. Raises `PortTakenError`."""
        patience_ends_at = time.monotonic() + _PORT_PATIENCE_S
        for attempt in count(1):
            if self._takes_any_port:
                self.port = _bindable_port(self.host, 0)
            problem = ""
            if self._has_free_ports():
                self._spawn(program)
                problem = self._wait_for_mqtt(timeout)
                if not problem:
                    return ""
                self.stop()
                if self._has_free_ports():
                    return problem
            if attempt == _PORT_ATTEMPTS if self._takes_any_port else time.monotonic() > patience_ends_at:
                break
            # Another process took the port between our check and the broker's start, or is just leaving it.
            time.sleep(0.0 if self._takes_any_port else _PAUSE_S)
        raise PortTakenError(
            f"embedded broker: port {' or '.join(map(str, self._ports))} of {self.host} is taken",
            hint="Use the broker that listens there (--broker URL), or another port.",
        )

    def _has_free_ports(self) -> bool:
        return all(_bindable_port(self.host, port) for port in self._ports)

    def _spawn(self, program: Program) -> None:
        """Start the process on a thread that lives as long as the process: with a parent-death signal, Linux ends a
        child when the thread that has started it ends."""
        if self._tls is not None:
            self._tls.write_rules(self.host, self.port)
        arguments, input_bytes = program.command(self.host, self.port, self._tls)
        self._errors = errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `stop`
        started: Future[subprocess.Popen[bytes]] = Future()

        def run() -> None:
            try:
                with tempfile.TemporaryFile() as config:
                    config.write(input_bytes)
                    config.seek(0)
                    process = subprocess.Popen(  # noqa: S603  # nosec B603  # a broker, with words that we have made
                        [sys.executable, "-W", "ignore", "-c", program_code(_LAUNCHER), str(os.getpid()), *arguments],
                        stdin=config, stdout=errors, stderr=errors, start_new_session=True,
                    )  # fmt: skip
            except OSError as error:
                problem = f"embedded broker ({program}) can't be started ({error_reason(error)})"
                started.set_exception(BrokerError(problem))
                return
            started.set_result(process)
            process.wait()

        threading.Thread(target=run, name="fedprune-broker", daemon=True).start()
        self._process = started.result()

    def _last_error_line(self) -> str:
        if self._errors is None:
            return ""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _wait_for_mqtt(self, timeout: float) -> str:
        """Wait until the broker accepts connections; returns the problem, empty if there is none."""
        host = self.url.partition("://")[2].rsplit(":", 1)[0].strip("[]")
        deadline = time.monotonic() + timeout
        problem = "no answer"
        while self.is_alive and time.monotonic() < deadline:
            try:
                with ExitStack() as stack:
                    connection = stack.enter_context(socket.create_connection((host, self._ports[-1]), timeout=2))
                    if self._tls is not None:  # unverified: only whether it answers is of interest here
                        connection = stack.enter_context(unpinned_context().wrap_socket(connection))
                    connection.sendall(_CONNECT_PACKET)
                    answer = connection.recv(4)
                    connection.sendall(b"\xe0\x00")  # DISCONNECT
                if answer == b"\x20\x02\x00\x00":
                    return "" if self.is_alive else self._last_error_line()
                problem = f"it answers {answer.hex() or 'nothing'} to CONNECT"
            except OSError as error:
                problem = error.strerror or str(error)
            time.sleep(0.02)
        return problem if self.is_alive else self._last_error_line() or "it has ended"


def _bindable_port(host: str, port: int) -> int:
    """A port that can be bound: the given one, or a free one for 0. Returns 0 if the port is taken. Raises
    `BrokerError` if the address isn't one of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As brokers do: closed connections that linger in TIME_WAIT don't make a port taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:  # the latter for the port after the last one
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                return 0
            raise BrokerError(f"embedded broker: can't listen on {host}:{port} ({error_reason(error)})") from error
        return int(probe.getsockname()[1])


class BrokerSupervisor:
    """Starts a dead broker again, on a thread of its own: the server's loop doesn't wait for it. An external broker,
    None, is left alone."""

    def __init__(self, broker: EmbeddedBroker | None) -> None:
        self._broker = broker
        self._thread: threading.Thread | None = None

    def tick(self) -> None:
        """Begin a restart if the broker is dead and no restart is under way. A failed restart is repeated."""
        broker = self._broker
        if broker is None or (self._thread is not None and self._thread.is_alive()) or broker.is_alive:
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
            broker.stop()
            broker.start()  # on the same port, where clients connect again by themselves
        except BrokerError as error:
            log.error("%s", error)
        except Exception as error:
            log.error("the embedded broker: %s: %s", type(error).__name__, error_reason(error), exc_info=error)
