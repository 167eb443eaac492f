"""The base of transfers over HTTPS: each runs in a thread of its own, and stops when it is told to or stalls.

`http_download` and `http_upload` are the two kinds. The agent's loop asks `is_over`, and goes on over MQTT then.
"""

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
from fedprune.wire.connection_failure import connection_failure
from fedprune.wire.link import send_promptly
from fedprune.wire.transfer import MIN_BYTES_PER_S
from fedprune.wire.urls import WebServer

SILENCE_TIMEOUT_S = 10.0  # how long connecting may take, and how long the server may send nothing

# How long a leaf or the beginning of an answer may take, and how far a transfer may fall behind `MIN_BYTES_PER_S`.
# A fast beginning is no credit, or a server could stall for hours after it.
STALL_TIMEOUT_S = 30.0


class HttpTransferError(Exception):
    """A web server doesn't do what it should."""


class HttpTransfer(ABC):
    """A transfer in a thread of its own. `failure` is why it ended early, in one line."""

    def __init__(
        self,
        server: WebServer,
        context: Callable[[], ssl.SSLContext],
        clock: Callable[[], float],
        silence_timeout_s: float | None = None,
    ) -> None:
        self.failure = ""
        self._clock = clock
        self._last_progress = clock()
        self._delay_s = 0.0
        self._ending = threading.Event()
        self._connection = HttpConnection(server, context, silence_timeout_s)
        self._thread = threading.Thread(target=self._run, name="fedprune-web", daemon=True)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._ending.is_set()

    @property
    def is_stalled(self) -> bool:
        """Whether nothing has moved for too long, or too little."""
        return self._delay_s + self._clock() - self._last_progress > STALL_TIMEOUT_S

    def is_over(self) -> bool:
        """Whether the transfer has ended, which is logged; a stalled one is stopped. MQTT then does what is missing."""
        if self.is_alive and self.is_stalled:
            min_rate = f"{MIN_BYTES_PER_S / 1024:g} KiB a second"
            self.stop(f"nothing more has moved for {STALL_TIMEOUT_S:g} s, or it is as far behind {min_rate}")
        if not self.is_alive:
            self._log_end()
        return not self.is_alive

    def stop(self, why: str = "") -> None:
        if self._thread.is_alive() and not self._ending.is_set():
            self.failure = why
        self._ending.set()
        self._connection.cut()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    @abstractmethod
    def _transfer(self) -> None:
        """Transfer everything, in the transfer's own thread."""

    @abstractmethod
    def _log_end(self) -> None:
        """Log how the transfer ended."""

    def _run(self) -> None:
        try:
            self._transfer()
        except (OSError, FedpruneError) as error:
            self._set_failure(connection_failure(error))
        except (HttpTransferError, http.client.HTTPException, ValueError) as error:
            self._set_failure(str(error) or type(error).__name__)
        except Exception as error:  # noqa: BLE001 - it is handed to the loop, and MQTT continues
            self._set_failure(f"unexpected error: {type(error).__name__}: {error}")
        finally:
            self._connection.close()

    def _set_failure(self, why: str) -> None:
        if not self._ending.is_set():  # after `stop` the failure is the stop's, not the error of the cut connection
            self.failure = one_line(why)  # the text may be the server's own

    def _note_progress(self, seconds: float) -> None:
        """Note progress for which `seconds` are granted; what it took beyond that adds to the delay."""
        now = self._clock()
        self._delay_s = max(0.0, self._delay_s + now - self._last_progress - seconds)
        self._last_progress = now

    @contextmanager
    def _pause_stall_clock(self) -> Iterator[None]:
        """Stop the stall clock while the board's own disk is busy: a slow card is no slow server."""
        self._last_progress = math.inf
        yield
        self._last_progress = self._clock()

    def _check_stop(self) -> None:
        if self._ending.is_set():
            raise HttpTransferError("it was told to stop")


class HttpConnection(http.client.HTTPConnection):
    """A kept-alive connection that another thread may cut at any moment."""

    def __init__(
        self, server: WebServer, context: Callable[[], ssl.SSLContext], silence_timeout_s: float | None = None
    ) -> None:
        super().__init__(server.host, server.port, timeout=SILENCE_TIMEOUT_S)
        self._silence_timeout_s = SILENCE_TIMEOUT_S if silence_timeout_s is None else silence_timeout_s
        self._tls = context if server.tls else None
        if server.tls:
            self.default_port = 443  # otherwise the header Host would name the port
        self._is_cut = False

    def connect(self) -> None:
        plain = socket.create_connection((self.host, self.port), self.timeout)
        send_promptly(plain)  # bytes that wait in the kernel's buffers would count as sent
        try:
            # The handshake is done later, once the other thread can see the socket and cut it.
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
        self.sock.settimeout(self._silence_timeout_s)

    def get(self, path: str, headers: dict[str, str], check: Callable[[], None]) -> http.client.HTTPResponse:
        """Request a path, once more if a kept connection has ended meanwhile; `check` raises an error to stop."""
        while True:
            check()
            is_new = self.sock is None
            try:
                self.request("GET", path, headers=headers)
                return self.getresponse()
            except (OSError, http.client.HTTPException) as error:
                self.close()
                if is_new or not isinstance(error, (ConnectionError, ssl.SSLError)):
                    raise

    def cut(self) -> None:
        self._is_cut = True
        open_socket = self.sock
        if open_socket is not None:
            with suppress(OSError):  # it may not be connected any more
                # The plain socket's method: an SSLSocket's own must not be called from another thread.
                socket.socket.shutdown(open_socket, socket.SHUT_RDWR)
