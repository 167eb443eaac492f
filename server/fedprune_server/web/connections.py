"""Limits the console's open connections: closes those without a request, the oldest first if there are too many."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

Peer = tuple[str, int]

_BODYLESS_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Connections:
    """Open connections by the browser's address and port.

    A connection waits until the application has its whole request, and again once that is answered. It may wait for
    `patience_s`. With more than `max_open` connections, the one that has waited longest is closed.
    """

    def __init__(self, max_open: int, patience_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_open = max_open
        self._patience_s = patience_s
        self._clock = clock
        self._transports: dict[Peer, asyncio.Transport] = {}
        self._waiting_since: OrderedDict[Peer, float] = OrderedDict()

    def on_open(self, peer: Peer, transport: asyncio.Transport) -> None:
        """Add a connection; if there are too many, close the one that has waited longest."""
        if len(self._transports) >= self._max_open and self._waiting_since:
            self._close(next(iter(self._waiting_since)))
        self._transports[peer] = transport
        self._waiting_since[peer] = self._clock()

    def on_close(self, peer: Peer, transport: asyncio.Transport) -> None:
        if self._transports.get(peer) is transport:
            del self._transports[peer]
            self._waiting_since.pop(peer, None)

    def sweep(self) -> None:
        """Close connections that have waited too long."""
        deadline = self._clock() - self._patience_s
        for peer in [p for p, since in self._waiting_since.items() if since < deadline]:
            self._close(peer)

    def protocol_class(self) -> type[H11Protocol]:
        """A protocol for uvicorn that reports here when connections open and close."""
        connections = self

        class ReportingProtocol(H11Protocol):
            def connection_made(self, transport: Any) -> None:
                connections.on_open(_peer(transport), transport)
                self._watched = transport
                super().connection_made(transport)

            def connection_lost(self, exc: Exception | None) -> None:
                connections.on_close(_peer(self._watched), self._watched)
                super().connection_lost(exc)

        return ReportingProtocol

    def wrap(self, app: ASGIApp) -> ASGIApp:
        """Wrap the application, to learn when a request is complete and when it is answered."""

        async def wrapped_app(scope: Scope, receive: Receive, send: Send) -> None:
            client = scope.get("client")
            if scope["type"] != "http" or client is None:
                await app(scope, receive, send)
                return
            peer = client[0], client[1]

            async def receive_and_note() -> Message:
                message = await receive()
                if message["type"] == "http.request" and not message.get("more_body", False):
                    self._waiting_since.pop(peer, None)
                return message

            if scope["method"] in _BODYLESS_METHODS:  # these have no body to wait for
                self._waiting_since.pop(peer, None)
            try:
                await app(scope, receive_and_note, send)
            finally:
                if peer in self._transports:  # it may send a further request (keep-alive), and waits until then
                    self._waiting_since[peer] = self._clock()
                    self._waiting_since.move_to_end(peer)

        return wrapped_app

    def _close(self, peer: Peer) -> None:
        del self._waiting_since[peer]
        self._transports.pop(peer).abort()


def _peer(transport: asyncio.BaseTransport) -> Peer:
    peer_name = transport.get_extra_info("peername") or ("", 0)
    return str(peer_name[0]), int(peer_name[1])
