"""The daemon: a coordinator with a clock, a disk, a broker and a thread for heavy work.

One loop does everything that is quick: it takes in messages, a handful at a time, saves what they lead to, all in one
transaction, and only then carries it out and says anything. Heavy commands go to the workshop's thread, and what comes
of them is an event like any other. Whatever is lost on the way (a message, a connection, this process) is said again by
somebody: devices repeat their updates, the server its offers.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import Phase, State, coordinate
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import SYNCHRONOUS
from fedprune.model.architecture import Architecture
from fedprune.strategies import compose
from fedprune.wire.chunk import MAX_PACKET
from fedprune.wire.connection_events import ConnectionDown, ConnectionUp
from fedprune.wire.messages import Finished, Hello
from fedprune.wire.topics import Topics
from fedprune.wire.transfer import BlobSender
from fedprune_server.devices.board_logs import BoardLogs
from fedprune_server.devices.quarantine import Quarantine
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.devices.shutdown import FLUSH_S, GracefulShutdown
from fedprune_server.engine.alarms import Alarms
from fedprune_server.engine.command_dispatcher import Errands
from fedprune_server.engine.journal import Journal
from fedprune_server.engine.message_handler import Reception
from fedprune_server.engine.steady_clock import SteadyClock
from fedprune_server.executor import divergence
from fedprune_server.executor.background import BackgroundExecutor, CommandExecutor
from fedprune_server.executor.retention import Garbage
from fedprune_server.messaging.embedded_broker import Supervised, Supervisor
from fedprune_server.messaging.intake import Intake
from fedprune_server.messaging.outbox import Line, Post
from fedprune_server.messaging.rate_limit import Guarded
from fedprune_server.messaging.transport import Item, Noticed, Wire
from fedprune_server.monitoring.observer import DisplayObserver, Observer, Observers
from fedprune_server.monitoring.view import JobView
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.storage import Storage
from fedprune_server.terminal.log_lines import about, device_in
from fedprune_server.terminal.table import Lines
from fedprune_server.transfer.downloads import Downloads
from fedprune_server.transfer.multicast import Audience, Sharing
from fedprune_server.transfer.s3_sync import Shipping
from fedprune_server.transfer.uploads import Uploads

log = logging.getLogger("fedprune.server")

_TIMELESS = (Phase.WAITING, Phase.FINISHED, Phase.SCORING, Phase.EVALUATING)
"""Phases in which no deadline passes; in asynchronous jobs only the first two."""

_TICK_S = 0.5
_GREETING_S = 24 * 3600.0


class Daemon:
    """Runs a job over MQTT.

    Args:
        job: The job.
        architecture: The global model's.
        state: Where to go on.
        storage: Where events and states are saved.
        store: Where blobs lie.
        worker: Carries out heavy commands.
        link: The connection to the broker, subscribed to `subscriptions`, not necessarily up yet.
        site: The site whose devices take part.
        keep: How many of the latest global models stay on the disk; None for all that ever was in the store.
        uploads: Takes in updates; None for the daemon by itself.
        pulls: From how many devices updates are pulled at a time.
        profiles: Folders of hardware profiles beside the shipped ones.
        max_devices: How many devices may ever take part.
        max_packet: Bytes of an MQTT packet that the broker lets through.
        broker: The embedded broker, if there is one.
        rollouts: Releases on their way to boards, if this server gives them any.
        members: Who may take part, where it isn't everybody; others leave a rollout.
        blobs_at: Where boards are told that blobs lie on the web; None for nowhere.
        quarantine: Says whom `link` hears; None for one of the daemon's own, in front of the link.
        logs: Keeps what boards tell of their logs and crashes; None to ask for nothing of that.
        observers: Who looks on; None for lines in the log. More may join before the start.
        clock: The system's clock, seconds since 1970. Deadlines and the job's record go by a `SteadyClock` of it, which
            setting the system's clock doesn't move.
        monotonic: Monotonic clock, seconds.
        frozen: Tensors that the model's author froze.
    """

    def __init__(
        self,
        job: Job,
        architecture: Architecture,
        state: State,
        storage: Storage,
        store: BlobStore,
        worker: CommandExecutor,
        link: Wire,
        *,
        site: str = "default",
        keep: int | None = 3,
        uploads: Uploads | None = None,
        pulls: int = 4,
        profiles: Sequence[Path] = (),
        max_devices: int = 1000,
        max_packet: int = MAX_PACKET,
        broker: Supervised | None = None,
        rollouts: RolloutStore | None = None,
        members: Callable[[], Collection[str]] | None = None,
        blobs_at: str | None = None,
        quarantine: Quarantine | None = None,
        logs: BoardLogs | None = None,
        observers: Sequence[Observer] | None = None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        frozen: Collection[str] = (),
    ) -> None:
        self.job = job
        self.state = state
        self._coordinator = coordinate(job, architecture, state, frozen)
        self.observers = Observers([DisplayObserver(Lines())] if observers is None else observers)
        with about(job=job.name):
            self._workshop = BackgroundExecutor(worker)
        self._quarantine = quarantine or Quarantine(monotonic)
        self._link = link if quarantine is not None else Guarded(link, self._quarantine)
        self._topics, self._supervisor = Topics(site), Supervisor(broker)
        self._clock, self._steady, self._monotonic = clock, SteadyClock(clock, monotonic), monotonic
        self._registry = DeviceRegistry(job, architecture, state, storage.traffic(), max_devices, storage.outsiders())
        self._shipping = Shipping(store)
        near = self._shipping.near
        self._uploads = uploads or Uploads(near, pulls, max_packet)
        stores = [near] if rollouts is None else [near, rollouts.blobs]
        self._quarantine.know(self._registry.traffic)
        sharing = Sharing(near, Audience(state), max_packet)
        downloads = Downloads(BlobSender(*stores), max_packet)
        self._post = Post(
            Line(self._link, self._topics, job.name, max_packet), self._registry, downloads, sharing, monotonic,
            self._quarantine, self._shipping.coming,
        )  # fmt: skip
        self._desk = (
            None if rollouts is None else RolloutCoordinator(rollouts, self._post.send, members, clock, monotonic)
        )
        self._reception = Reception(
            job, state, self._topics, self._registry, self._uploads, self._post, profiles, monotonic, self._desk, clock,
            self._quarantine, logs,
        )  # fmt: skip
        self._errands = Errands(
            job, state, self._registry, self._uploads, self._post, self._reception.out, self._handle, monotonic,
            self._shipping, blobs_at,
        )  # fmt: skip
        self._journal = Journal(
            state, storage, Garbage(store, keep), self._registry, lambda anew: self._errands.let_go(anew=anew),
            lambda: self._uploads.digests() | self._shipping.digests, monotonic,
        )  # fmt: skip
        self._alarms = Alarms()
        self._timeless = _TIMELESS[:2] if (compose(job).schedule or SYNCHRONOUS).asynchronous else _TIMELESS
        self._taken: list[on.Event] = []
        self._commands: list[do.Command] = []
        self._now = self._steady()
        self._greet_at = self._ticked = 0.0
        self._intake = Intake(self._link, monotonic)
        self._stopping = self._finished = False
        self._shutdown: GracefulShutdown | None = None
        self.view = JobView(
            job, self._coordinator.architecture, state, self._registry, self._quarantine, self._uploads.progress,
            lambda: self._link.connected, lambda: 1.0, self.pause, self._shipping.near,
            lambda: {
                "workshop": self._workshop.waiting, "uploads": len(self._uploads.devices()),
                "messages": self._post.queued,
            }, self._steady,
        )  # fmt: skip
        """What there is to see of the job."""
        self.when_finished: Callable[[], None] = lambda: None
        """Called when the job is done, at once if it already is."""
        self.web_bytes: Callable[[], Mapping[str, int]] = dict
        """Bytes that devices have fetched over the web since it was last called; they count as sent to them."""

    @property
    def subscriptions(self) -> list[str]:
        """What the link must listen to, before it is started."""
        return self._topics.server_subscriptions()

    @property
    def busy(self) -> bool:
        """Whether something is under way that doesn't wait for devices or time."""
        return self._workshop.busy or bool(self._taken) or self._post.waiting or self._shipping.waiting

    @property
    def finished(self) -> bool:
        """Whether the job is done."""
        return self._finished

    @property
    def traffic(self) -> dict[str, tuple[int, int]]:
        """Payload bytes to and from each device, over all starts of the server."""
        return self._registry.traffic

    def offered(self, device: str) -> frozenset[str]:
        """Digests of what a device's offer names; may be asked from any thread."""
        return self._reception.offered(device)

    def pause(self, paused: bool) -> None:
        """Begin nothing new in the job, or go on with it; it is remembered. To be called from the loop's thread."""
        self._begin()
        self._handle(on.Paused(paused))

    def stop(self) -> None:
        """End the loop soon; may be called from a signal handler or another thread."""
        self._stopping = True

    def run(self, *, until_finished: bool = False) -> State:
        """Run until `stop` is called, or until the job is done.

        Args:
            until_finished: End when the job is done, instead of telling devices that come later.

        Returns:
            The last state.

        Raises:
            FedpruneError: A command failed for another reason than a device's update, or the disk fails. The state on
                disk is that of the last event that was taken in completely.
        """
        try:
            self._resume()
            while not self._stopping:
                self._turn()
                if self._finished and until_finished and not self._workshop.busy:
                    self._linger()
                    break
            return self.state
        finally:
            self._close()

    # What comes in.

    def _pause(self) -> float:
        """Seconds to wait for a message."""
        if self._post.ready:
            return 0.0
        longest = 0.01 if self._workshop.busy or self._post.waiting or self._shipping.waiting else 0.1
        at = self._alarms.next
        if at is None or self._shipping.stuck:  # no deadline counts then, so one that is over mustn't wake it
            return longest
        return max(0.0, min(longest, at - self._steady()))

    def _take(self, item: Item) -> None:
        if isinstance(item, tuple):
            with about(device=device_in(item[0])):
                event = self._reception.receive(*item)
            self._errands.collect_uploads()
            if event is not None:
                self._handle(event)
            if isinstance(event, on.DeviceBorn):
                self._registry.presence.heard(event.device, self._monotonic())
                self._registry.introduce(event.device)
        elif isinstance(item, Noticed):
            for event in self._reception.noticed(item):
                self._handle(event)
        elif isinstance(item, ConnectionUp):
            log.info("connected to the broker")
            self._greet(self._monotonic())
            self._registry.presence.connected(self._monotonic(), self.state.devices)
            self._uploads.interrupted(self._monotonic())
        elif isinstance(item, ConnectionDown):
            log.warning("connection to the broker lost: %s", item.reason)
            self._registry.presence.lost()
        if self._desk is not None and isinstance(item, (ConnectionUp, ConnectionDown)):
            self._desk.connected(isinstance(item, ConnectionUp))

    # Events and commands.

    def _resume(self) -> None:
        """Go on where the last process ended."""
        self._ticked = self._monotonic()
        self._begin()
        self._shipping.prepare(self.state.references())
        self._handle(on.Resumed())
        self._commit()

    def _turn(self) -> None:
        """Take in what has come, save what it leads to, and only then say what follows."""
        items = self._intake.turn(self._pause())
        with about(job=self.job.name, round=self.state.round, trace_id=self.observers.trace_id):
            self._work(items)

    def _work(self, items: Iterable[Item]) -> None:
        begun = self._monotonic()
        self._begin()
        for item in items:
            self._take(item)
            if self._stopping:
                break
        self._reception.gather()
        self._errands.collect_uploads()
        while not self._stopping and (result := self._workshop.collect()) is not None:
            self._handle(result)
        if self._monotonic() - self._ticked >= _TICK_S:
            self._ticked = self._monotonic()
            self._tick(self._ticked)
        if not self._shipping.stuck and self._alarms.rung(self._now):
            self._handle(on.Ticked())  # but where the bucket can't be used, what is here would be late only for that
        self._commit()
        self._post.send_chunks()
        self.observers.turned(lambda: self._monotonic() - begun, self.view)

    def _close(self) -> None:
        self._supervisor.close()
        self._shipping.close()
        self._workshop.close()
        self.observers.ended()

    def _begin(self) -> None:
        """Begin a turn: what happens in it happens at one time, and nothing is said of it before it is saved."""
        if self.state.phase in self._timeless:
            self._steady.follow()
        self._now = self._steady()

    def _handle(self, event: on.Event) -> None:
        """Take in an event; it is saved, and what follows from it done, as the turn ends."""
        self._commands += self._coordinator.handle(event, self._now)
        self._taken.append(event)
        self.observers.event(event, self._now)
        self._reception.judged(event)
        self._journal.heard(event)
        if isinstance(event, on.UpdateRejected):
            reasons = [task.reason for task in self.state.tasks.values()]
            divergence.warn(event, self.job, self._registry.prefix, reasons)

    def _commit(self) -> None:
        """End the turn: save what happened in it, then carry out what follows; that may lead to more."""
        while self._taken:
            events, self._taken = self._taken, []
            commands, self._commands = self._commands, []
            self._save(events)
            self._carry_out(commands)
        self._post.deliver()

    def _save(self, events: Sequence[on.Event]) -> None:
        if self.observers.noticed:
            self.observers.noticed(self.state.devices.changed | self.state.tasks.changed)
        seconds = self._journal.save(events, self._now)
        if seconds is not None:
            self.observers.saved(seconds)
        for summary in self._journal.ended():
            self.observers.round_over(summary, self._now, self.view)

    def _carry_out(self, commands: list[do.Command]) -> None:
        self._workshop.expect(commands)
        for command in commands:
            self.observers.command(command, self._now)
            match command:
                case do.Wake():
                    self._alarms.add(command.at)
                case do.Finish():
                    self._finish(command)
                case do.Score() | do.Extract() | do.Fold() | do.Close() | do.Evaluate():
                    self._workshop.order(command)
                case _:
                    self._errands.run(command)

    def _finish(self, command: do.Finish) -> None:
        if not self._finished:
            self._shutdown = self._registry.shutdown(self._monotonic())
            log.info("job %s is finished: global model %s", self.job.name, command.model)
            self.when_finished()
        self._finished = True
        self._dismiss(self.state.devices)

    def _dismiss(self, devices: Iterable[str]) -> None:
        for device in devices:
            self._post.send(device, Finished(self.job.name), self.job.name)

    # Time.

    def _tick(self, now: float) -> None:
        self._supervisor.tick()
        for device, size in self.web_bytes().items():
            self._registry.sent(device, size)
        for device in self._registry.presence.silent(now):
            self._post.send(device, Hello(int(self._clock())))
        for event in self._reception.missed(self._intake.caught_up):
            self._handle(event)
        if self._desk is not None:
            self._desk.tick()
        self._registry.clones.settle(now)
        self._quarantine.save()
        self._reception.keep_logs()
        self._errands.repeat(now)
        self._post.ask(self._uploads.tick(now))
        self._errands.collect_uploads()
        if self._link.connected and now >= self._greet_at:
            self._greet(now)

    def _greet(self, now: float) -> None:
        """Say to everybody that this server is there, and what time it is."""
        self._greet_at = now + _GREETING_S
        self._post.broadcast(Hello(int(self._clock())))

    def _linger(self) -> None:
        """Let the last messages out, and tell devices that come back just now that it is over."""
        shutdown = self._shutdown or self._registry.shutdown(self._monotonic())
        while not self._stopping and not shutdown.over(self._monotonic()):
            self._turn()
        self._link.flush(FLUSH_S)
