"""Transfers over HTTPS: a thread each, which the loop watches, and a connection that it can cut."""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from fedprune.core.errors import FedpruneError
from fedprune.core.text import one_line
from fedprune.wire.link import failure, send_promptly
from fedprune.wire.transfer import LEAST_BYTES_PER_S
from fedprune.wire.urls import WebServer

SILENT_S = 10.0  # how long the server may take to connect, and to send nothing

STALL_S = 30.0
"""How long a leaf may take, or an answer to begin, and how far a transfer may fall behind `LEAST_BYTES_PER_S`. What
moved faster before is no credit."""


class HttpTransferError(Exception):
    """A web server doesn't do what it should."""


class HttpTransfer(ABC):
    """A transfer in a thread of its own. `failure` is why it ended early, in one line."""

    def __init__(
        self,
        place: WebServer,
        context: Callable[[], ssl.SSLContext],
        clock: Callable[[], float],
        silent_s: float | None = None,
    ) -> None:
        self.failure = ""
        self._clock = clock
        self._moved_at = clock()
        self._behind = 0.0
        self._ending = threading.Event()
        self._connection = HttpConnection(place, context, silent_s)
        self._thread = threading.Thread(target=self._run, name="fedprune-web", daemon=True)

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ending.is_set()

    @property
    def stalled(self) -> bool:
        """Whether nothing has moved for too long, or too little."""
        return self._behind + self._clock() - self._moved_at > STALL_S

    def over(self) -> bool:
        """Whether it has ended; a stalled one is stopped."""
        if self.alive and self.stalled:
            least = f"{LEAST_BYTES_PER_S / 1024:g} KiB a second"
            self.stop(f"nothing more has moved for {STALL_S:g} s, or it is as far behind {least}")
        return not self.alive

    def stop(self, why: str = "") -> None:
        if self._thread.is_alive() and not self._ending.is_set():
            self.failure = why
        self._ending.set()
        self._connection.cut()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    @abstractmethod
    def _transfer(self) -> None:
        """Do it, in its thread."""

    def _run(self) -> None:
        try:
            self._transfer()
        except (OSError, FedpruneError) as error:
            self._fail(failure(error))
        except (HttpTransferError, http.client.HTTPException, ValueError) as error:
            self._fail(str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - it is handed to the loop, and MQTT continues
            self._fail(f"unexpected error: {type(error).__name__}: {error}")
        finally:
            self._connection.close()

    def _fail(self, why: str) -> None:
        if not self._ending.is_set():  # else that is why
            self.failure = one_line(why)  # it may be the server's own words

    def _came(self, seconds: float) -> None:
        """Something moved that may have taken so long."""
        now = self._clock()
        self._behind = max(0.0, self._behind + now - self._moved_at - seconds)
        self._moved_at = now

    @contextmanager
    def _at_the_disk(self) -> Iterator[None]:
        """It is not the server that takes so long."""
        self._moved_at = math.inf
        yield
        self._moved_at = self._clock()

    def _check(self) -> None:
        if self._ending.is_set():
            raise HttpTransferError("it was told to stop")


class HttpConnection(http.client.HTTPConnection):
    """One connection, kept as long as it goes, which another thread may cut at any moment."""

    def __init__(self, place: WebServer, context: Callable[[], ssl.SSLContext], silent_s: float | None = None) -> None:
        super().__init__(place.host, place.port, timeout=SILENT_S)
        self._silent_s = SILENT_S if silent_s is None else silent_s
        self._tls = context if place.tls else None
        if place.tls:
            self.default_port = 443  # else the header Host would name it
        self._is_cut = False

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        send_promptly(plain)  # what waits in the kernel looks as if it had moved
        try:
            # The handshake comes when the other thread can see the socket, and cut it.
            secured = self._tls and self._tls().wrap_socket(
                plain, server_hostname=self.host, do_handshake_on_connect=False
            )
        except BaseException:
            plain.close()
            raise
        self.sock = secured or plain
        if self._is_cut:
            raise ConnectionAbortedError("the connection was cut")
        if isinstance(self.sock, ssl.SSLSocket):
            self.sock.do_handshake()
        self.sock.settimeout(self._silent_s)

    def answer(self, path: str, headers: dict[str, str], check: Callable[[], None]) -> http.client.HTTPResponse:
        """Request a path, once more if a kept connection has ended meanwhile; `check` raises an error to stop."""
        while True:
            check()
            fresh = self.sock is None
            try:
                self.request("GET", path, headers=headers)
                return self.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if fresh or not isinstance(error, (ConnectionError, ssl.SSLError)):
                    raise

    def cut(self) -> None:
        self._is_cut = True
        found = self.sock
        if found is not None:
            with suppress(OSError):  # it may not be connected any more
                # Not that of TLS, which isn't made for another thread.
                socket.socket.shutdown(found, socket.SHUT_RDWR)
