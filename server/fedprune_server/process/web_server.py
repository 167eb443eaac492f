"""A web server whose clients are bounded in number and time; uvicorn speaks HTTP.

Both are bounded at the sockets, because a client holds a file descriptor even before it has passed its handshake.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any

import h11
import uvicorn
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedprune.core.closeable import Closeable
from fedprune.core.errors import ConfigError

# Seconds between two checks for slow clients; a server that ends waits as long for them.
_POLL_S = 0.1

_BODYLESS_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class WebClient:
    """A client's connection, with the deadline of its next step, and the name in its certificate (None without
    certificates). Either it `awaits_request`, or a request is being answered; then it isn't closed for others."""

    def __init__(self, connection: socket.socket, seconds: float) -> None:
        self._connection = connection
        self.name: str | None = None
        self.expect(seconds, waits=True)

    @property
    def closed(self) -> bool:
        return self._connection.fileno() < 0

    def expect(self, seconds: float, *, waits: bool = False) -> None:
        self.awaits_request, self.deadline = waits, time.monotonic() + seconds

    def cut(self) -> None:
        """End the connection, from any thread."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


class _Listener(socket.socket):
    """Accepts a limited number of clients. Beyond that, the client that has been idle for longest is cut off."""

    def __init__(self, address: tuple[str, int], setting: str, max_clients: Callable[[], int], seconds: float) -> None:
        super().__init__(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, socket.SOCK_STREAM)
        self.clients: dict[int, WebClient] = {}  # by file descriptor
        self._max_clients, self._seconds = max_clients, seconds
        try:
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self.bind(address)
            self.listen(128)
        except (OSError, OverflowError) as error:
            self.close()
            why = error.strerror if isinstance(error, OSError) else str(error)
            text = f"can't listen on {address[0]}, port {address[1]} ({why})"
            raise ConfigError(text, path=("server", setting)) from error

    def accept(self) -> tuple[socket.socket, Any]:
        """Accept a client; beyond the limit, cut off the client that has been idle for longest."""
        connection, address = super().accept()
        self.clients = {number: client for number, client in self.clients.items() if not client.closed}
        if len(self.clients) >= self._max_clients():
            idle_clients = [(c.deadline, number) for number, c in self.clients.items() if c.awaits_request]
            if not idle_clients:
                connection.close()
                raise BlockingIOError("no connection is free")  # which asyncio's loop ignores: it goes on listening
            self.clients.pop(min(idle_clients)[1]).cut()
        self.clients[connection.fileno()] = WebClient(connection, self._seconds)
        return connection, address


class WebServer(Closeable):
    """A web server that listens at once, and answers from `start` or `serve` on.

    Args:
        app: The application; its requests have their `WebClient` as `scope["state"]["client"]`.
        address: The host and port to listen on; port 0 for a free one.
        setting: The setting of [server] that the error names if the address can't be listened on, a `ConfigError`.
        max_clients: Returns the maximum number of connections.
        first_s: Seconds in which the handshake and the first request must come. While a request with a body is
            awaited, its connection counts as idle.
        next_s: Seconds in which a further request must begin. It must come within `first_s` if that is longer, in
            which a piece of an answer must be received, too.
        max_head: Maximum bytes of a request's head.
        tls: For TLS; None to do without.
        client_name: Returns the name in a client's certificate, which is turned away if it is empty. None where clients
            have no certificates.
    """

    def __init__(
        self,
        app: ASGIApp,
        address: tuple[str, int],
        setting: str,
        max_clients: Callable[[], int],
        *,
        first_s: float,
        next_s: float,
        max_head: int = 8192,
        tls: ssl.SSLContext | None = None,
        client_name: Callable[[Any], str] | None = None,
    ) -> None:
        self._app, self._patience_s = app, max(first_s, next_s)
        self._listener = _Listener(address, setting, max_clients, first_s)
        self.port = int(self._listener.getsockname()[1])
        config = uvicorn.Config(
            self._answer,
            interface="asgi3",
            http=_protocol_class(self._listener, client_name),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level="error",  # strangers may send anything, and must not fill the log
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=int(next_s),
            timeout_graceful_shutdown=1,
            h11_max_incomplete_event_size=max_head,
        )
        config.load()
        config.ssl = tls
        self._server = uvicorn.Server(config)
        self._thread: threading.Thread | None = None

    def start(self, name: str) -> None:
        """Answer on a thread of this name, until `close`."""
        self._thread = threading.Thread(target=lambda: asyncio.run(self.serve()), name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer, and cut all connections."""
        self._server.should_exit = True
        if self._thread is not None:
            self._thread.join()

    async def serve(self) -> None:
        """Answer until `close`."""
        sweep_task = asyncio.create_task(self._cut_slow_clients())
        await self._server.serve(sockets=[self._listener])
        sweep_task.cancel()

    async def _cut_slow_clients(self) -> None:
        """Cut off clients that are too slow, and all of them at the end."""
        while True:
            now = inf if self._server.should_exit else time.monotonic()
            for client in self._listener.clients.values():
                if client.deadline <= now:
                    client.cut()
            await asyncio.sleep(_POLL_S)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; uvicorn calls this as its application."""
        client: WebClient = scope["state"]["client"]

        async def receive_and_note() -> Message:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                client.expect(inf)
            return message

        async def send_and_note(message: Message) -> None:
            deadline = client.deadline
            client.deadline = min(deadline, time.monotonic() + self._patience_s)
            await send(message)  # returns when the client has received most of what was sent before
            client.deadline = deadline

        if scope["method"] in _BODYLESS_METHODS:  # these have no body to wait for
            client.expect(inf)
        try:
            await self._app(scope, receive_and_note, send_and_note)
        except ClientDisconnect:
            pass  # anybody can leave in the middle of a request, and must not fill the log
        finally:
            # The end of the answer may still be on its way. uvicorn closes the connection after `next_s`, and sends
            # that end before.
            client.expect(self._patience_s, waits=True)


def _protocol_class(listener: _Listener, client_name: Callable[[Any], str] | None) -> type[H11Protocol]:
    """uvicorn's protocol for a listener, whose requests carry their client."""

    class Watched(H11Protocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            client = listener.clients.get(transport.get_extra_info("socket").fileno())
            tls = transport.get_extra_info("ssl_object")
            name = None if tls is None or client_name is None else client_name(tls)
            if client is None or name == "":
                transport.abort()
                return
            client.name = name
            self.app_state = {"client": client}

        def send_400_response(self, msg: str) -> None:
            if self.cycle is not None:
                self.cycle.disconnected = True  # its application must send nothing after this
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                super().send_400_response(msg)
            else:  # an answer has begun; uvicorn would log an error, for which it is too late for another
                self.transport.close()

    return Watched
