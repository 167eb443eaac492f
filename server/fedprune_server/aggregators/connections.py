"""The connections of aggregators below a server: those that are connected, their reports, and their blobs."""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from http import HTTPStatus
from typing import Any, cast

from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as listen

from fedprune import __version__
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.closing import Closing
from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.security.authority import SERVER
from fedprune.security.tls import peer_name
from fedprune.wire.messages import Birth, parse
from fedprune.wire.topics import check_name
from fedprune_server.aggregators.channel import (
    MAX_TEXT,
    PING_TIMEOUT_S,
    QUIET,
    BlobWanted,
    Channel,
    Message,
    ParentLostError,
    UnansweredError,
    drained,
)
from fedprune_server.aggregators.messages import first, joined, read_event, steered_body

log = logging.getLogger("fedprune.server")

_FLUSH_S = 5.0
"""Time limit for sending the last messages."""

CONNECTIONS = 256
"""Most connections at a time, including those without a first message."""

TOGETHER = 200
"""Most items that are collected at a time: one transaction of a whole region's boards would take seconds and a hundred
megabytes."""

_LOOK_S = 1.0

_TRIES = 10
"""Times that an aggregator that can't tell whether it has a blob is asked in a row."""

_BACK_S = 60.0
"""Time for an aggregator to connect to a server that was away, too: twice its longest pause."""

_OFFERS = 16
"""Latest different offers that are compared with the next ones."""

_SEARCHES = 16
"""Threads that look for a blob of one aggregator at the others."""


@dataclass(frozen=True, eq=False)
class Region:
    """A connection of an aggregator.

    Attributes:
        instance: Distinguishes aggregators of the same name.
        process: Distinguishes processes that run the same aggregator, with its state folder or a copy.
    """

    name: str
    channel: Channel
    instance: str = ""
    process: str = ""


@dataclass(frozen=True)
class RegionUp:
    """An aggregator is connected."""

    region: Region


@dataclass(frozen=True)
class RegionDown:
    """An aggregator's connection has ended."""

    region: Region


@dataclass(frozen=True)
class BornBelow:
    """A board is connected through an aggregator; `path` names that aggregator and those between."""

    path: str
    birth: Birth


@dataclass(frozen=True)
class DiedBelow:
    """A board's connection to an aggregator has ended."""

    region: str
    device: str
    session: int


@dataclass(frozen=True)
class EventBelow:
    """An event of a job, such as a board's stored update."""

    region: str
    job: str
    event: on.Event


@dataclass(frozen=True)
class TrafficBelow:
    """Payload bytes went to and from boards."""

    job: str
    devices: Mapping[str, tuple[int, int]]


Item = RegionUp | RegionDown | BornBelow | DiedBelow | EventBelow | TrafficBelow


class RegionConnections(Closing):
    """Listens for aggregators.

    Args:
        host: An address of this machine.
        port: 0 for a free one.
        context: Gives TLS for a connection, which asks for a certificate; None to do without.
        landing: Where blobs of aggregators arrive; it also has the jobs' models.
        patience_s: Seconds to wait for an aggregator that is away.

    Raises:
        ConfigError: The address can't be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext] | None,
        landing: BlobStore,
        patience_s: float = 3600.0,
    ) -> None:
        self._patience_s = patience_s
        self._context, self._landing = context, landing
        self._wake: Callable[[], None] = lambda: None
        self._stores: Mapping[str, BlobStore] = {}
        self._above: Callable[[str, str], bytes | None] = lambda job, sha256: None
        self._items: queue.SimpleQueue[tuple[Region, Item]] = queue.SimpleQueue()
        self.waiting = False
        """Whether items wait to be collected."""
        self._changed = threading.Condition()
        self._regions: dict[str, Region] = {}
        self._asked: dict[tuple[str, int], tuple[str, do.Measure, Future[Any]]] = {}
        self._offers: deque[dict[str, Any]] = deque(maxlen=_OFFERS)
        self._away: dict[str, float] = {}
        self._given_up: set[str] = set()
        self._expected: set[str] = set()
        self._connections = 0
        self._channels = set[Channel]()
        self._closed = False
        self._searches = ThreadPoolExecutor(_SEARCHES, "fedprune-blobs")
        try:
            self._server = listen(
                self._handle,
                host,
                port,
                ssl=None if context is None else _Latest(context),  # type: ignore[arg-type]
                process_request=self._admit,
                max_size=MAX_TEXT,
                compression=None,
                ping_timeout=PING_TIMEOUT_S,
                logger=QUIET,
            )
            self._serve, self._server.handler = self._server.handler, self._limited
        except OSError as error:
            raise ConfigError(f"server: aggregators: can't listen on {host}, port {port} ({error.strerror})") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="fedprune-regions", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return int(self._server.socket.getsockname()[1])

    @property
    def names(self) -> list[str]:
        """The aggregators that are connected."""
        return sorted(self._regions)

    def serve(
        self,
        stores: Mapping[str, BlobStore],
        wake: Callable[[], None],
        above: Callable[[str, str], bytes | None] | None = None,
    ) -> None:
        """Accept aggregators for the jobs of these stores, whose blobs they can fetch.

        Args:
            wake: Called when items wait to be collected.
            above: Gives a blob of this server's own parent.
        """
        self._above = above or self._above
        with self._changed:
            self._stores, self._wake = stores, wake
            self._changed.notify_all()

    def collect(self) -> Iterator[Item]:
        """Items that have come first, `TOGETHER` at most, without those of a connection that was refused or replaced:
        they may be outdated, and are repeated."""
        self.waiting = False  # before they are taken, so that one that comes now wakes the loop again
        found = drained(self._items, TOGETHER)
        if len(found) == TOGETHER:
            self.waiting = True
        # Each is judged when its turn comes: the caller may accept a connection before the next.
        return (i for r, i in found if isinstance(i, RegionUp | RegionDown) or self._regions.get(r.name) is r)

    # For the server's loop.

    def up(self, region: Region, greeting: Iterable[Message]) -> bool:
        """An aggregator is connected: send it these messages before all others. An earlier connection of it is
        closed, and another process of it told to end. Returns False if another aggregator has its name, and is
        connected."""
        earlier = self._regions.get(region.name)
        if earlier is not None and not earlier.channel.closed and earlier.instance != region.instance:
            reason = f"another aggregator is connected as {region.name}"
            log.warning("an aggregator is refused: %s", reason)
            self._dismiss(region, "refused", f"{reason}, and each has a name of its own (--region)")
            return False
        if earlier is not None and earlier.process != region.process and not earlier.channel.closed:
            reason = f"another process with its state folder, or a copy of it, is connected as {region.name}"
            log.warning("an aggregator is replaced: %s", reason)
            self._dismiss(earlier, "replaced", reason)
        elif earlier is not None:
            earlier.channel.close()
        for message in greeting:
            region.channel.send(message)
        with self._changed:
            self._regions[region.name] = region
            self._away.pop(region.name, None)
            self._given_up.discard(region.name)
            self._expected.discard(region.name)
            self._changed.notify_all()
        return True

    def down(self, region: Region) -> bool:
        """A connection has ended; returns whether it was the aggregator's latest."""
        if self._regions.get(region.name) is not region:
            return False
        with self._changed:
            del self._regions[region.name]
            self._away[region.name] = time.monotonic()
        return True

    def given_up(self) -> list[str]:
        """Aggregators that are no longer waited for; each once, until it is back."""
        found = [name for name in self.absent() if name not in self._given_up and self.gone(name)]
        self._given_up |= set(found)
        return found

    def connected(self) -> dict[str, bool]:
        """Aggregators that are connected, or away; from any thread."""
        with self._changed:
            return dict.fromkeys(self._away, False) | dict.fromkeys(self._regions, True)

    def absent(self) -> dict[str, float]:
        """Aggregators that are away, with the seconds since then; from any thread."""
        with self._changed:
            now = time.monotonic()
            return {name: now - since for name, since in self._away.items()}

    def expect(self, regions: Collection[str]) -> None:
        """Begin to wait for aggregators that have rows in a job's state and aren't connected."""
        with self._changed:
            new = set(regions) - self._regions.keys() - self._away.keys()
            self._away |= dict.fromkeys(new, time.monotonic())
            self._expected |= new

    def waited(self, seconds: float) -> None:
        """Add the seconds for which this server was away to the wait for aggregators that haven't come back since: its
        parent has waited as long. They keep the time to connect again."""
        now = time.monotonic()
        latest = now - max(0.0, self._patience_s - _BACK_S)
        for name in self._expected:
            self._away[name] = min(self._away[name], max(now - seconds, latest))

    def gone(self, path: str) -> bool:
        """Whether the aggregator of a region is away, and was waited for long enough; from any thread."""
        since = self._away.get(first(path))
        return since is not None and time.monotonic() - since > self._patience_s

    def order(self, path: str, job: str, command: do.Command) -> None:
        """Send one command to the aggregator of a region, if it is connected; from any thread."""
        region = self._regions.get(first(path))
        if region is not None:
            region.channel.send(steered_body(region.name, job, commands=[command]))

    def repeat(self, region: Region) -> None:
        """Repeat the open requests to an aggregator."""
        for (job, _), (asked, command, _) in list(self._asked.items()):
            if asked == region.name:
                self.order(asked, job, command)

    def ask(self, job: str, region: str, command: do.Measure) -> Future[Any]:
        """Have an aggregator measure or add up; it is asked again whenever it reconnects, until `drop`."""
        answer: Future[Any] = Future()
        self._asked[job, command.number] = region, command, answer
        if region not in self._regions:
            log.warning(
                "round %d of %s waits for the aggregator %s, which has %d of its updates and isn't connected",
                command.round, job, region, len(command.contributions),
            )  # fmt: skip
        self.order(region, job, command)
        return answer

    def drop(self, job: str, number: int) -> None:
        """Stop waiting for an answer."""
        self._asked.pop((job, number), None)

    def fetch(self, job: str, path: str, sha256: str) -> bytes | None:
        """A blob of the aggregator of a region, which is waited for; None if it has none or can't read it, or doesn't
        come back. Raises `ParentLostError` if this server ends."""
        name, _, rest = path.partition("/")
        unanswered = 0
        while unanswered < _TRIES:
            with self._changed:
                while not self._closed and name not in self._regions and not self.gone(name):
                    self._away.setdefault(name, time.monotonic())
                    self._changed.wait(_LOOK_S)
                region = self._regions.get(name)
            if self._closed:
                raise ParentLostError("this server ends")
            if region is None:
                return None
            try:
                return region.channel.fetch(job, sha256, rest)
            except UnansweredError:
                unanswered += 1
            except ParentLostError:
                unanswered = 0
            with self._changed:
                self._changed.wait_for(partial(self._replaced, name, region), _LOOK_S)
        log.error("the aggregator %s can't read blob %s", name, sha256)
        return None

    def find(self, job: str, sha256: str, path: str) -> bytes | None:
        """A blob of the aggregator of a region, as `fetch`, or of any aggregator if the path is empty."""
        return self.fetch(job, path, sha256) if path else self.look(job, sha256)

    def look(self, job: str, sha256: str, asker: Channel | None = None) -> bytes | None:
        """A blob of any connected aggregator except `asker`."""
        for region in list(self._regions.values()):
            if region.channel is not asker:
                with suppress(ParentLostError):
                    if (data := region.channel.fetch(job, sha256)) is not None:
                        return data
        return None

    def _replaced(self, name: str, region: Region) -> bool:
        return self._closed or self._regions.get(name) is not region

    def close(self) -> None:
        with self._changed:
            self._closed = True
            regions, self._regions = list(self._regions.values()), {}
            channels = list(self._channels)
            self._changed.notify_all()
        for region in regions:
            region.channel.flush(_FLUSH_S)
        for channel in channels:
            channel.close()
        self._searches.shutdown(wait=False, cancel_futures=True)
        self._server.shutdown()
        self._thread.join(5.0)

    # Connections, each in a thread of its own.

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse a peer without a server's certificate of this fleet, before any of its messages is read."""
        if self._context is not None and peer_name(cast("ssl.SSLSocket", connection.socket)) != SERVER:
            return connection.respond(HTTPStatus.FORBIDDEN, "")
        return None

    def _limited(self, client: socket.socket, address: Any) -> None:
        """Serve a connection, or close it if there are too many."""
        with self._changed:
            self._connections += 1
            admitted = self._connections <= CONNECTIONS
        try:
            if admitted:
                self._serve(client, address)
            else:
                client.close()
        finally:
            with self._changed:
                self._connections -= 1

    def _handle(self, connection: ServerConnection) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or bool(self._stores))
        found: list[Region] = []

        def received(channel: Channel, message: Message) -> None:
            if not found:
                found.append(self._greeted(channel, message))
                self._put(found[0], RegionUp(found[0]))
            else:
                self._received(found[0], message)

        try:
            with Channel(connection, self._store, received, self._wanted) as channel:
                with self._changed:
                    if self._closed:
                        return
                    self._channels.add(channel)
                try:
                    channel.run()
                finally:
                    with self._changed:
                        self._channels.discard(channel)
        finally:
            if found:
                self._put(found[0], RegionDown(found[0]))

    def _put(self, region: Region, item: Item) -> None:
        self._items.put((region, item))
        if not self.waiting:
            self.waiting = True
            self._wake()

    def _greeted(self, channel: Channel, message: Message) -> Region:
        if message["kind"] != "hello":
            raise ProtocolError("first message of an aggregator", expected="hello", got=str(message["kind"])[:80])
        name, version = check_name(str(message["region"]), "region"), str(message["version"])[:40]
        if version != __version__:
            reason = f"it runs fedprune {version}, and its parent {__version__}"
            _dismiss(channel, "refused", reason)
            raise ProtocolError(f"the aggregator {name} is refused: {reason}")
        return Region(name, channel, str(message["instance"])[:64], str(message["process"])[:64])

    def _dismiss(self, region: Region, kind: str, reason: str) -> None:
        # A thread of its own: those of the pool may all wait for blobs.
        threading.Thread(target=_dismiss, args=(region.channel, kind, reason), daemon=True).start()

    def _received(self, region: Region, message: Message) -> None:
        match message["kind"]:
            case "born":
                birth = parse(str(message["birth"]).encode())
                if not isinstance(birth, Birth):
                    raise ProtocolError("a board's birth", got=birth.kind)
                self._put(region, BornBelow(joined(region.name, str(message["region"])), birth))
            case "died":
                self._put(region, DiedBelow(region.name, str(message["device"]), int(message["session"])))
            case "traffic":
                moved = {str(name): (int(down), int(up)) for name, (down, up) in message["devices"].items()}
                self._put(region, TrafficBelow(str(message["job"]), moved))
            case "event":
                job, event = str(message["job"]), read_event(message["event"])
                if isinstance(event, on.Extracted):
                    event = replace(event, offer=self._shared(event.offer))
                if job not in self._stores:
                    return  # an aggregator that has to begin again with other jobs
                if isinstance(event, on.Measured | on.AddedUp):
                    _, _, answer = self._asked.pop((job, event.number), (None, None, None))
                    if answer is not None:
                        answer.set_result(event)
                    return
                if isinstance(event, on.Located | on.Reconnected | on.Disconnected):
                    event = replace(event, region=joined(region.name, event.region))
                self._put(region, EventBelow(region.name, job, event))
            case kind:
                raise ProtocolError("message of an aggregator", got=str(kind)[:80])

    def _shared(self, offer: dict[str, Any]) -> dict[str, Any]:
        """An offer as its equals in memory: many boards are offered the same, and a copy takes 4 kB."""
        for known in tuple(self._offers):
            if known == offer:
                return known
        self._offers.append(offer)
        return offer

    def _store(self, job: str, sha256: str) -> BlobStore | None:
        known = self._stores.get(job)
        stores = [self._landing] if known is None else [known, self._landing]
        return next((store for store in stores if store.has(sha256)), None)

    def _wanted(self, channel: Channel, request: BlobWanted) -> None:
        job, sha256, _ = request
        if self._store(job, sha256) is not None or job not in self._stores:
            channel.give(request)
        else:
            with suppress(RuntimeError):  # this server ends
                self._searches.submit(self._search, channel, request)

    def _search(self, channel: Channel, request: BlobWanted) -> None:
        """Look for a blob at the other aggregators, and then further up."""
        job, sha256, _ = request
        data, lost = self.look(job, sha256, channel), False
        if data is None:
            try:
                data = self._above(job, sha256)
            except ParentLostError:
                lost = True
        channel.give(request, data, lost=lost)


@dataclass(frozen=True)
class JobRegions:
    """The aggregators of one job, as its worker uses them."""

    connections: RegionConnections
    job: str

    def ask(self, region: str, command: do.Measure) -> Future[Any]:
        return self.connections.ask(self.job, region, command)

    def fetch(self, path: str, sha256: str) -> bytes | None:
        return self.connections.fetch(self.job, path, sha256)

    def gone(self, path: str) -> bool:
        return self.connections.gone(path)

    def drop(self, number: int) -> None:
        self.connections.drop(self.job, number)


class _Latest:
    """TLS as it is configured when a connection is made."""

    def __init__(self, context: Callable[[], ssl.SSLContext]) -> None:
        self._context = context

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        return self._context().wrap_socket(*arguments, **named)


def _dismiss(channel: Channel, kind: str, reason: str) -> None:
    channel.send({"kind": kind, "reason": reason})
    channel.flush(_FLUSH_S)
    channel.close()
