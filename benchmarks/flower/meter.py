"""Counts the bytes of TCP connections: a proxy that passes everything on and adds up."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_READ = 1 << 18


class Meter:
    """Listens on a free port of this machine and passes all connections on to another.

    Args:
        target: The port to which they are passed on.

    Attributes:
        port: Where it listens.
        up: Bytes towards the target so far.
        down: Bytes from it.
        connections: How many connections there have been.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self.port = self.up = self.down = self.connections = 0

    @property
    def total(self) -> int:
        """Bytes both ways."""
        return self.up + self.down

    async def serve(self, ready: threading.Event, done: asyncio.Event) -> None:
        """Pass on until told to stop."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await done.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            target_reader, target_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()  # as a port at which nobody listens
            return
        ways = [
            asyncio.create_task(self._pass("up", reader, target_writer)),
            asyncio.create_task(self._pass("down", target_reader, writer)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            return  # the meter ends
        finally:
            for way in ways:
                way.cancel()
            for each in (writer, target_writer):
                each.close()

    async def _pass(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(_READ):
                setattr(self, way, getattr(self, way) + len(data))
                writer.write(data)
                await writer.drain()
        except OSError:
            return  # one end has broken off, and so will the other


@contextmanager
def meter(target: int) -> Iterator[Meter]:
    """A meter in a thread of its own."""
    made, ready, held = Meter(target), threading.Event(), list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]()

    async def serve() -> None:
        done = asyncio.Event()
        held.append((asyncio.get_running_loop(), done))
        await made.serve(ready, done)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), name="meter", daemon=True)
    thread.start()
    ready.wait()
    try:
        yield made
    finally:
        loop, done = held[0]
        loop.call_soon_threadsafe(done.set)
        thread.join(10.0)
