"""The console's process: it shows what the server has written to `status.db`, and adds orders to `console.db`.

It is started by `fedprune_server.web.process.ConsoleProcess`, holds no key of the fleet, opens no database of a job,
and ends with the server.
"""

from __future__ import annotations

import asyncio
import os
import ssl
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import anyio

from fedprune.core.errors import ConfigError, FedpruneError
from fedprune_server.process.child_side import end_with_parent, reply_stream
from fedprune_server.process.web_server import WebServer
from fedprune_server.web.app import make_app
from fedprune_server.web.auth.middleware import Exposure
from fedprune_server.web.context import Console, make_console
from fedprune_server.web.database import CONSOLE_FILE, ConsoleDatabase
from fedprune_server.web.events import send_changes
from fedprune_server.web.process import ConsoleStart
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.status_writer import STATUS_FILE

# Open connections. Anybody can open them before logging in, so that a further one replaces the one that has waited
# longest for its request, instead of being refused.
MAX_CONNECTIONS = 400

# Threads for requests that query databases: further requests wait for a thread, and the event loop never waits.
MAX_THREADS = 8

# How long a browser may take to send a request: also over a slow mobile link it is one packet.
REQUEST_TIMEOUT_S = 20.0

# How long a connection without a request stays open.
KEEP_ALIVE_S = 5.0

# How often orders are expired, and signs of life sent to the server, which waits 30 s for one.
SWEEP_INTERVAL_S = 5.0

_MAX_HEADER_BYTES = 32 * 1024


def run_console(settings: ConsoleStart, replies: BinaryIO) -> None:
    """Serve until the process ends, sending signs of life to `replies`."""
    folder = Path(settings.folder)
    exposure = Exposure(settings.certificate is not None, settings.proxied, settings.hosts)
    with ConsoleDatabase(folder / CONSOLE_FILE) as database:
        console = make_console(FleetView(folder / STATUS_FILE, settings.orders), database, exposure)
        server = WebServer(
            make_app(console),
            (settings.address, settings.port),
            "console",
            lambda: MAX_CONNECTIONS,
            first_s=REQUEST_TIMEOUT_S,
            next_s=KEEP_ALIVE_S,
            max_head=_MAX_HEADER_BYTES,
            tls=_tls_context(settings),
        )
        host = f"[{settings.address}]" if ":" in settings.address else settings.address
        url = f"http{'s' if exposure.has_tls else ''}://{host}:{server.port}/\n".encode()

        def send_sign_of_life() -> None:
            replies.write(url)
            replies.flush()

        threading.Thread(target=_end_with_server, daemon=True).start()
        asyncio.run(_serve_until_end(server, console, send_sign_of_life))


def _tls_context(settings: ConsoleStart) -> ssl.SSLContext | None:
    if settings.certificate is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(settings.certificate, settings.key)
    return context


async def _serve_until_end(server: WebServer, console: Console, send_sign_of_life: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()

    def sweep() -> None:
        loop.call_later(SWEEP_INTERVAL_S, sweep)
        send_sign_of_life()
        loop.run_in_executor(None, expire)

    def expire() -> None:
        with suppress(FedpruneError):  # the next sweep tries again
            console.orders.expire()

    anyio.to_thread.current_default_thread_limiter().total_tokens = MAX_THREADS
    watching = loop.create_task(send_changes(console.streams, console.view, console.audit))
    loop.call_soon(sweep)
    await server.serve()
    watching.cancel()


def _end_with_server() -> None:
    sys.stdin.buffer.read()  # until the server closes its end of the pipe
    os._exit(0)


def main() -> None:
    """Run until the parent asks for the end, or ends."""
    replies = reply_stream()
    try:
        settings = ConsoleStart.from_json(sys.stdin.buffer.readline())
    except ConfigError:
        sys.exit(2)
    end_with_parent(settings.parent)
    try:
        run_console(settings, replies)
    except BrokenPipeError:
        sys.exit(0)
    except FedpruneError as error:
        print(f"the console ends: {error}", file=sys.stderr)
        sys.exit(int(error.exit_code))
    except OSError as error:  # ssl.SSLError is one
        tls = "" if settings.certificate is None else f" with {settings.certificate} and {settings.key}"
        print(f"the console ends: {settings.address}:{settings.port}{tls}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
