"""The local interface's server: the standard library's, with bounds on size, time and number of connections.

A connection is for one request. A client that sends too slowly is cut off after a while; if all connections are taken,
a new client replaces it at once, unless the new client's user already has as many connections. A request that is being
answered is never cut off.
"""

from __future__ import annotations

import logging
import re
import socket
import socketserver
import struct
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

from fedprune import __version__
from fedprune.core.errors import FedpruneError, value_text
from fedprune_device.api.address import LocalAddress
from fedprune_device.api.endpoints import Endpoints
from fedprune_device.api.request import LocalAnswer, Request, RequestError

_LOG = logging.getLogger("fedprune.device")

# Clients at a time; each has a thread and at most one body, so that all together take at most 64 MiB of bodies.
MAX_CLIENTS = 8

MAX_BODY_BYTES = 8 * 2**20
REQUEST_TIMEOUT_S = 20.0  # how long a request may take to arrive
SOCKET_TIMEOUT_S = 10.0  # how long a client may be silent, or read nothing of its answer
_PEER_CREDENTIALS = struct.Struct("3i")  # struct ucred (unix(7)): process, user, group
_CLOSE_TIMEOUT_S = 5.0  # how long requests that are being answered get when the board ends
_LINGER_S = 1.0  # how long unread input is drained after an early answer


@dataclass
class _Client:
    user: int  # the peer, from the kernel; all peers of a port count as one
    sending_since: float | None  # when it connected; None once its request has arrived completely


class LocalServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Listens from construction until `close`, for at most `connections` clients at a time."""

    daemon_threads = True
    block_on_close = False  # a client that hangs must not keep the board from ending

    def __init__(self, address: LocalAddress, endpoints: Endpoints, connections: int = MAX_CLIENTS) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = self._bound = address.bind()
        self.endpoints = endpoints
        self._address, self._max_clients = address, connections
        self._lock = threading.Lock()
        self._clients: dict[Any, _Client] = {}
        self._thread = threading.Thread(target=self.serve_forever, name="fedprune-local", daemon=True)
        self._thread.start()
        _LOG.info("the local interface listens on %s", address.path or f"{address.host}:{self.port}")

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def port(self) -> int:
        """The port; 0 for a unix socket."""
        return 0 if self._address.path is not None else int(self.socket.getsockname()[1])

    def close(self) -> None:
        """Stop listening and close all connections; requests that are being answered get a few seconds."""
        self.shutdown()
        self._thread.join()
        self._address.release(self._bound)
        self._cut_off(float("inf"))
        deadline = time.monotonic() + _CLOSE_TIMEOUT_S
        while self._clients and time.monotonic() < deadline:
            time.sleep(0.01)

    def on_request_read(self, client: Any) -> None:
        """Note that a client's request has arrived completely; from now on it isn't cut off."""
        with self._lock:
            if client in self._clients:
                self._clients[client].sending_since = None

    # What the standard library calls

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            _LOG.warning("the local interface: %s", error)
            time.sleep(0.1)  # too many open files, for example, which would come again at once
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        user = _peer_user(request)
        with self._lock:
            if len(self._clients) >= self._max_clients:
                self._make_room(user)
            if admitted := len(self._clients) < self._max_clients:
                self._clients[request] = _Client(user, time.monotonic())
        if admitted:
            super().process_request(request, client_address)
            return
        expected = f"at most {self._max_clients}"
        error = RequestError(503, "too many requests at a time", expected=expected, hint="Try again.")
        body = LocalAnswer.from_error(error).to_bytes()
        head = f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        with suppress(OSError):
            request.setblocking(False)
            request.send(f"{head}Retry-After: 1\r\nConnection: close\r\n\r\n".encode() + body)
        self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self) -> None:
        """Twice a second: cut off those who send too slowly."""
        self._cut_off(time.monotonic() - REQUEST_TIMEOUT_S)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """One client must not end the service of others."""
        _LOG.debug("a connection of the local interface failed", exc_info=True)

    def _make_room(self, user: int) -> None:
        """Cut off the oldest unfinished request of the user with the most connections.

        Only requests of `user`, and of users with more connections than `user`, are cut off.
        """
        connections_of = Counter(c.user for c in self._clients.values())
        sending = [c for c, state in self._clients.items() if state.sending_since is not None]  # the longest first
        candidates = [
            c
            for c in sending
            if (owner := self._clients[c].user) == user or connections_of[owner] > connections_of[user]
        ]
        if candidates:
            victim = max(candidates, key=lambda c: connections_of[self._clients[c].user])
            _shut_down(victim)
            del self._clients[victim]

    def _cut_off(self, before: float) -> None:
        with self._lock:
            for client, state in self._clients.items():
                if state.sending_since is not None and state.sending_since < before:
                    _shut_down(client)


class _Handler(BaseHTTPRequestHandler):
    server: LocalServer
    protocol_version = "HTTP/1.1"
    timeout = SOCKET_TIMEOUT_S

    def handle(self) -> None:
        self.close_connection = True
        self.handle_one_request()

    def do_GET(self) -> None:
        body_read = False
        try:
            body = self._body()
            body_read = True
            self.server.on_request_read(self.connection)
            answer = self.server.endpoints.answer(self._request(body))
        except FedpruneError as error:
            answer = LocalAnswer.from_error(error)
        except MemoryError:
            answer = LocalAnswer.from_error(RequestError(503, "not enough memory for the request"))
        except OSError:
            raise  # the client has disconnected
        except Exception:  # noqa: BLE001 - a client sees no traceback
            _LOG.exception("unexpected error while a request was answered")
            answer = LocalAnswer.from_error(RequestError(500, "an unexpected error", hint="The board's log has it."))
        self._send_answer(answer)
        if not body_read:
            self._linger()

    do_POST = do_DELETE = do_GET  # noqa: N815 - the library's names

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Report requests that the library can't parse in the same form as all other errors."""
        status = 405 if code == 501 else int(code)
        self._send_answer(LocalAnswer.from_error(RequestError(status, "the request can't be read", got=message)))
        self._linger()

    def version_string(self) -> str:
        return f"fedprune/{__version__}"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
        """Requests aren't logged."""

    def _body(self) -> bytes:
        lengths = self.headers.get_all("Content-Length", [])
        if "Transfer-Encoding" in self.headers:
            raise RequestError(411, "the body's length", expected="the header Content-Length", got="chunks")
        if not lengths and self.command != "POST":
            return b""
        if len(lengths) != 1 or not re.fullmatch(r"[0-9]{1,15}", lengths[0]):
            got = value_text(lengths[0]) if len(lengths) == 1 else f"{len(lengths)} of them"
            raise RequestError(411, "the header Content-Length", expected="a whole number, once", got=got)
        size = int(lengths[0])
        if size > MAX_BODY_BYTES:
            hint = "Send fewer samples at a time."
            raise RequestError(413, "size of the body", expected=f"at most {MAX_BODY_BYTES} bytes", got=size, hint=hint)
        body = self.rfile.read(size)
        if len(body) < size:
            raise ConnectionAbortedError("a client ended in the middle of a body")
        return body

    def _request(self, body: bytes) -> Request:
        try:
            url = urlsplit(self.path)
            query = dict(parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query), errors="strict"))
            path = unquote(url.path, errors="strict")
        except ValueError as error:
            raise RequestError(400, "the address of the request", got=value_text(self.path)) from error
        return Request(self.command, path, query, {k.lower(): v for k, v in self.headers.items()}, body)

    def _send_answer(self, answer: LocalAnswer) -> None:
        body = answer.to_bytes()
        self.request_version = self.protocol_version  # otherwise the library omits the status line and headers
        self.send_response(answer.status)
        headers = {"Content-Type": answer.kind, "Content-Length": str(len(body)), "Cache-Control": "no-store"}
        for name, value in {**headers, **answer.headers, "Connection": "close"}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def _linger(self) -> None:
        """Drain unread input: closing a connection with unread data resets it, and the client loses the answer."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(_LINGER_S)
            while self.connection.recv(2**16):
                pass


def _peer_user(client: Any) -> int:
    """The user at the other end of a unix socket (SO_PEERCRED, unix(7)); -1 for TCP clients."""
    with suppress(OSError):
        if client.family == socket.AF_UNIX:
            raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
            _, user, _ = _PEER_CREDENTIALS.unpack(raw)
            return int(user)
    return -1


def _shut_down(client: Any) -> None:
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)  # wakes its thread, which closes it
