"""Graphs loaded and run by a child process, which ends when it is idle: onnxruntime takes 37 MB of a process, and a
server needs it for a second per round. The two exchange Python's objects over a pair of sockets that is theirs alone.
"""

from __future__ import annotations

import signal
import socket
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from fedprune.core.closing import Closing
from fedprune.core.errors import FedpruneError, RuntimeUnavailableError

IDLE_S = 20.0
"""Long enough for the requests of a round. The next one starts another process, in half a second."""

_TRIES, _STOP_S = 2, 5.0


@dataclass(frozen=True)
class _Port:
    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class _Described:
    """A loaded graph's own description, as `onnxruntime.InferenceSession` gives it."""

    inputs: tuple[_Port, ...]
    outputs: tuple[_Port, ...]
    providers: tuple[str, ...]
    custom_metadata_map: dict[str, str] = field(default_factory=dict)


class SessionProcess(Closing):
    """Starts the child process when it is needed. Several threads may use it; their requests wait for each other.

    Args:
        program: Python code for the child process, which calls `serve`.
        idle_s: Seconds without a request after which the process ends.
    """

    def __init__(self, program: str, idle_s: float = IDLE_S) -> None:
        self._program, self._idle_s = program, idle_s
        self._lock, self._numbers = threading.Lock(), count()
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._loaded: set[int] = set()
        self._dropped: list[int] = []
        self._closed = False

    def load(self, *graph: Any, exact: bool) -> RemoteSession:
        """A session; the arguments are those of `fedprune.runtime.session.load_graph`."""
        return RemoteSession(self, next(self._numbers), (graph, exact))

    def ask(self, session: int, graph: tuple[Any, ...], *request: Any) -> Any:
        """An answer of the process about a session, whose graph is loaded first if need be.

        Raises:
            FedpruneError: The graph can't be loaded or run.
            RuntimeUnavailableError: The process can't be started, or was killed twice.
        """
        with self._lock:
            tries = _TRIES
            while not self._closed and tries:
                tries -= 1
                with suppress(OSError, EOFError):  # it was killed
                    return self._answer(session, graph, request)
                self._end()
        raise RuntimeUnavailableError(
            "the process in which onnxruntime runs was killed", hint="See whether this machine has memory enough."
        )

    def drop(self, session: int) -> None:
        """Let go of a session with the next request."""
        self._dropped.append(session)

    def close(self) -> None:
        self._closed = True
        self._end()

    def _answer(self, session: int, graph: tuple[Any, ...], request: tuple[Any, ...]) -> Any:
        connection = self._started()
        while self._dropped:
            connection.send(("drop", self._dropped.pop()))
        if session not in self._loaded:
            _asked(connection, "load", session, graph)
            self._loaded.add(session)
        return _asked(connection, request[0], session, *request[1:])

    def _end(self) -> None:
        child, connection = self._child, self._connection
        self._child = self._connection = None
        self._loaded.clear()
        if connection is not None:
            connection.close()
        if child is not None:
            try:
                child.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def _started(self) -> Connection:
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._connection is None:
            ours, its = socket.socketpair()
            with its:
                command = [sys.executable, "-c", self._program, str(its.fileno()), str(self._idle_s)]
                self._child = subprocess.Popen(  # noqa: S603  # nosec B603  # this module, in this Python
                    command, pass_fds=[its.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            self._connection = Connection(ours.detach())
        return self._connection


class RemoteSession:
    """A graph in the child process, with the methods of `onnxruntime.InferenceSession` that `Session` uses."""

    def __init__(self, process: SessionProcess, number: int, graph: tuple[Any, ...]) -> None:
        self._process, self._number, self._graph = process, number, graph
        self._described: _Described = process.ask(number, graph, "describe")

    def get_inputs(self) -> Sequence[_Port]:
        return self._described.inputs

    def get_outputs(self) -> Sequence[_Port]:
        return self._described.outputs

    def get_providers(self) -> Sequence[str]:
        return self._described.providers

    def get_modelmeta(self) -> _Described:
        return self._described

    def run(self, names: Sequence[str], feeds: Mapping[str, Any]) -> list[Any]:
        """Arrays of these outputs. Raises `FedpruneError` if they can't be computed."""
        found: list[Any] = self._process.ask(self._number, self._graph, "run", list(names), dict(feeds))
        return found

    def __del__(self) -> None:
        self._process.drop(self._number)


def _asked(connection: Connection, *request: Any) -> Any:
    connection.send(request)
    found = connection.recv()
    if isinstance(found, FedpruneError):
        raise found
    return found


def serve(load: Callable[..., Any]) -> None:
    """The child process: answers requests until there are none for a while, or the other side is gone.

    Args:
        load: Makes an `onnxruntime.InferenceSession` of the arguments of a request.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd's is for the server, whose end is the connection's
    descriptor, idle_s = sys.argv[1:]
    sessions: dict[int, Any] = {}
    with Connection(int(descriptor)) as connection, suppress(EOFError, OSError):
        while connection.poll(float(idle_s)):
            kind, number, *values = connection.recv()
            if kind == "drop":
                sessions.pop(number, None)
                continue
            try:
                if kind == "load":
                    graph, exact = values[0]
                    sessions[number], found = load(*graph, exact=exact), None
                else:
                    found = _described(sessions[number]) if kind == "describe" else sessions[number].run(*values)
            except FedpruneError as error:
                found = error
            except Exception as error:  # noqa: BLE001 - onnxruntime's own kinds, which the other side doesn't know
                found = FedpruneError(str(error) or type(error).__name__)
            connection.send(found)


def _described(session: Any) -> _Described:
    inputs, outputs = (
        tuple(_Port(p.name, p.type, tuple(p.shape)) for p in ports)
        for ports in (session.get_inputs(), session.get_outputs())
    )
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return _Described(inputs, outputs, tuple(session.get_providers()), metadata)
