"""The console's process: it shows browsers what the server tells it on standard input, and passes orders on.

It is started by `fedprune_server.web.process.ConsoleProcess`, holds no key of the fleet, opens no database of a
job, and ends with the server.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import uvicorn
from starlette.types import ASGIApp

from fedprune.core.errors import FedpruneError, ProtocolError
from fedprune_server.process.children import begin_helper, replies_to_parent
from fedprune_server.web.app import make_app
from fedprune_server.web.auth.middleware import Surroundings
from fedprune_server.web.connections import Connections
from fedprune_server.web.context import Console, make_console
from fedprune_server.web.database import ConsoleDatabase
from fedprune_server.web.state.model import Model
from fedprune_server.web.state.publisher_messages import Begin, Listening, ToServer, line, read_news

CONNECTIONS = 400
"""Open connections; a further one takes the place of the one that has waited longest for its request."""

_SPARE = 100
"""Requests under way and connections about to close, beyond which the console answers that it is busy."""

PATIENCE_S = 20.0
"""So long a browser may take to say what it wants."""

EXPIRE_S = 5.0
"""So often it looks for orders that the server hasn't taken in time, and for connections that ask nothing."""

_HEADER_BYTES = 32 * 1024


def listening_socket(address: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OSError: It can't.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((address, port))
        made.listen(128)
    except BaseException:
        made.close()
        raise
    return made


def serve(begin: Begin, stream: BinaryIO, replies: BinaryIO) -> None:
    """Serve until the server is gone.

    Args:
        begin: What this console is.
        stream: What the server says.
        replies: What it is told.

    Raises:
        FedpruneError: The database can't be used.
        OSError: It can't listen, or the certificate can't be read.
    """
    lock = threading.Lock()

    def say(word: ToServer) -> None:
        with lock:
            replies.write(line(word))
            replies.flush()

    model = Model(begin.orders)
    around = Surroundings(begin.certificate is not None, begin.proxied, begin.hosts)
    with ConsoleDatabase(Path(begin.database)) as database:
        console = make_console(model, database, say, around)
        app = make_app(console)
        listening = listening_socket(begin.address, begin.port)
        host = f"[{begin.address}]" if ":" in begin.address else begin.address
        url = f"http{'s' if around.tls else ''}://{host}:{listening.getsockname()[1]}/"
        connections = Connections(CONNECTIONS, PATIENCE_S)
        server = _server(begin, connections.watch(app), connections)
        asyncio.run(_serve(server, connections, listening, console, stream, lambda: say(Listening(url))))


def _server(begin: Begin, app: ASGIApp, connections: Connections) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        http=connections.protocol(),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # the gate looks at what a proxy says, and only where there is one
        limit_concurrency=2 * CONNECTIONS + _SPARE,  # it counts connections and requests
        timeout_keep_alive=5,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=_HEADER_BYTES,
        ssl_certfile=begin.certificate,
        ssl_keyfile=begin.key,
    )
    config.load()
    return uvicorn.Server(config)


async def _serve(
    server: uvicorn.Server,
    connections: Connections,
    listening: socket.socket,
    console: Console,
    stream: BinaryIO,
    ready: Callable[[], None],
) -> None:
    loop = asyncio.get_running_loop()

    def listen() -> None:
        """Take in what the server says; the end of that is the end of this process."""
        code = 0
        try:
            while (word := read_news(stream)) is not None:
                loop.call_soon_threadsafe(console.model.hear, word)
        except ProtocolError as error:
            print(f"the console ends: the server says what makes no sense: {error}", file=sys.stderr, flush=True)
            code = int(error.exit_code)
        finally:
            os._exit(code)

    def expire() -> None:
        loop.call_later(EXPIRE_S, expire)
        connections.sweep()
        console.orders.expire()

    threading.Thread(target=listen, daemon=True).start()
    loop.call_later(EXPIRE_S, expire)
    ready()
    await server.serve(sockets=[listening])


def main() -> None:
    """Run until the parent asks for the end, or ends."""
    replies = replies_to_parent()
    try:
        begin = read_news(sys.stdin.buffer)
    except ProtocolError:
        begin = None
    if not isinstance(begin, Begin):
        sys.exit(2)
    begin_helper(begin.parent)
    try:
        serve(begin, sys.stdin.buffer, replies)
    except BrokenPipeError:
        sys.exit(0)
    except FedpruneError as error:
        print(f"the console ends: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except OSError as error:  # ssl.SSLError is one
        tls = "" if begin.certificate is None else f" with {begin.certificate} and {begin.key}"
        print(f"the console ends: {begin.address}:{begin.port}{tls}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
