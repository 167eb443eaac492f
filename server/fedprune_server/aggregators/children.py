"""The aggregators below a server: who is connected, what they report, and what goes to which of them."""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from http import HTTPStatus
from typing import Any

from websockets.http11 import Request, Response
from websockets.sync.server import ServerConnection
from websockets.sync.server import serve as listen

from fedprune import __version__
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.closing import Closing
from fedprune.core.errors import ConfigError, ProtocolError
from fedprune.jobs.state import Device, Phase
from fedprune.security.authority import SERVER
from fedprune.wire.messages import Birth, parse
from fedprune.wire.topics import check_name
from fedprune_server.aggregators.channel import (
    MAX_TEXT,
    PING_TIMEOUT_S,
    QUIET,
    Channel,
    Message,
    ParentLostError,
    drained,
)
from fedprune_server.aggregators.messages import (
    command_body,
    device_body,
    first,
    head_of,
    joined,
    places,
    read_event,
    task_body,
)
from fedprune_server.enrollment.pki import IdentityFolder

log = logging.getLogger("fedprune.server")

_FLUSH_S = 5.0
"""How long the last messages may take to be sent."""

CONNECTIONS = 256
"""Most connections at a time, those included that haven't said who they are."""

_MEMBERS, _ROWS = 20_000, 1000
"""Most members, and devices, in a message."""

_LOOK_S = 1.0

_SEARCHES = 16
"""Threads that look for a blob of one aggregator at the others."""


@dataclass(frozen=True)
class ParentJob:
    """A job as aggregators begin it.

    Attributes:
        about: Its settings, its model's name and digest, as JSON.
        state: The coordinator's or, at an aggregator, the copy of it; read, never changed.
    """

    about: Mapping[str, Any]
    state: State
    store: BlobStore


@dataclass(eq=False)
class Region:
    """A connection of an aggregator.

    Attributes:
        instance: Tells an aggregator from another one of the same name.
        register: Bytes of the register of certificates that it was told.
        devices: By job the devices whose rows it has.
        heads: By job what it was told of the state.
    """

    name: str
    channel: Channel
    instance: str = ""
    register: int = 0
    devices: dict[str, set[str]] = field(default_factory=dict)
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)


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
    """A board is connected through an aggregator; `path` names that one, and those between."""

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
    """Something happened to a board's part in a job."""

    region: str
    job: str
    event: on.Event


@dataclass(frozen=True)
class TrafficBelow:
    """Payload bytes went to and from boards."""

    job: str
    devices: Mapping[str, tuple[int, int]]


Item = RegionUp | RegionDown | BornBelow | DiedBelow | EventBelow | TrafficBelow


class Children(Closing):
    """Listens for aggregators.

    Args:
        host: Where; an address of this machine.
        port: 0 for a free one.
        context: Gives TLS for a connection, which asks for a certificate; None to do without.
        landing: Where blobs of aggregators arrive; it also has the jobs' models.
        identity: The fleet's, whose members and revocations aggregators are told; None to do without.
        patience_s: How long an aggregator that is away is waited for.

    Raises:
        ConfigError: The address can't be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext] | None,
        landing: BlobStore,
        identity: IdentityFolder | None = None,
        patience_s: float = 3600.0,
    ) -> None:
        self._patience_s = patience_s
        self._context, self._landing = context, landing
        self._wake: Callable[[], None] = lambda: None
        self._jobs: Mapping[str, ParentJob] = {}
        self._above: Callable[[str, str], bytes | None] = lambda job, sha256: None
        self._items: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._regions: dict[str, Region] = {}
        self._asked: dict[tuple[str, int], tuple[str, do.Measure, Future[Any]]] = {}
        self._identity = identity
        self._away: dict[str, float] = {}
        self._given_up: set[str] = set()
        self._connections = 0
        self._members: Mapping[str, str] | None = None
        self._version = ""
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
        self._thread = threading.Thread(target=self._server.serve_forever, name="fedprune-children", daemon=True)
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
        jobs: Mapping[str, ParentJob],
        wake: Callable[[], None],
        above: Callable[[str, str], bytes | None] | None = None,
    ) -> None:
        """Let aggregators in for these jobs.

        Args:
            wake: Called when there is something to collect.
            above: Gives a blob of this server's own parent.
        """
        self._above = above or self._above
        with self._changed:
            self._jobs, self._wake = jobs, wake
            self._changed.notify_all()

    def collect(self) -> list[Item]:
        """Items that have come since the last call."""
        return drained(self._items)

    # For the server's loop.

    def up(self, region: Region) -> bool:
        """An aggregator is connected: send it the jobs, the members and its rows. An earlier connection of it is
        closed. Returns False if another aggregator has its name, and is connected."""
        earlier = self._regions.get(region.name)
        if earlier is not None and not earlier.channel.closed and earlier.instance != region.instance:
            reason = f"another aggregator is connected as {region.name}"
            log.warning("an aggregator is refused: %s", reason)
            self._searches.submit(_dismiss, region.channel, reason)
            return False
        if earlier is not None:
            earlier.channel.close()
        region.channel.send({"kind": "welcome", "jobs": {name: job.about for name, job in self._jobs.items()}})
        if self._members is not None:
            self._tell_members(region, self._members, (), whole=True)
            self._tell_register(region, 0)
        with self._changed:
            self._regions[region.name] = region
            self._away.pop(region.name, None)
            self._given_up.discard(region.name)
            self._changed.notify_all()
        for name, job in self._jobs.items():
            ended: list[do.Command] = [do.Finish(job.state.model)] if job.state.phase is Phase.FINISHED else []
            self._send(region, name, self.devices(name, region.name), ended, whole=True)
        for (job_name, _), (asked, command, _) in list(self._asked.items()):
            if asked == region.name:
                self.order(asked, job_name, command)
        return True

    def down(self, region: Region) -> bool:
        """A connection has ended; returns whether it was the aggregator's latest."""
        if self._regions.get(region.name) is not region:
            return False
        with self._changed:
            del self._regions[region.name]
            self._away[region.name] = time.monotonic()
        return True

    def devices(self, job: str, region: str) -> list[str]:
        """The devices of a job that concern a region."""
        state = self._jobs[job].state
        names = state.devices.keys() | state.tasks.keys()
        return sorted(n for n in names if region in places(state.devices.get(n), state.tasks.get(n)))

    def is_member(self, device: str) -> bool:
        """Whether a board may be connected through an aggregator, as of now."""
        if self._members is None or device in self._members:
            return True
        self.tick()
        return device in self._members

    def away(self) -> list[str]:
        """Aggregators that are no longer waited for; each once, until it is back."""
        now = time.monotonic()
        lost = [n for n, since in self._away.items() if now - since > self._patience_s and n not in self._given_up]
        self._given_up |= set(lost)
        return lost

    def expect(self, regions: Collection[str]) -> None:
        """Aggregators that were there before this start of the server."""
        now = time.monotonic()
        self._away |= {name: now for name in regions if name not in self._regions}

    def gone(self, path: str) -> bool:
        """Whether the aggregator of a region is away, and was waited for long enough; from any thread."""
        since = self._away.get(first(path))
        return since is not None and time.monotonic() - since > self._patience_s

    def tick(self) -> None:
        """Tell aggregators which members have changed, and which certificates were revoked. Raises `StorageError` if
        the database can't be read."""
        if self._identity is None or self._version == (version := self._identity.store.version()):
            return
        before, members = self._members or {}, self._identity.store.members()
        self._version, self._members = version, members
        added = {name: key for name, key in members.items() if before.get(name) != key}
        for region in self._regions.values():
            self._tell_members(region, added, sorted(before.keys() - members.keys()), whole=False)
            self._tell_register(region, region.register)

    def _tell_members(self, region: Region, added: Mapping[str, str], removed: Sequence[str], *, whole: bool) -> None:
        names = sorted(added)
        for at in range(0, max(1, len(names)), _MEMBERS):
            some = {n: added[n] for n in names[at : at + _MEMBERS]}
            more = at + _MEMBERS < len(names)
            body = {"kind": "members", "added": some, "removed": removed, "whole": whole, "more": more}
            region.channel.send(body)

    def _tell_register(self, region: Region, after: int) -> None:
        if self._identity is None:
            return
        lines, region.register = self._identity.authority.lines(after)
        for at in range(0, len(lines), _MEMBERS):
            region.channel.send({"kind": "register", "lines": lines[at : at + _MEMBERS]})

    def route(self, job: str, changed: Collection[str], commands: Sequence[do.Command]) -> list[do.Command]:
        """Send aggregators the rows that have changed and the commands for their boards; returns the other commands.
        Call it once the state is saved."""
        state = self._jobs[job].state
        rows: dict[str, set[str]] = {name: set() for name in self._regions}
        for device in changed if rows else ():
            concerned = places(state.devices.get(device), state.tasks.get(device))
            for name, region in self._regions.items():
                if name in concerned or device in region.devices.get(job, ()):
                    rows[name].add(device)
        here: list[do.Command] = []
        below: dict[str, list[do.Command]] = {name: [] for name in self._regions}
        for command in commands:
            place = _place(state, command)
            if isinstance(command, do.Finish):
                for orders in below.values():
                    orders.append(command)
            if place is None:
                here.append(command)
            elif place in below:
                below[place].append(command)
            # An aggregator that is away gets its rows when it comes back, and open commands are repeated then.
        for name, region in self._regions.items():
            self._send(region, job, rows[name], below[name])
        return here

    def order(self, path: str, job: str, command: do.Command) -> None:
        """Send one command to the aggregator of a region, if it is connected; from any thread."""
        region = self._regions.get(first(path))
        if region is not None:
            region.channel.send(_steered(region, job, commands=[command]))

    def _send(
        self, region: Region, job: str, changed: Collection[str], commands: Sequence[do.Command], *, whole: bool = False
    ) -> None:
        state, known = self._jobs[job].state, region.devices.setdefault(job, set())
        head = head_of(state)
        news = head if head != region.heads.get(job) else {}
        if not (changed or commands or news or whole):
            return
        region.heads[job] = head
        if whole:
            known.clear()
        names, parts = sorted(changed), range(0, max(1, len(changed)), _ROWS)
        for at in parts:
            devices: dict[str, Any] = {}
            tasks: dict[str, Any] = {}
            for name in names[at : at + _ROWS]:
                device, task = state.devices.get(name), state.tasks.get(name)
                mine = region.name in places(device, task)
                here = device is not None and first(device.region) == region.name
                held = task is not None and first(task.region) == region.name
                devices[name] = _device_row(device, region.name, here=here) if mine else None
                tasks[name] = task_body(task, region.name) if task is not None and (here or held) else None
                (known.add if mine else known.discard)(name)
            last = at == parts[-1]
            body = _steered(region, job, news, devices, tasks, commands if last else (), whole=whole)
            region.channel.send(body | {"more": not last})

    # For the worker's thread.

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
        """An answer is awaited no longer."""
        self._asked.pop((job, number), None)

    def fetch(self, job: str, path: str, sha256: str) -> bytes | None:
        """A blob of the aggregator of a region, which is waited for; None if it has none, or doesn't come back."""
        name = first(path)
        while True:
            with self._changed:
                while not self._closed and name not in self._regions and not self.gone(name):
                    self._away.setdefault(name, time.monotonic())
                    self._changed.wait(_LOOK_S)
                region = self._regions.get(name)
            if region is None:
                return None
            with suppress(ParentLostError):
                return region.channel.fetch(job, sha256)
            with self._changed:
                self._changed.wait_for(partial(self._replaced, name, region), _LOOK_S)

    def look(self, job: str, sha256: str, asker: Channel | None = None) -> bytes | None:
        """A blob of any aggregator that is connected, but not of the one that asks."""
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
            self._changed.notify_all()
        for region in regions:
            region.channel.flush(_FLUSH_S)
            region.channel.close()
        self._searches.shutdown(wait=False, cancel_futures=True)
        self._server.shutdown()
        self._thread.join(5.0)

    # Connections, each in a thread of its own.

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        """Refuse, before anything is read of it, whoever has no server's certificate of this fleet."""
        if self._context is not None and _common_name(connection) != SERVER:
            return connection.respond(HTTPStatus.FORBIDDEN, "")
        return None

    def _limited(self, client: socket.socket, address: Any) -> None:
        """Serve a connection, unless there are too many: aggregators are few."""
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
            self._changed.wait_for(lambda: self._closed or bool(self._jobs))
        found: list[Region] = []

        def received(channel: Channel, message: Message) -> None:
            if not found:
                found.append(self._greeted(channel, message))
                self._put(RegionUp(found[0]))
            else:
                self._received(found[0], message)

        try:
            with Channel(connection, self._store, self._landing, received, self._wanted) as channel:
                channel.run()
        finally:
            if found:
                self._put(RegionDown(found[0]))

    def _put(self, item: Item) -> None:
        self._items.put(item)
        self._wake()

    def _greeted(self, channel: Channel, message: Message) -> Region:
        if message["kind"] != "hello":
            raise ProtocolError("first message of an aggregator", expected="hello", got=str(message["kind"])[:80])
        name, version = check_name(str(message["region"]), "region"), str(message["version"])[:40]
        if version != __version__:
            reason = f"it runs fedprune {version}, and its parent {__version__}"
            _dismiss(channel, reason)
            raise ProtocolError(f"the aggregator {name} is refused: {reason}")
        return Region(name, channel, str(message["instance"])[:64])

    def _received(self, region: Region, message: Message) -> None:
        match message["kind"]:
            case "born":
                birth = parse(str(message["birth"]).encode())
                if not isinstance(birth, Birth):
                    raise ProtocolError("a board's birth", got=birth.kind)
                self._put(BornBelow(joined(region.name, str(message["region"])), birth))
            case "died":
                self._put(DiedBelow(region.name, str(message["device"]), int(message["session"])))
            case "traffic":
                moved = {str(name): (int(down), int(up)) for name, (down, up) in message["devices"].items()}
                self._put(TrafficBelow(str(message["job"]), moved))
            case "event":
                job, event = str(message["job"]), read_event(message["event"])
                if job not in self._jobs:
                    return  # an aggregator that has to begin again with other jobs
                if isinstance(event, on.Measured | on.AddedUp):
                    _, _, answer = self._asked.pop((job, event.number), (None, None, None))
                    if answer is not None:
                        answer.set_result(event)
                    return
                if isinstance(event, on.UpdateStored | on.Extracted):
                    event = replace(event, region=joined(region.name, event.region))
                self._put(EventBelow(region.name, job, event))
            case kind:
                raise ProtocolError("message of an aggregator", got=str(kind)[:80])

    def _store(self, job: str, sha256: str) -> BlobStore | None:
        known = self._jobs.get(job)
        stores = [self._landing] if known is None else [known.store, self._landing]
        return next((store for store in stores if store.has(sha256)), None)

    def _wanted(self, channel: Channel, job: str, sha256: str) -> None:
        if self._store(job, sha256) is not None or job not in self._jobs:
            channel.give(job, sha256)
        else:
            with suppress(RuntimeError):  # this server ends
                self._searches.submit(self._search, channel, job, sha256)

    def _search(self, channel: Channel, job: str, sha256: str) -> None:
        """Look for a blob at the other aggregators, and then further up."""
        data, lost = self.look(job, sha256, channel), False
        if data is None:
            try:
                data = self._above(job, sha256)
            except ParentLostError:
                lost = True
        channel.give(job, sha256, data, lost=lost)


@dataclass(frozen=True)
class JobRegions:
    """The aggregators of one job, as its worker uses them."""

    children: Children
    job: str

    def ask(self, region: str, command: do.Measure) -> Future[Any]:
        return self.children.ask(self.job, region, command)

    def fetch(self, path: str, sha256: str) -> bytes | None:
        return self.children.fetch(self.job, path, sha256)

    def gone(self, path: str) -> bool:
        return self.children.gone(path)

    def drop(self, number: int) -> None:
        self.children.drop(self.job, number)


def _steered(
    region: Region,
    job: str,
    head: Mapping[str, Any] | None = None,
    devices: Mapping[str, Any] | None = None,
    tasks: Mapping[str, Any] | None = None,
    commands: Sequence[do.Command] = (),
    *,
    whole: bool = False,
) -> dict[str, Any]:
    return {
        "kind": "steered",
        "job": job,
        "head": head or {},
        "devices": devices or {},
        "tasks": tasks or {},
        "commands": [command_body(c, region.name) for c in commands],
        "whole": whole,
        "more": False,
    }


class _Latest:
    """TLS as it is configured when a connection is made."""

    def __init__(self, context: Callable[[], ssl.SSLContext]) -> None:
        self._context = context

    def wrap_socket(self, *arguments: Any, **named: Any) -> ssl.SSLSocket:
        return self._context().wrap_socket(*arguments, **named)


def _dismiss(channel: Channel, reason: str) -> None:
    channel.send({"kind": "refused", "reason": reason})
    channel.flush(_FLUSH_S)
    channel.close()


def _device_row(device: Device | None, region: str, *, here: bool) -> dict[str, Any] | None:
    if device is None:
        return None
    # One that has moved counts as offline; the aggregator keeps its last update, which the next may ask for.
    return device_body(device, region) | ({} if here else {"online": False, "region": ""})


def _place(state: State, command: do.Command) -> str | None:
    """The aggregator that a command is for; None for this server."""
    match command:
        case do.Fold():
            path = command.contribution.region
        case do.Extract():
            path = _region(state, command.part.device)
        case do.SendOffer() | do.PullUpdate() | do.Acknowledge() | do.Cancel() | do.TellFinished():
            path = _region(state, command.device)
        case _:
            path = ""
    return first(path) or None


def _region(state: State, device: str) -> str:
    known = state.devices.get(device)
    return "" if known is None else known.region


def _common_name(connection: ServerConnection) -> str:
    """The name in an aggregator's certificate, which OpenSSL has found to be right; empty without one."""
    found: Any = getattr(connection.socket, "getpeercert", dict)() or {}
    names = [value for part in found.get("subject", ()) for key, value in part if key == "commonName"]
    return str(names[0]) if len(names) == 1 else ""
