"""A child process that loads and runs graphs, and ends when it is idle.

onnxruntime takes 37 MB of a process, and a server needs it for a second per round. The two processes exchange pickled
objects over a pair of sockets that no other process has.
"""

from __future__ import annotations

import signal
import socket
import struct
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from fedprune.core.closeable import Closeable
from fedprune.core.errors import FedpruneError, RuntimeUnavailableError, error_reason
from fedprune.core.imports import program_code

# Longer than the pauses between the requests of a round. The next round starts another process, in half a second.
IDLE_S = 20.0

# For the process to end by itself, once its connection is closed, before it is killed.
_STOP_TIMEOUT_S = 5.0

# A process that reads and writes nothing for an hour during a request hangs. In the form of setsockopt(2): seconds and
# microseconds, as 64-bit systems have them.
_REQUEST_TIMEOUT = struct.pack("@ll", 3600, 0)


@dataclass(frozen=True)
class _Port:
    name: str
    type: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class _GraphDescription:
    """A loaded graph's own description, as `onnxruntime.InferenceSession` gives it."""

    inputs: tuple[_Port, ...]
    outputs: tuple[_Port, ...]
    providers: tuple[str, ...]
    custom_metadata_map: dict[str, str] = field(default_factory=dict)


class SessionProcess(Closeable):
    """The child process, which is started when it is needed. Requests of several threads wait for each other.

    `program` is Python code for the child process, which calls `serve_sessions`; after `idle_s` seconds without a
    request the process ends.
    """

    def __init__(self, program: str, idle_s: float = IDLE_S) -> None:
        self._program, self._idle_s = program, idle_s
        self._lock, self._numbers = threading.Lock(), count()
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        self._held_numbers: set[int] = set()
        self._dropped_numbers: list[int] = []
        self._closed = False

    def load(self, *graph: Any, exact: bool) -> RemoteSession:
        """A session in the child process; the arguments are those of `fedprune.runtime.session.load_graph`."""
        return RemoteSession(self, graph, exact)

    def next_number(self) -> int:
        """A number for a new object that the process will hold."""
        return next(self._numbers)

    def ask(self, kind: str, objects: Sequence[_RemoteObject], *values: Any) -> Any:
        """Ask the process and return its answer; it first gets the objects that it doesn't hold yet. Raises
        `FedpruneError` if the graph can't be loaded or run, `RuntimeUnavailableError` if the process can't be started,
        ended twice without an answer, or was closed."""
        with self._lock:
            try:
                return self._answer(kind, objects, values)
            except (OSError, EOFError):
                # Killed, as by lack of memory, or hanging. Requests change nothing, so this one is repeated.
                self._end()
            try:
                return self._answer(kind, objects, values)
            except (OSError, EOFError) as error:
                code, hung = self._end(), isinstance(error, BlockingIOError)
                if self._closed:
                    raise RuntimeUnavailableError("the process in which onnxruntime runs was stopped") from error
                raise RuntimeUnavailableError(
                    f"the process in which onnxruntime runs ended twice without an answer (exit code {code})",
                    hint="Check that this machine has enough memory." if code == -signal.SIGKILL and not hung else "",
                ) from error

    def drop(self, number: int) -> None:
        """Let the process drop an object, with the next request."""
        # Not at once: finalisers run on any thread, even within a request that holds the lock.
        self._dropped_numbers.append(number)

    def close(self) -> None:
        self._closed = True
        child = self._child
        if child is not None:
            child.kill()  # which also ends the request that another thread waits for
        with self._lock:
            self._end()

    def _answer(self, kind: str, objects: Sequence[_RemoteObject], values: tuple[Any, ...]) -> Any:
        connection = self._connect()
        while self._dropped_numbers:
            number = self._dropped_numbers.pop()
            self._held_numbers.discard(number)
            connection.send(("drop", [number]))
        for item in objects:
            if item.number not in self._held_numbers:
                request_kind, *contents = item.creation_request
                _exchange(connection, request_kind, [item.number], *contents)
                self._held_numbers.add(item.number)
        return _exchange(connection, kind, [item.number for item in objects], *values)

    def _end(self) -> int | None:
        """End the process; returns its exit code."""
        child, connection = self._child, self._connection
        self._child = self._connection = None
        self._held_numbers.clear()
        if connection is not None:
            connection.close()
        if child is None:
            return None
        try:
            return child.wait(0.0 if self._closed else _STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _connect(self) -> Connection:
        if self._child is not None and self._child.poll() is not None:
            self._end()
        if self._connection is None and not self._closed:
            try:
                parent_end, child_end = socket.socketpair()
                with parent_end, child_end:
                    for limit in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                        parent_end.setsockopt(socket.SOL_SOCKET, limit, _REQUEST_TIMEOUT)
                    command = [
                        sys.executable,
                        "-c",
                        program_code(self._program),
                        str(child_end.fileno()),
                        str(self._idle_s),
                    ]
                    self._child = child = subprocess.Popen(  # noqa: S603  # nosec B603  # this module, in this Python
                        command, pass_fds=[child_end.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                    )
                    self._connection = Connection(parent_end.detach())
            except OSError as error:
                raise RuntimeUnavailableError(
                    f"the process in which onnxruntime runs can't be started ({error_reason(error)})"
                ) from error
            # Somebody has to wait for the process when it ends by itself, or it stays as a zombie.
            threading.Thread(target=child.wait, name="fedprune-onnxruntime", daemon=True).start()
        if self._connection is None or self._closed:  # `close` may have been called on another thread meanwhile
            raise EOFError
        return self._connection


class _RemoteObject:
    """An object that the child process holds. `creation_request` sends it, with the first request that needs it, and
    again to a new process."""

    def __init__(self, process: SessionProcess, *creation_request: Any) -> None:
        self._process, self.number, self.creation_request = process, process.next_number(), creation_request

    def __del__(self) -> None:
        self._process.drop(self.number)


class RemoteSession(_RemoteObject):
    """A graph in the child process, with the methods of `onnxruntime.InferenceSession` that `OnnxSession` uses."""

    def __init__(self, process: SessionProcess, graph: tuple[Any, ...], exact: bool) -> None:
        super().__init__(process, "load", graph, exact)
        self._description: _GraphDescription = process.ask("describe", [self])

    def get_inputs(self) -> Sequence[_Port]:
        return self._description.inputs

    def get_outputs(self) -> Sequence[_Port]:
        return self._description.outputs

    def get_providers(self) -> Sequence[str]:
        return self._description.providers

    def get_modelmeta(self) -> _GraphDescription:
        return self._description

    def keep(self, feeds: Mapping[str, Any]) -> RemoteFeeds:
        return RemoteFeeds(self._process, feeds)

    def run(
        self, names: Sequence[str], feeds: Mapping[str, Any], kept_feeds: Mapping[str, Any] | None = None
    ) -> list[Any]:
        """Arrays of these outputs. Raises `FedpruneError` if they can't be computed."""
        objects: list[_RemoteObject] = [self]
        if isinstance(kept_feeds, RemoteFeeds):
            objects.append(kept_feeds)
        else:
            feeds = {**feeds, **(kept_feeds or {})}
        arrays: list[Any] = self._process.ask("run", objects, list(names), dict(feeds))
        return arrays


class RemoteFeeds(dict[str, Any], _RemoteObject):
    """Feeds of several runs, which must not change in between."""

    def __init__(self, process: SessionProcess, feeds: Mapping[str, Any]) -> None:
        dict.__init__(self, feeds)
        _RemoteObject.__init__(self, process, "keep", dict(feeds))


def _exchange(connection: Connection, *request: Any) -> Any:
    connection.send(request)
    answer = connection.recv()
    if isinstance(answer, FedpruneError):
        raise answer
    return answer


def serve_sessions(load: Callable[..., Any]) -> None:
    """Answer requests, in the child process, until none comes for a while or the other side has ended. `load` makes an
    `onnxruntime.InferenceSession` of the arguments of a request."""
    # systemd sends the signal to the whole service. The server ends by it, and this process with the connection.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    descriptor, idle_s = sys.argv[1:]
    objects: dict[int, Any] = {}
    with Connection(int(descriptor)) as connection, suppress(EOFError, OSError):
        while connection.poll(float(idle_s)):
            kind, numbers, *values = connection.recv()
            if kind == "drop":
                objects.pop(numbers[0], None)
                continue
            try:
                answer = None
                if kind == "load":
                    graph, exact = values
                    objects[numbers[0]] = load(*graph, exact=exact)
                elif kind == "keep":
                    objects[numbers[0]] = values[0]
                else:
                    session, *kept_feeds = (objects[number] for number in numbers)
                    answer = _describe(session) if kind == "describe" else _run(session, kept_feeds, *values)
            except FedpruneError as error:
                answer = error
            except Exception as error:  # noqa: BLE001 - onnxruntime's own kinds, which the other side doesn't know
                answer = FedpruneError(str(error) or type(error).__name__)
            connection.send(answer)


def _run(session: Any, kept_feeds: Sequence[Mapping[str, Any]], names: Sequence[str], feeds: dict[str, Any]) -> Any:
    for extra_feeds in kept_feeds:
        feeds.update(extra_feeds)
    return session.run(names, feeds)


def _describe(session: Any) -> _GraphDescription:
    inputs, outputs = (
        tuple(_Port(p.name, p.type, tuple(p.shape)) for p in ports)
        for ports in (session.get_inputs(), session.get_outputs())
    )
    metadata = dict(session.get_modelmeta().custom_metadata_map)
    return _GraphDescription(inputs, outputs, tuple(session.get_providers()), metadata)
