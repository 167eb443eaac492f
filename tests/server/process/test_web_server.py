"""The web server bounds its clients' time, and loses nothing that is on its way."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedprune_server.process.web_server import WebServer

PIECE = bytes(1 << 20)
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(await Request(scope, receive).body())(scope, receive, send)


async def send_much(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(8 * PIECE)(scope, receive, send)


@contextmanager
def connect(app: ASGIApp, first_s: float, next_s: float) -> Iterator[socket.socket]:
    with WebServer(app, ("127.0.0.1", 0), "metrics", lambda: 4, first_s=first_s, next_s=next_s) as server:
        server.start("test")
        with closing(socket.create_connection(("127.0.0.1", server.port), 10)) as client:
            yield client


def receive_all(client: socket.socket, end: bytes = b"\0nothing") -> bytes:
    """What comes until this end, or the connection's."""
    data = b""
    with suppress(ConnectionResetError):
        while not data.endswith(end) and (part := client.recv(1 << 20)):
            data += part
    return data


def test_what_is_still_to_be_sent_outlasts_the_time_without_a_request() -> None:
    with connect(send_much, first_s=10.0, next_s=0.2) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(0.6)  # a slow link
        assert receive_all(client).endswith(b"\r\n\r\n" + 8 * PIECE)


def test_the_body_of_a_further_request_has_as_long_as_that_of_the_first() -> None:
    with connect(echo, first_s=10.0, next_s=1.0) as client:
        client.sendall(POST + b"abcd")
        assert receive_all(client, b"abcd").endswith(b"abcd")
        time.sleep(0.6)
        client.sendall(POST)
        time.sleep(0.6)
        client.sendall(b"efgh")
        assert receive_all(client, b"efgh").endswith(b"efgh")
