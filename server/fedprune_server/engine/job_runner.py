"""One of several jobs of a server: a daemon whose connection, and whose devices, are lent to it by a host."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from fedprune.coordination import Phase, State
from fedprune.coordination import events as on
from fedprune.coordination.device_scheduler import JobDemand
from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.schedule import SYNCHRONOUS
from fedprune.jobs.state import Progress
from fedprune.strategies import compose
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Birth
from fedprune_server.devices.presence import Presence
from fedprune_server.engine.daemon import Daemon
from fedprune_server.messaging.transport import Item, Relay, Wire

log = logging.getLogger("fedprune.server")

ELSEWHERE = "not at this job"
"""A device that is free, works for another job, or isn't there."""

_UNDER_WAY = (Progress.QUEUED, Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING)


class Extension(Relay):
    """A job's end of the server's connection: it says all itself, and hears what the host passes on.

    Args:
        link: The server's connection.
    """

    def __init__(self, link: Wire) -> None:
        super().__init__(link)
        self.inbox: deque[Item] = deque()

    def get(self, timeout: float | None = 0.0) -> Item | None:
        """What was passed on next; it is never waited for."""
        return self.inbox.popleft() if self.inbox else None


class JobDesk(Daemon):
    """A job beside others. Who is there is the host's business: this job hears of the devices that it is lent.

    Args:
        job: As for a `Daemon`, like all arguments that are not named here.
        architecture: The global model's.
        state: Where to go on.
        storage: Where events and states are saved.
        store: Where blobs lie.
        worker: Carries out heavy commands.
        link: The server's connection.
        weight: The job's share of the devices in comparison with the others'; 0 to pause it.
        options: The other options of a `Daemon`, but for the broker, which is the host's.
    """

    def __init__(
        self,
        job: Any,
        architecture: Any,
        state: State,
        storage: Any,
        store: Any,
        worker: Any,
        link: Wire,
        *,
        weight: float = 1.0,
        **options: Any,
    ) -> None:
        self._extension = Extension(link)
        super().__init__(job, architecture, state, storage, store, worker, self._extension, **options)
        self.weight = weight
        self.moved = True
        """Whether something has happened since the host looked."""
        self._changed: set[str] = set()
        self._seen: Phase | None = None
        self._reception.asks = False
        self._registry.presence = Presence(lambda device: None)  # nobody: the host knows who is there
        self._registry.prefix = f"{job.name}: "
        self._schedule = compose(job).schedule or SYNCHRONOUS
        self.observers.noticed.add(self._note)
        self.view = replace(self.view, weight=lambda: self.weight, away=ELSEWHERE)

    # What the host does with it.

    def open(self) -> None:
        """Go on where the last process ended."""
        self._resume()

    def turn(self) -> None:
        """Take in what was passed on, save what it leads to, and only then say what follows."""
        self._turn()

    def close(self) -> None:
        """End; what is not saved is done again by the next process."""
        self._close()

    def hear(self, item: Item) -> None:
        """Pass something on, for the next turn."""
        self._extension.inbox.append(item)

    @property
    def pause_s(self) -> float:
        """For how long its next turn may wait, as far as this job is concerned."""
        return 0.0 if self._extension.inbox or self._taken else self._pause()

    @property
    def quiet(self) -> bool:
        """Whether nothing is under way, such as a last evaluation."""
        return not self.busy and not self._extension.inbox

    def lend(self, births: Iterable[Birth]) -> set[str]:
        """Let the job have devices, all at once; which of them are given work is its own business.

        Args:
            births: What they say of themselves.

        Returns:
            Those that it can make something of.
        """
        self._begin()
        events = []
        for birth in births:
            self._reception.out.discard(birth.device)
            try:
                self._registry.admit(birth.device, one_line(birth.software), 0)
            except ProtocolError as error:
                log.warning("%s%s", self._registry.prefix, error)
                continue
            answer_s = birth.answer_s or 0.0
            self._post.ask(self._uploads.born(birth.device, birth.session, answer_s, self._monotonic()))
            event = self._reception.described(birth, one_line(birth.profile, 64))
            events += [event] if event is not None else []
        self._errands.collect_uploads()
        for i, event in enumerate(events):
            self._handle(replace(event, more=i + 1 < len(events)))
            self._registry.introduce(event.device)
        return {e.device for e in events if not self.state.devices[e.device].excluded}

    def recall(self, device: str, session: int) -> None:
        """Take a device away: it is gone, or works for another job."""
        self._begin()
        event = self._reception.ended(device, session, again=False)
        known = self.state.devices.get(device)
        if known is not None and known.online:
            self._handle(event)

    def welcome(self, birth: Birth, size: int) -> None:
        """See to what a device's announcement means beside jobs: its name, a release for it.

        Raises:
            ProtocolError: It is one device too many.
        """
        self._registry.admit(birth.device, one_line(birth.software), size)
        self._quarantine.born(birth.device)
        self._registry.born(birth.device, birth.session, one_line(birth.profile, 64), birth.samples, self._monotonic())
        self._reception.wants_log(birth)
        if self._desk is not None:
            self._desk.born(birth.device)

    def void(self, device: str, held: Any) -> None:
        """Tell a device to let go of what it holds, if that can't count any more."""
        self._reception.void(device, **held)

    def dismiss(self, devices: Iterable[str]) -> None:
        """Say to devices that the job is finished."""
        super()._dismiss(devices)

    # What the host asks of it.

    def works(self, device: str) -> bool:
        """Whether something of a round is awaited of a device."""
        task = self.state.tasks.get(device)
        if task is None or task.progress not in _UNDER_WAY:
            return False
        if task.basis is not None:
            return self.state.phase is not Phase.FINISHED
        return self.state.phase in (Phase.SCORING, Phase.TRAINING)

    def offers(self, device: str, sha256: str) -> bool:
        """Whether a device may fetch a blob, as its part in this job or as a release."""
        release = frozenset[str]() if self._desk is None else self._desk.files(device)
        return sha256 in self.offered(device) | release

    def takes(self, device: str, session: int) -> bool:
        """Whether a device can take part in the job, as far as is known."""
        known = self.state.devices.get(device)
        return known is None or known.session != session or not known.excluded

    def bars(self, device: str) -> bool:
        """Whether the job has turned a device away."""
        return self._registry.bars(device)

    def fits(self, device: str) -> bool:
        """Whether the job would give a device something to do now: an asynchronous one not twice on one model."""
        task = self.state.tasks.get(device)
        return task is None or task.basis is None or (task.progress is Progress.REFUSED and task.deadline is None)

    def changes(self) -> set[str]:
        """Devices of which the answers above may be others than at the last call."""
        self._note(self.state.devices.changed | self.state.tasks.changed)
        found, self._changed = self._changed, set()
        return found

    def borrower(self) -> JobDemand | None:
        """What the job needs now; None if it is finished."""
        state = self.state
        if state.phase is Phase.FINISHED:
            return None
        weight = 0.0 if state.paused else self.weight
        if state.phase is Phase.WAITING:
            return JobDemand(self.job.name, weight, self.job.devices, 2**31)
        if not self._schedule.asynchronous:
            return JobDemand(self.job.name, weight, self.job.devices, 0)
        holds = state.tasks.count(*_UNDER_WAY)
        room = max(0, (self._schedule.concurrent or 2**31) - holds) if state.phase is Phase.TRAINING else 0
        return JobDemand(self.job.name, weight, 1, room, holds)

    def _note(self, devices: Collection[str]) -> None:
        """Keep who has changed, before that is settled; with the phase it may be anybody who has a part."""
        state = self.state
        self._changed.update(devices)
        if state.phase is not self._seen:
            self._seen = state.phase
            self._changed |= state.tasks.keys()

    # What it leaves to the host.

    def _handle(self, event: on.Event) -> None:
        super()._handle(event)
        self.moved = True

    def _take(self, item: Any) -> None:
        if isinstance(item, ConnectionUp):
            self._uploads.interrupted(self._monotonic())
        if isinstance(item, (ConnectionUp, ConnectionDown)):
            if self._desk is not None:
                self._desk.connected(isinstance(item, ConnectionUp))
        else:
            super()._take(item)

    def _greet(self, now: float) -> None:
        """The host does."""

    def _dismiss(self, devices: Iterable[str]) -> None:
        """Devices are told when all jobs are finished: until then they stay."""
