"""The web server bounds its clients' time, loses nothing that is on its way, and strangers can't fill its log."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from fedprune_server.process.web_server import WebServer

PIECE = bytes(1 << 20)
POST = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\n"
CHUNKED_GET = b"GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(await Request(scope, receive).body())(scope, receive, send)


async def send_much(scope: Scope, receive: Receive, send: Send) -> None:
    await Response(8 * PIECE)(scope, receive, send)


async def send_pieces(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    for _ in range(30):
        await send({"type": "http.response.body", "body": PIECE, "more_body": True})
    await send({"type": "http.response.body"})


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


def test_who_does_not_read_the_answer_is_cut_off() -> None:
    with connect(send_pieces, first_s=0.3, next_s=0.3) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(1.0)
        assert 0 < len(receive_all(client)) < 30 * len(PIECE)


@pytest.mark.parametrize(
    "parts",
    [
        (POST + b"ab",),  # and then it leaves
        (CHUNKED_GET + b"no chunk\r\n",),
        (CHUNKED_GET, b"no chunk\r\n"),
        (b"no request\r\n\r\n",),
    ],
)
@pytest.mark.parametrize("app", [echo, send_much, send_pieces])
def test_strangers_do_not_fill_the_log(
    app: ASGIApp, parts: tuple[bytes, ...], caplog: pytest.LogCaptureFixture
) -> None:
    answered = threading.Event()

    async def noting_app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await app(scope, receive, send)
        finally:
            answered.set()

    with caplog.at_level(logging.DEBUG), connect(noting_app, first_s=10.0, next_s=10.0) as client:
        client.sendall(parts[0])
        for part in parts[1:]:
            if app is not echo:
                assert client.recv(1)  # the answer has begun
            client.sendall(part)
        client.shutdown(socket.SHUT_WR)
        receive_all(client)
        assert b" HTTP/1.1" not in parts[0] or answered.wait(30)
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
