"""The server's loop: one connection, the devices that are connected, and a runner for each job.

Each job has a coordinator, a database and blobs of its own (`engine.job_runner`). The server decodes messages, knows
which devices are connected, assigns each device to one job at a time (`engine.device_scheduler`) and passes messages on
to the jobs that they concern. It stores nothing itself: when it greets devices after a crash (*hello*), each announces
itself (*birth*). A device whose part in a round is under way continues with it, and the others are free.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence

from msgspec.structs import replace

from fedprune.coordination import Phase
from fedprune.core.errors import BusyError, ConfigError, ProtocolError, UnknownMessageError
from fedprune.core.lock_wait import wait_hook
from fedprune.jobs.failure_kind import Failure, FailureKind
from fedprune.output.log_lines import log_context
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import RECONNECT_ABILITY, Reconnect
from fedprune.wire.messages import Alive, Birth, BlobNotFound, BlobRequest, Death, Hello, UploadResult
from fedprune.wire.queues import ConnectionDown, ConnectionUp
from fedprune.wire.rejected_messages import RejectedMessageLog
from fedprune.wire.topics import NO_JOB
from fedprune_server.devices.pace_steering import Demand, PaceSteering
from fedprune_server.devices.presence import Presence
from fedprune_server.devices.quarantine import STRANGERS, Quarantined, Released
from fedprune_server.devices.shutdown import FLUSH_S, GracefulShutdown
from fedprune_server.engine.device_scheduler import DeviceScheduler, SingleJobScheduler
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.message_handler import Envelope
from fedprune_server.messaging import transport
from fedprune_server.messaging.broker.embedded import BrokerSupervisor, EmbeddedBroker
from fedprune_server.observation.observer import LoopBlocked, Observer, Observers, ServerEnding, TurnEvent
from fedprune_server.observation.snapshot import FleetSnapshot, LazyMapping

log = logging.getLogger("fedprune.server")

_TICK_INTERVAL_S = 0.5
_GREETING_INTERVAL_S = 24 * 3600.0

# Seconds between two requests to announce itself, sent to a device that counts as offline but sends messages: its
# birth takes a moment to come, and each message before it would otherwise cause another request.
_BIRTH_REQUEST_INTERVAL_S = 10.0

_MAX_LOGGED_NAMES = 10

# Seconds for which a server that is to end still waits for its database or a lock: enough for another process's
# ordinary transaction, and half of the 10 s after which Docker kills it (systemd and Kubernetes wait longer).
_STOP_PATIENCE_S = 5.0


class Server:
    """Runs jobs over one connection. Raises `ConfigError` if two jobs have one name.

    Args:
        runners: The runners of the jobs, whose names differ. The first one also handles messages that concern no job,
            such as those about releases and crashes.
        broker: The embedded broker, if there is one; it is restarted if it dies.
        stopping: Ends the loop when set, from any thread.
        connected_target: Number of boards that are connected on average; 0 to keep all connected.
        observers: Observers that see every job after each turn.
    """

    def __init__(
        self,
        runners: Sequence[JobRunner],
        site: transport.SiteLink,
        broker: EmbeddedBroker | None = None,
        stopping: threading.Event | None = None,
        connected_target: int = 0,
        observers: Sequence[Observer] = (),
    ) -> None:
        self.runners = {runner.job.name: runner for runner in runners}
        if len(self.runners) != len(runners):
            names = [runner.job.name for runner in runners]
            raise ConfigError("jobs of one server", expected="names that differ", got=", ".join(names))
        self.main_runner = runners[0]
        self._site, self._link, self._topics = site, site.link, site.topics
        self._observers = Observers(observers, site.monotonic)
        self._supervisor = BrokerSupervisor(broker)
        self._stopping = stopping or threading.Event()
        self._complaints = RejectedMessageLog(log, site.monotonic)
        self._connected: dict[str, Birth] = {}
        self._presence = Presence(self._session_of)
        known_boards = self.main_runner.registry.names
        self._steering = PaceSteering(connected_target, self.main_runner.job.seed, known_boards, site.monotonic())
        self._has_several_jobs = len(runners) > 1
        self._scheduler: DeviceScheduler | SingleJobScheduler = (
            DeviceScheduler(self.runners, self._connected)
            if self._has_several_jobs
            else SingleJobScheduler(self.main_runner, self._connected)
        )
        self._next_greeting_at = self._last_tick_at = 0.0
        self._next_birth_request_at: dict[str, float] = {}
        self._needs_assignment = True
        self._shutdown: GracefulShutdown | None = None
        self._stop_waiting_at: float | None = None
        site.quarantine.add_known(self.main_runner.registry.traffic)

    @property
    def is_finished(self) -> bool:
        """Whether all jobs are done; one that is paused is not."""
        return all(runner.is_finished for runner in self.runners.values())

    @property
    def is_busy(self) -> bool:
        """Whether something is under way that doesn't wait for devices or time."""
        return any(runner.is_busy for runner in self.runners.values())

    @property
    def connected(self) -> Collection[str]:
        """The connected boards of all jobs."""
        return self._connected.keys()

    def stop(self) -> None:
        """End the loop soon; may be called from a signal handler or another thread."""
        self._stopping.set()

    def run(self, *, until_finished: bool = False) -> None:
        """Run until `stop` is called or, with `until_finished`, until all jobs are done and devices know it.

        Every job's state on the disk is that of its last complete transaction. Raises `FedpruneError` if a command of a
        job failed for another reason than a device's update, or if the disk fails.
        """
        with wait_hook(self._on_wait):
            try:
                for runner in self.runners.values():
                    runner.open()
                self._last_tick_at = self._site.monotonic()
                while not self._stopping.is_set():
                    self._turn()
                    if until_finished and self.is_finished and not self._is_computing():
                        # Keep turning until the last messages are sent and devices that reconnect know that the jobs
                        # are finished.
                        shutdown = self._shutdown or self._begin_shutdown()
                        while not self._stopping.is_set() and not shutdown.is_over(self._site.monotonic()):
                            self._turn()
                        self._link.flush(FLUSH_S)
                        break
            finally:
                try:
                    self._supervisor.close()
                    for runner in self.runners.values():
                        runner.close()
                finally:
                    self._show_observers(ServerEnding())

    def _on_wait(self) -> None:
        """Show observers that the loop is alive while it waits. Raises `BusyError` if the server is to end."""
        self._show_observers(LoopBlocked())
        if not self._stopping.is_set():
            return
        now = self._site.monotonic()
        if self._stop_waiting_at is None:
            self._stop_waiting_at = now + _STOP_PATIENCE_S
        if now >= self._stop_waiting_at:
            raise BusyError(
                "stopped while the database was locked or away",
                hint="What the last complete transaction holds is kept; devices repeat the rest after the next start.",
            )

    def _is_computing(self) -> bool:
        runners = self.runners.values()
        return any(runner.is_busy for runner in runners) if self._has_several_jobs else self.main_runner.is_computing

    def _turn(self) -> None:
        """Handle the messages that have come, let every job save and act on their events, and assign free devices."""
        clock, runners = self._site.monotonic, self.runners.values()
        item = self._link.get(min(runner.max_wait_s for runner in runners))
        self._site.listening.begin_turn()
        taking_ends_at = clock() + transport.MAX_TURN_S
        for runner in runners:
            runner.begin_turn()
        while item is not None and not self._stopping.is_set():
            if not isinstance(item, transport.DroppedMessage):
                self._take_item(item)
            if clock() > taking_ends_at:
                break
            item = self._link.get()
        if item is None and self._link.connected and self._link.room:
            self._site.listening.note_all_read()
        now = clock()
        if now - self._last_tick_at >= _TICK_INTERVAL_S:
            self._last_tick_at = now
            self._tick(now)
        # The first job's transaction comes first: it stores the epochs of the turn's messages (counts of their signers'
        # starts, by which old messages are refused) before any job stores events of these messages.
        for runner in runners:
            runner.end_turn(messages_wait=item is not None)
        if self._needs_assignment or any(runner.needs_assignment for runner in runners):
            self._needs_assignment = False
            self._share_devices(now)
            for runner in runners:
                runner.needs_assignment = False
        fleet = self.fleet_snapshot()
        self._observers.show([(runner.snapshot(fleet), runner.take_events()) for runner in runners])

    def _show_observers(self, what: LoopBlocked | ServerEnding) -> None:
        """Show observers that the loop waits or ends. Events of a turn that isn't over are shown at its end."""
        fleet, event = self.fleet_snapshot(), TurnEvent(self._site.clock(), what)
        runners, is_over = self.runners.values(), isinstance(what, ServerEnding)
        snapshots = [
            (runner.snapshot(fleet), [*(runner.take_events() if is_over else ()), event]) for runner in runners
        ]
        self._observers.show(snapshots, at_once=True)

    def fleet_snapshot(self) -> FleetSnapshot:
        """A snapshot of the facts that all jobs share."""
        quarantine = self._site.quarantine
        return FleetSnapshot(
            broker_connected=self._link.connected,
            connected_devices=self.connected,
            job_of_device=LazyMapping(self._scheduler.assignments),
            quarantines=LazyMapping(quarantine.sentences),
            flooding_client=quarantine.join_flood.flooding_client(),
            has_several_jobs=self._has_several_jobs,
        )

    # Incoming messages and events.

    def _take_item(self, item: transport.Item) -> None:
        """Handle a message, or an event of the connection or about a device."""
        now = self._site.monotonic()
        match item:
            case (str(topic), bytes(payload)):
                self._receive(topic, payload)
            case ConnectionUp():
                log.info("connected to the broker")
                self._greet(now)
                # Boards that have lost the broker, too, come back one after the other.
                expected_at = self._site.listening() + self._steering.spread_s
                self._presence.on_broker_connect(expected_at, self._connected)
                for runner in self.runners.values():
                    runner.on_connection_change(True)
            case ConnectionDown():
                log.warning("connection to the broker lost: %s", item.reason)
                self._presence.on_broker_loss()
                for runner in self.runners.values():
                    runner.on_connection_change(False)
            case transport.DeviceRevoked():
                for runner in self.runners.values():
                    runner.remove_member(item.device)
                self._on_disconnect(item.device)
            case Quarantined():
                for runner in self.runners.values():
                    runner.drop_part(
                        item.device, Failure(FailureKind.QUARANTINED, f"it is in quarantine: {item.reason}")
                    )
                self._on_disconnect(item.device)
            case Released():
                self._request_birth(item.device)
            case transport.DuplicateIdentity():
                self.main_runner.registry.clones.note_shared_key(item.device, now)

    def _receive(self, topic: str, payload: bytes) -> None:
        """Decode a message and pass it on. An invalid one is dropped, and logged the first few times."""
        try:
            device, job, channel = self._topics.parse(topic)
        except ProtocolError as error:
            self._complaints.note_rejection(topic, error)
            return
        with log_context(device=device):
            try:
                envelope = Envelope.decode(device, job, channel, payload)
            except ProtocolError as error:
                self.main_runner.registry.count_received(device, len(payload))
                self._reject(topic, device, error)
                return
            try:
                self._pass_on(envelope)
            except ProtocolError as error:
                self._reject(topic, device, error)

    def _reject(self, topic: str, device: str, error: ProtocolError) -> None:
        self._complaints.note_rejection(topic, error, device if self.main_runner.registry.is_admitted(device) else "")
        # A board of a newer version may send messages of kinds that this server doesn't know.
        if not isinstance(error, UnknownMessageError):
            # Chunks are not signed: anyone may have sent one.
            self._site.quarantine.charge_invalid(STRANGERS if topic.endswith("/blob") else device)

    def _pass_on(self, envelope: Envelope) -> None:
        """Note the sign of life in a message, and pass the message on to the jobs that it concerns."""
        device, body = envelope.device, envelope.body
        if isinstance(body, (Alive, Birth)):
            self.main_runner.registry.count_received(device, envelope.size)
            for runner in self.runners.values():
                if runner is not self.main_runner:
                    runner.registry.note_message(device)
        elif isinstance(body, Death):  # the broker sends it, so it is no sign of life
            self.main_runner.registry.count_traffic(device, 0, envelope.size)
        if isinstance(body, Birth):
            self._on_birth(body, envelope.size)
        elif isinstance(body, Death):
            previous_birth = self._connected.get(device)
            if previous_birth is not None and previous_birth.session == body.session:
                self._on_disconnect(device)
                self._request_birth(device)  # the will is of one connection, and the device may have opened another one
        else:
            if device in self._connected:
                self._presence.note_message(device, self._site.listening())
            elif isinstance(body, Alive) or any(device in runner.state.devices for runner in self.runners.values()):
                # A birth that was lost between two brokers of a cluster isn't repeated by itself.
                self._request_birth(device)
            if not isinstance(body, Alive):
                for runner in self._runners_for(envelope):
                    runner.receive(envelope)

    def _runners_for(self, envelope: Envelope) -> list[JobRunner]:
        """Runners of the jobs that a message or chunk may concern."""
        body, device = envelope.body, envelope.device
        named_runner = self.runners.get(getattr(body, "job", envelope.job))
        if not self._has_several_jobs or named_runner is not None:
            return [named_runner or self.main_runner]
        if isinstance(body, (Chunk, BlobNotFound, UploadResult)):
            return list(self.runners.values())  # they name no job; each runner knows which blobs it awaits
        if isinstance(body, BlobRequest) and envelope.job == NO_JOB:
            owners = (runner for runner in self.runners.values() if runner.offers_blob(device, body.sha256))
            return [next(owners, self.main_runner)]
        return [self.main_runner]

    # Connected devices.

    def _session_of(self, device: str) -> int | None:
        birth = self._connected.get(device)
        return None if birth is None else birth.session

    def _on_birth(self, birth: Birth, size: int) -> None:
        """Handle a device's birth: admit the device, and have it assigned to a job."""
        device, previous_birth = birth.device, self._connected.get(birth.device)
        if birth.trouble is not None and previous_birth is not None and birth.session < previous_birth.session:
            return  # of an earlier start of the board, delivered late
        for runner in self.runners.values():
            runner.readmit(device)
        if birth.trouble is not None:
            self._site.quarantine.charge_birth(device)
            self._on_disconnect(device)  # of an earlier connection, if its will hasn't come yet
            self.main_runner.exclude_device(birth, size)
            return
        self.main_runner.on_birth(birth, size, connected=previous_birth is not None)
        self._site.quarantine.charge_birth(device)
        if previous_birth is not None and birth.session < previous_birth.session:
            return  # of an earlier connection, delivered late
        self._connected[device] = birth
        self._presence.note_message(device, self._site.listening())
        self._steering.on_connect(device, self._site.monotonic(), able=RECONNECT_ABILITY in birth.abilities)
        # Every birth is answered, so that a board which then waits for work knows that it was heard.
        self.main_runner.outbox.send(device, Reconnect(self._steering.spread_s))
        self._needs_assignment = True
        if birth.held:
            self.runners.get(birth.held["job"], self.main_runner).cancel_part(device, birth.held)
        if self._shutdown is not None and self._has_several_jobs:
            for runner in self.runners.values():
                runner.send_finished([device])
        else:
            self._scheduler.on_connect(
                birth.device, reconnected=previous_birth is None or previous_birth.session != birth.session
            )
            # The only job keeps the probe itself; without it, the births of ten thousand devices take far less memory.
            # Several jobs need it when they assign the device again.
            if isinstance(self._scheduler, SingleJobScheduler):
                self._connected[birth.device] = replace(birth, probe=None)

    def _on_disconnect(self, device: str) -> None:
        """Note that a device has disconnected, by its will, its silence or an operator's decision."""
        self._presence.forget(device)
        birth = self._connected.pop(device, None)
        self._needs_assignment = True
        if birth is not None:
            self._steering.on_disconnect(device, self._site.monotonic())
            self._scheduler.on_disconnect(device, birth.session)

    def _request_birth(self, device: str) -> None:
        """Ask a device to announce itself, if it is connected."""
        now = self._site.monotonic()
        if now >= self._next_birth_request_at.get(device, now):
            self._next_birth_request_at[device] = now + _BIRTH_REQUEST_INTERVAL_S
            self.main_runner.outbox.send(device, Hello(int(self._site.clock())))

    def _greet(self, now: float) -> None:
        self._next_greeting_at = now + _GREETING_INTERVAL_S
        self.main_runner.outbox.broadcast(Hello(int(self._site.clock())))

    def _tick(self, now: float) -> None:
        """Do the work that is due twice a second: look for silent devices, steer connections, greet."""
        self._supervisor.tick()
        for device in self._presence.take_silent(self._site.listening()):
            self.main_runner.outbox.send(device, Hello(int(self._site.clock())))
        if missing := self._presence.take_gone(self._site.listening()):
            rest = " ..." if len(missing) > _MAX_LOGGED_NAMES else ""
            names = ", ".join(sorted(missing)[:_MAX_LOGGED_NAMES]) + rest
            log.info("%d devices don't answer and are taken for gone: %s", len(missing), names)
        for device in missing:
            self._on_disconnect(device)
        self._steer(now)
        self._site.quarantine.save()
        if self._link.connected and now >= self._next_greeting_at:
            self._greet(now)

    def _steer(self, now: float) -> None:
        """Send away boards that have no part, for a time; they count as disconnected at once."""
        if not self._link.connected:
            return
        for device in self._steering.take_spread_recipients():
            self.main_runner.outbox.send(device, Reconnect(self._steering.spread_s))
        runners = [runner for runner in self.runners.values() if not runner.is_finished]
        demand = Demand(
            sum(runner.job.devices for runner in runners),
            max((runner.job.deadline_s for runner in runners), default=self.main_runner.job.deadline_s),
            waiting=any(runner.state.phase is Phase.WAITING and not runner.state.paused for runner in runners),
        )

        def has_work(device: str) -> bool:
            return any(runner.demand.awaits_part_of(device) for runner in self.runners.values())

        for device, away_s in self._steering.choose_leaving(now, self._site.clock(), demand, has_work):
            self.main_runner.outbox.send(device, Reconnect(self._steering.spread_s, away_s))
            self._on_disconnect(device)

    # Assignment of devices to jobs, and the end.

    def _share_devices(self, now: float) -> None:
        """Share devices among the jobs; once all are finished, begin the end."""
        self._scheduler.share_devices(now, finished=self.is_finished)
        if self.is_finished and self._shutdown is None:
            self._shutdown = self._begin_shutdown()
            for runner in self.runners.values():
                runner.send_finished(self._connected.keys())

    def _begin_shutdown(self) -> GracefulShutdown:
        """Wait for all devices that have announced themselves, except those that are excluded from every job."""
        runners = self.runners.values()
        known_devices = self.main_runner.registry.names.union(*(runner.state.devices for runner in runners))
        absent_devices = known_devices - self._connected.keys()
        absent = (name for name in absent_devices if not all(runner.registry.is_excluded(name) for runner in runners))
        return GracefulShutdown(self._connected, absent, self._connected.__contains__, self._site.monotonic())
