"""What lies between boards and broker: a proxy that delays, loses, repeats, swaps and cuts.

A lost packet is not seen above TCP; what is seen is that everything behind it waits until it has been sent again. So
loss is modelled as time: the pieces of 1,448 bytes of an MQTT packet are each sent until they arrive, all of them at
once in every round trip, and the packet is there when its last piece is, but never before the one before it.
Repeated and swapped are whole PUBLISH packets, which TCP never does, but brokers and bridges may.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.swarm.mqtt import packets
from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core.errors import ProtocolError
from fedprune.core.rng import keyed_generator
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobRequest, parse_message

_CONNECT, _PUBLISH = 1, 3
_DUPLICATE = 0x08
_SEGMENT = 1448
_READ = 65_536
_WAITING = 64
"""Packets of a direction that are on their way; more wait in the sender's socket."""


Key = tuple[str, str, str]
"""A board, `down` to it or `up` from it, and a blob."""


@dataclass(frozen=True)
class Weather:
    """How bad it is; everything 0 is calm.

    Attributes:
        round_trip_s: Seconds from a packet's sending to its acknowledgement.
        loss: Share of segments that get lost.
        bytes_s: What a link carries in a second, each way; 0 for no limit.
        repeats: Share of PUBLISH packets that come twice.
        swaps: Share of them that change places with the next.
        lifetime_s: Mean time after which a connection is reset; 0 for never.
        cut_every_s: Seconds between the beginnings of two partitions; 0 for none.
        cut_s: How long one lasts: nothing passes, and no connection is told.
        cut_share: Share of the boards behind it.
    """

    round_trip_s: float = 0.0
    loss: float = 0.0
    bytes_s: float = 0.0
    repeats: float = 0.0
    swaps: float = 0.0
    lifetime_s: float = 0.0
    cut_every_s: float = 0.0
    cut_s: float = 0.0
    cut_share: float = 0.0


@dataclass
class Tally:
    """What passed, but for what the proxy itself repeated.

    Attributes:
        asked: How often each leaf of each blob was asked for, by (board, way of the answer, blob).
        sent: Bytes of blobs that were sent towards a board or from it, by the same key.
        arrived: Those that arrived, also as answers to askings that the proxy repeated.
        doubled: Those that arrived because the proxy repeated them.
        leaves: The leaves that arrived, with their lengths, by the same key.
        events: How often what was done.
    """

    asked: dict[Key, Counter[int]] = field(default_factory=dict)
    sent: Counter[Key] = field(default_factory=Counter)
    arrived: Counter[Key] = field(default_factory=Counter)
    doubled: Counter[Key] = field(default_factory=Counter)
    leaves: dict[Key, dict[int, int]] = field(default_factory=dict)
    events: Counter[str] = field(default_factory=Counter)

    def table(self) -> dict[str, list[float]]:
        """By way and what was counted, bytes per byte of what arrived at least once: of all blobs, and of the worst."""
        counts: dict[str, Counter[Key]] = {
            "asked for": Counter({k: self._asked_bytes(k) for k in self.leaves}),
            "sent": self.sent,
            "arrived": self.arrived,
            "arrived, with repetitions": self.arrived + self.doubled,
        }
        return {f"{way} {what}": list(self._ratios(c, way)) for way in ("down", "up") for what, c in counts.items()}

    def _asked_bytes(self, key: Key) -> int:
        lengths = self.leaves[key]
        return sum(times * lengths.get(leaf, 0) for leaf, times in self.asked.get(key, {}).items())

    def _ratios(self, counted: Counter[Key], way: str) -> tuple[float, float]:
        keys = [k for k in self.leaves if k[1] == way]
        once = {k: sum(self.leaves[k].values()) for k in keys}
        total = sum(once.values())
        each = [counted[k] / once[k] for k in keys]
        return (sum(counted[k] for k in keys) / total if total else 1.0), max(each, default=1.0)


@dataclass
class _Packet:
    raw: bytes
    due: float
    chunk: tuple[str, int, int] | None = None  # blob, first leaf and length of a chunk's data
    copy: bool = False


@dataclass
class _Line:
    """A connection: what both of its ways know of it."""

    chance: np.random.Generator
    board: str = ""


class Way:
    """One direction of one connection: `down` to the board or `up` from it."""

    def __init__(self, proxy: Proxy, name: str, line: _Line) -> None:
        self._proxy, self.name, self._line = proxy, name, line
        self._queue: deque[_Packet] = deque()
        self._changed = asyncio.Event()
        self._due = self._free = 0.0

    async def take(self, reader: asyncio.StreamReader) -> None:
        """Take packets in until the sender ends."""
        rest = b""
        while data := await reader.read(_READ):
            data, at = rest + data, 0
            for _, end in packets(data):
                self._put(data[at:end])
                at = end
            rest = data[at:]
            while len(self._queue) > _WAITING:
                await asyncio.sleep(0.05)

    async def give(self, writer: asyncio.StreamWriter) -> None:
        """Give packets out when it is time, until the receiver ends."""
        while True:
            while not self._queue:
                self._changed.clear()
                await self._changed.wait()
            packet = self._queue[0]
            wait = max(packet.due, self._proxy.open_at(self._line.board)) - time.monotonic()
            if wait > 0:
                await asyncio.sleep(min(wait, 1.0))
                continue
            self._queue.popleft()
            writer.write(packet.raw)
            await writer.drain()
            self._count(packet)

    def _put(self, raw: bytes) -> None:
        kind = raw[0] >> 4
        if kind == _CONNECT and self.name == "up":
            self._line.board = _client_id(raw)
            self._proxy.tally.events["connections"] += 1
        weather, chance, now = self._proxy.weather, self._line.chance, time.monotonic()
        segments = -(-len(raw) // _SEGMENT)
        tries = int(chance.geometric(1 - weather.loss, segments).max()) if weather.loss else 1
        self._proxy.tally.events["lost"] += tries - 1
        self._free = max(self._free, now) + (len(raw) / weather.bytes_s if weather.bytes_s else 0.0)
        self._due = max(self._due, self._free + weather.round_trip_s * (tries - 0.5))
        packet = _Packet(raw, self._due)
        self._queue.append(packet)
        if kind == _PUBLISH:
            chunk = packet.chunk = _chunk(raw)
            if packet.chunk is not None:
                self._proxy.tally.sent[self._line.board, self.name, packet.chunk[0]] += packet.chunk[2]
            elif (want := _want(raw)) is not None:
                key = self._line.board, "down" if self.name == "up" else "up", want.sha256
                asked = self._proxy.tally.asked.setdefault(key, Counter())
                asked.update(range(want.first, want.first + want.count))
            before = self._queue[-2] if len(self._queue) > 1 else None
            if before is not None and before.raw[0] >> 4 == _PUBLISH and chance.random() < weather.swaps:
                before.due, packet.due = packet.due, before.due
                self._queue[-2], self._queue[-1] = packet, before
                self._proxy.tally.events["swapped"] += 1
            if chance.random() < weather.repeats:
                again = bytes((raw[0] | (_DUPLICATE if raw[0] & 6 else 0),)) + raw[1:]
                self._queue.append(_Packet(again, self._due, chunk, copy=True))
                self._proxy.tally.events["repeated"] += 1
        self._changed.set()

    def _count(self, packet: _Packet) -> None:
        if packet.chunk is None:
            return
        sha256, first, length = packet.chunk
        key = self._line.board, self.name, sha256
        if packet.copy:
            self._proxy.tally.doubled[key] += length
            return
        self._proxy.tally.arrived[key] += length
        leaves = self._proxy.tally.leaves.setdefault(key, {})
        for at in range(0, length, LEAF_BYTES):
            leaves[first + at // LEAF_BYTES] = min(LEAF_BYTES, length - at)


class Proxy:
    """Listens for boards and passes what they say on to a broker's port on this machine; a seed keys all chance."""

    def __init__(self, weather: Weather, broker: int, seed: int = 0) -> None:
        self.weather, self._broker, self._seed = weather, broker, seed
        self.tally = Tally()
        self.port = 0
        self._count = 0
        self._began = time.monotonic()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen on a free port."""

        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.ensure_future(self._connected(reader, writer))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

        self._server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Listen no more, and end all connections."""
        if self._server is not None:
            self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def open_at(self, board: str) -> float:
        """When something passes to or from a board: now, or at the end of the partition that it is behind."""
        weather, now = self.weather, time.monotonic()
        if not weather.cut_every_s:
            return now
        number, into = divmod(now - self._began, weather.cut_every_s)
        begin = weather.cut_every_s - weather.cut_s  # at the end of each period, so that it begins calmly
        behind = keyed_generator(self._seed, "cut", int(number), board).random() < weather.cut_share
        return now - into + weather.cut_every_s if behind and into >= begin else now

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._count += 1
        line = _Line(keyed_generator(self._seed, "connection", self._count))
        down, up = Way(self, "down", line), Way(self, "up", line)
        try:
            broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", self._broker)
        except OSError:
            writer.close()
            return
        work = [up.take(reader), up.give(broker_writer), down.take(broker_reader), down.give(writer)]
        if self.weather.lifetime_s:
            work.append(self._reset(line.chance.exponential(self.weather.lifetime_s)))
        try:
            await _first(work)
        finally:
            for each in (writer, broker_writer):
                each.transport.abort()

    async def _reset(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.tally.events["reset"] += 1


async def _first(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Wait until one of them ends, and end the others."""
    tasks = [asyncio.create_task(w) for w in work]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)  # a connection that breaks is what is to be expected here


def _client_id(raw: bytes) -> str:
    body = next(packets(raw))[0]
    at = body + 10  # protocol name, level, flags and keepalive of MQTT 3.1.1
    return raw[at + 2 : at + 2 + int.from_bytes(raw[at : at + 2], "big")].decode()


def _published(raw: bytes) -> tuple[bytes, bytes]:
    """Topic and payload of a PUBLISH packet."""
    body = next(packets(raw))[0]
    end = body + 2 + int.from_bytes(raw[body : body + 2], "big")
    return raw[body + 2 : end], raw[end + (2 if raw[0] & 6 else 0) :]


def _want(raw: bytes) -> BlobRequest | None:
    """What leaves a PUBLISH packet asks for, if it does."""
    if b'"type":"want"' not in raw:
        return None
    message = parse_message(_published(raw)[1])
    return message if isinstance(message, BlobRequest) and message.part == "data" else None


def _chunk(raw: bytes) -> tuple[str, int, int] | None:
    """Blob, first leaf and length of the data that a PUBLISH packet carries, if it does."""
    topic, payload = _published(raw)
    if not topic.endswith(b"/blob"):
        return None
    try:
        chunk = Chunk.parse(payload)
    except ProtocolError:
        return None
    return (chunk.sha256, chunk.first, len(chunk.payload)) if chunk.part == "data" else None
