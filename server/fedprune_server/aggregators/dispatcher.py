"""Messages of a parent to its aggregators: jobs' settings, the fleet's members, rows of the state, and commands."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.jobs.state import Device, Phase
from fedprune_server.aggregators.channel import Message
from fedprune_server.aggregators.connections import Region, RegionConnections
from fedprune_server.aggregators.messages import device_body, first, head_of, places, steered_body, task_body
from fedprune_server.enrollment.member_keys import MemberKeys
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.monitoring.snapshot import LostRegion

_MEMBERS, _ROWS = 20_000, 1000
"""Most members, and devices, in a message."""

_COUNT_S = 10.0


@dataclass(frozen=True)
class ParentJob:
    """A job as aggregators begin it.

    Attributes:
        about: Its settings, its model's name and digest, as JSON.
        state: The coordinator's or, at an aggregator, the copy of it; read, never changed.
    """

    about: Mapping[str, Any]
    state: State


@dataclass(eq=False)
class _Sent:
    """Content that an aggregator already has, by its connection.

    Attributes:
        register: Length of the register of certificates in bytes.
        devices: Devices whose rows it has, by job.
        heads: Attributes of the state, by job.
    """

    region: Region
    register: int = 0
    devices: dict[str, set[str]] = field(default_factory=dict)
    heads: dict[str, dict[str, Any]] = field(default_factory=dict)


class RegionDispatcher:
    """Sends each aggregator what concerns its region; used by the server's loop alone.

    Args:
        connections: The aggregators that are connected.
        identity: The fleet's, whose members and revocations aggregators are sent; None to do without.
    """

    def __init__(
        self, connections: RegionConnections, jobs: Mapping[str, ParentJob], identity: IdentityFolder | None = None
    ) -> None:
        self.connections = connections
        self._jobs, self._identity = jobs, identity
        self._sent: dict[str, _Sent] = {}
        self._ends: dict[str, do.Finish] = {}  # of jobs; an aggregator's state doesn't say why one has ended
        self._members: MemberKeys | None = None
        self._version = ""
        self._boards: dict[str, int] = {}
        self._counted_at = 0.0

    def up(self, region: Region) -> bool:
        """An aggregator is connected: send it the jobs, the members and its rows. Returns False if it is refused,
        since another one has its name."""
        sent = _Sent(region)
        if not self.connections.up(region, self._greeting(sent)):
            return False
        self._sent[region.name] = sent
        for name, job in self._jobs.items():
            # One that has finished in an earlier run says so again at its start, and then to all.
            ends = [self._ends[name]] if name in self._ends and job.state.phase is Phase.FINISHED else []
            self._send(sent, name, self._devices(name, region.name), ends, whole=True)
        self.connections.repeat(region)
        return True

    def down(self, region: Region) -> bool:
        """A connection has ended; returns whether it was the aggregator's latest."""
        if not self.connections.down(region):
            return False
        self._sent.pop(region.name, None)
        return True

    def _devices(self, job: str, region: str) -> list[str]:
        """The devices of a job that concern a region."""
        state = self._jobs[job].state
        names = state.devices.keys() | state.tasks.keys()
        return sorted(n for n in names if region in places(state.devices.get(n), state.tasks.get(n)))

    def lost(self, now: float) -> list[LostRegion]:
        """Aggregators that are away while boards of a job that isn't finished are theirs, at a time in seconds since
        1970. Boards are counted again every few seconds."""
        absent = self.connections.absent()
        if absent.keys() - self._boards.keys() or (absent and now - self._counted_at > _COUNT_S):
            self._boards, self._counted_at = self._count(absent), now
        return [
            LostRegion(name, now - away_s, boards, waited=self.connections.gone(name))
            for name, away_s in sorted(absent.items())
            if (boards := self._boards[name])
        ]

    def _count(self, regions: Collection[str]) -> dict[str, int]:
        """The boards of aggregators: members that were connected through one lastly."""
        boards: dict[str, set[str]] = {name: set() for name in regions}
        for job in self._jobs.values():
            for device, row in job.state.devices.items() if job.state.phase is not Phase.FINISHED else ():
                member = self._members is None or device in self._members
                if member and (region := first(row.region)) in boards:
                    boards[region].add(device)
        return {name: len(devices) for name, devices in boards.items()}

    def is_member(self, device: str) -> bool:
        """Whether a board may be connected through an aggregator, as of now."""
        if self._members is None or device in self._members:
            return True
        self.tick()
        return device in self._members

    def tick(self) -> None:
        """Send aggregators the members that have changed and the certificates that were revoked. Raises
        `StorageError` if the database can't be read."""
        if self._identity is None or self._version == (version := self._identity.store.version()):
            return
        before, members = self._members or MemberKeys(), self._identity.store.members()
        self._version, self._members = version, members
        if not self._sent:
            return
        added = {name: members[name] for name in members.lacking(before)}
        removed = [name for name in before.lacking(members) if name not in members]
        for sent in self._sent.values():
            for message in (*_member_messages(added, removed, whole=False), *self._register_messages(sent)):
                sent.region.channel.send(message)

    def _greeting(self, sent: _Sent) -> Iterator[Message]:
        jobs = {name: job.about for name, job in self._jobs.items()}
        yield {"kind": "welcome", "jobs": jobs, "away_s": self.connections.absent().get(sent.region.name, 0.0)}
        if self._members is not None:
            yield from _member_messages(self._members, (), whole=True)
            yield from self._register_messages(sent)

    def _register_messages(self, sent: _Sent) -> Iterator[Message]:
        if self._identity is None:
            return
        lines, sent.register = self._identity.authority.lines(sent.register)
        for at in range(0, len(lines), _MEMBERS):
            yield {"kind": "register", "lines": lines[at : at + _MEMBERS]}

    def route(
        self, job: str, devices: AbstractSet[str], tasks: AbstractSet[str], commands: Sequence[do.Command]
    ) -> list[do.Command]:
        """Send aggregators the rows that have changed, those of `devices` and of their `tasks`, and the commands for
        their boards; returns the other commands. Call it once the state is saved."""
        state = self._jobs[job].state
        rows: dict[str, set[str]] = {name: set() for name in self._sent}
        for device in devices | tasks if rows else ():
            concerned = places(state.devices.get(device), state.tasks.get(device))
            for name, sent in self._sent.items():
                if name in concerned or device in sent.devices.get(job, ()):
                    rows[name].add(device)
        here: list[do.Command] = []
        below: dict[str, list[do.Command]] = {name: [] for name in self._sent}
        for command in commands:
            place = _place(state, command)
            if isinstance(command, do.Finish):
                self._ends[job] = command
                for orders in below.values():
                    orders.append(command)
            if place is None:
                here.append(command)
            elif place in below:
                below[place].append(command)
            # An aggregator that is away gets its rows when it comes back, and open commands are repeated then.
        for name, sent in self._sent.items():
            self._send(sent, job, rows[name], below[name], kept=tasks - devices)
        return here

    def _send(
        self,
        sent: _Sent,
        job: str,
        changed: Collection[str],
        commands: Sequence[do.Command],
        *,
        kept: AbstractSet[str] = frozenset(),
        whole: bool = False,
    ) -> None:
        """Send rows and commands; of the changed devices that are `kept` only the tasks, to who has their rows."""
        region = sent.region.name
        state, known = self._jobs[job].state, sent.devices.setdefault(job, set())
        head = head_of(state)
        news = head if head != sent.heads.get(job) else {}
        if not (changed or commands or news or whole):
            return
        sent.heads[job] = head
        if whole:
            known.clear()
        names, parts = sorted(changed), range(0, max(1, len(changed)), _ROWS)
        for at in parts:
            devices: dict[str, Any] = {}
            tasks: dict[str, Any] = {}
            for name in names[at : at + _ROWS]:
                device, task = state.devices.get(name), state.tasks.get(name)
                mine = region in places(device, task)
                here = device is not None and first(device.region) == region
                held = task is not None and first(task.region) == region
                if not (mine and name in kept and name in known):
                    devices[name] = _device_row(device, region, here=here) if mine else None
                tasks[name] = task_body(task, region) if task is not None and (here or held) else None
                (known.add if mine else known.discard)(name)
            last = at == parts[-1]
            body = steered_body(region, job, news, devices, tasks, commands if last else (), whole=whole)
            sent.region.channel.send(body | {"more": not last})


def _member_messages(added: Mapping[str, str], removed: Sequence[str], *, whole: bool) -> Iterator[Message]:
    names = iter(added)
    for at in range(0, max(1, len(added)), _MEMBERS):
        some = {n: added[n] for n in islice(names, _MEMBERS)}
        more = at + _MEMBERS < len(added)
        yield {"kind": "members", "added": some, "removed": removed, "whole": whole, "more": more}


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
