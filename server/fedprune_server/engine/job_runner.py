"""Runs one job of a server: a coordinator with its database, its blobs and a thread for heavy commands.

A turn of the server's loop is one transaction of each job: events are handled and saved, then their commands are
carried out and messages sent. Heavy commands go to a thread; their results are events, too. A message, a connection or
a process may be lost: devices repeat their updates, the server its offers. A *part* is a device's participation in a
round, a *birth* its announcement of itself after it has connected.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprune.coordination import Phase, make_coordinator
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import Failure, FailureKind
from fedprune.jobs.schedule import SYNCHRONOUS_SCHEDULE
from fedprune.output.log_lines import log_context
from fedprune.strategies import compose
from fedprune.wire.blob_sender import BlobSender
from fedprune.wire.messages import PUT_ABILITY, Birth, Finished
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.engine.command_dispatcher import CommandDispatcher, DeviceTraffic
from fedprune_server.engine.device_demand import DeviceDemand
from fedprune_server.engine.journal import Journal
from fedprune_server.engine.message_handler import Envelope, MessageHandler
from fedprune_server.engine.runnable_job import NO_SERVICES, DeviceServices, RunnableJob
from fedprune_server.engine.secure_sums import MaskedChannel
from fedprune_server.engine.snapshots import SnapshotMaker
from fedprune_server.engine.update_channel import UpdateChannel
from fedprune_server.executor import divergence
from fedprune_server.executor.background import BackgroundExecutor
from fedprune_server.executor.retention import BlobCollector
from fedprune_server.messaging.outbox import Outbox
from fedprune_server.messaging.transport import SiteLink, SteadyClock
from fedprune_server.observation.observer import DevicesChanged, RoundEnded, TurnEnded, TurnEvent, TurnSaved
from fedprune_server.observation.snapshot import FleetSnapshot, JobSnapshot
from fedprune_server.ota.coordinator import RolloutCoordinator
from fedprune_server.transfer.downloads import Downloads
from fedprune_server.transfer.s3_sync import BucketSync
from fedprune_server.transfer.served_job import ServedJob
from fedprune_server.transfer.uploads import Uploads

log = logging.getLogger("fedprune.server")

# Phases without a deadline, in which the job's clock may follow the system's. Asynchronous jobs have deadlines in the
# last two: parts of earlier models are under way while another one is scored or evaluated.
_PHASES_WITHOUT_DEADLINE = (Phase.WAITING, Phase.FINISHED, Phase.SCORING, Phase.EVALUATING)

_TICK_INTERVAL_S = 0.5

# Results of heavy commands that a turn handles. Each offer of a large round is a result, and takes about 0.3 ms to save
# and send: so messages that come while 10,000 offers are made wait for a hundred of them, not for all.
_MAX_RESULTS_PER_TURN = 100

# The same limit while messages wait: boards request their files as soon as they have an offer, and the messages of
# other boards would wait behind these requests.
_MAX_RESULTS_WHILE_MESSAGES_WAIT = 10


class JobRunner:
    """Runs a job on the devices that the server assigns to it, at most `max_devices` in all. `profiles` are folders of
    hardware profiles in addition to the shipped ones."""

    def __init__(
        self,
        job: RunnableJob,
        site: SiteLink,
        services: DeviceServices = NO_SERVICES,
        *,
        profiles: Sequence[Path] = (),
        max_devices: int = 1000,
    ) -> None:
        self.job, self.state = job.job, job.state
        self._monotonic = site.monotonic
        # No board's deadline passes while the server stands still.
        self._steady_clock = SteadyClock(site.clock, lambda: site.monotonic() - site.listening.lost_s)
        self._logged_grants = ""
        self._coordinator = make_coordinator(job.job, job.architecture, job.state, job.frozen)
        self._schedule = compose(job.job).schedule or SYNCHRONOUS_SCHEDULE
        with log_context(job=job.job.name):
            self._executor = BackgroundExecutor(job.worker)
        self.registry = DeviceRegistry(
            job.job, job.architecture, job.state, job.storage.traffic(), max_devices, job.storage.unplanned_devices(),
            site.clock, site.listening, prefix=job.prefix,
        )  # fmt: skip
        self._bucket_sync = BucketSync(job.store)
        self._make_transfers(job, site, services)
        traffic = DeviceTraffic(job.job, job.state, self.registry, self._uploads, self.outbox, site.monotonic)
        self._channel = MaskedChannel(traffic, job.store) if job.job.secure_aggregation else UpdateChannel(traffic)
        self.demand = DeviceDemand(job.job, job.state, self._schedule, self._channel, job.weight)
        self._messages = MessageHandler(
            traffic, self._channel, site.quarantine, profiles, self._rollouts, services.crashes
        )
        self._dispatcher = CommandDispatcher(traffic, self._channel.awaits_upload, services.blobs.url)
        self._database = job.storage.database
        collector = BlobCollector(job.store, job.keep, job.job.recipe.judged_by)
        self._journal = Journal(job.state, job.storage, collector, self.registry, self._dispatcher, site.monotonic)
        self._phases_without_deadline = _PHASES_WITHOUT_DEADLINE[: 2 if self._schedule.asynchronous else None]
        self._alarms: list[float] = []
        self._unsaved_events: list[on.Event] = []
        self._pending_commands: list[do.Command] = []
        self._now, self._turn_started_at, self._last_tick_at = self._steady_clock(), site.monotonic(), 0.0
        self.is_finished = False
        self.needs_assignment = True  # whether an event has happened since the server assigned devices
        self._observer_events: list[TurnEvent] = []
        self.architecture = self._coordinator.architecture
        self._snapshots = SnapshotMaker(
            job.job, job.state, self.registry, self._uploads, self._executor, self.outbox,
            schedule=self._schedule, clock=self._steady_clock, members=services.members,
        )  # fmt: skip

    def _make_transfers(self, job: RunnableJob, site: SiteLink, services: DeviceServices) -> None:
        """Make the parts that exchange blobs and messages with devices."""
        # The blobs that are available without waiting for a bucket. Only these are served over HTTP; others come over
        # MQTT, because requests that wait for a bucket that can't be used would take all connections.
        self.store = self._bucket_sync.local_store
        upload_place = services.blobs.uploads(self._bucket_sync)
        self._uploads = Uploads(self._bucket_sync, job.pulls, site.max_packet, upload_place)
        self.served_job = ServedJob(self.store, self.may_fetch, upload_place, job.pulls)
        rollouts, self._rollouts = services.rollouts, None
        stores = [self.store] if rollouts is None else [self.store, rollouts.blobs]
        downloads = Downloads(BlobSender(*stores), site.max_packet)
        self.outbox = Outbox(site, self.registry, downloads, self._bucket_sync.is_coming)
        if rollouts is not None:
            send = self.outbox.send
            self._rollouts = RolloutCoordinator(rollouts, send, services.members, site.clock, site.monotonic)

    # The loop's turn.

    @property
    def is_busy(self) -> bool:
        """Whether something is under way that waits neither for devices nor for a deadline."""
        return self.is_computing or bool(self._unsaved_events) or self.outbox.has_unsent or self._bucket_sync.has_work

    @property
    def is_computing(self) -> bool:
        """Whether a heavy command is under way, such as a last evaluation."""
        return self._executor.is_busy or self._channel.is_computing

    @property
    def max_wait_s(self) -> float:
        """Seconds for which the next turn may wait for a message."""
        if self.outbox.can_send_chunk or self._unsaved_events or self._executor.has_result:
            return 0.0
        max_wait_s = 0.01 if self.is_computing or self.outbox.has_unsent or self._bucket_sync.has_work else 0.1
        # While the bucket is away no deadline counts (`end_turn`); one that has passed would keep the loop spinning.
        if not self._alarms or self._bucket_sync.is_stuck:
            return max_wait_s
        return max(0.0, min(max_wait_s, self._alarms[0] - self._steady_clock()))

    def open(self) -> None:
        """Begin the first transaction: the coordinator resumes from the saved state."""
        self._last_tick_at = self._monotonic()
        self._begin_transaction()
        self._bucket_sync.prefetch(self.state.references())
        self._handle(on.Resumed())
        self._commit()

    def begin_turn(self) -> None:
        self._turn_started_at = self._monotonic()
        self._begin_transaction()

    def receive(self, envelope: Envelope) -> None:
        """Handle a device's message or chunk. Raises `ProtocolError` if devices must not send this kind of message, and
        `StorageError` if the disk fails."""
        with self._log_context(envelope.device):
            event = self._messages.receive(envelope)
            self._collect_uploads()
            if event is not None:
                self._handle(event)

    def end_turn(self, *, messages_wait: bool = False) -> None:
        """Save the events of the turn, and only then carry out their commands. Raises `FedpruneError` if a heavy
        command failed for another reason than a device's update, or if the disk fails."""
        with self._log_context():
            # Take in updates that were uploaded over HTTP.
            for device, size in self._uploads.take_byte_counts().items():
                self.registry.count_received(device, size)
            self.outbox.send_requests(self._uploads.collect(self._monotonic()))
            self._collect_uploads()
            for _ in range(_MAX_RESULTS_WHILE_MESSAGES_WAIT if messages_wait else _MAX_RESULTS_PER_TURN):
                if (result := self._executor.collect()) is None:
                    break
                self._handle(result)
            if (ready := self._channel.take_sums(self._monotonic())) is not None:
                self._handle(ready)
            if self._monotonic() - self._last_tick_at >= _TICK_INTERVAL_S:
                self._last_tick_at = self._monotonic()
                self._tick(self._last_tick_at)
            # While the bucket is away, updates would miss the deadline only because of that.
            if not self._bucket_sync.is_stuck and self._take_due_alarms():
                self._handle(on.Ticked())
            self._commit()
            self.outbox.send_chunks()
            self._note_event(TurnEnded(self._monotonic() - self._turn_started_at))

    def close(self) -> None:
        """Stop. The next process does again what is not saved."""
        self._bucket_sync.close()
        self._executor.close()
        self._channel.close()

    def pause(self, paused: bool) -> bool:
        """Pause the job, so that it begins nothing new, or continue it; the state keeps it. Call it from the loop's
        thread. Returns False if that changes nothing."""
        if self.state.paused is paused:
            return False
        self._begin_transaction()
        self._handle(on.Paused(paused))
        return True

    def on_connection_change(self, up: bool) -> None:
        """Note that the connection to the broker is up, or lost. Raises `StorageError` if the disk fails or is full."""
        if up:
            self._uploads.on_reconnect(self._monotonic())
        if self._rollouts is not None:
            self._rollouts.on_connection_change(up)

    def _log_context(self, device: str | None = None) -> AbstractContextManager[None]:
        return log_context(job=self.job.name, round=self.state.round, device=device)

    # Devices.

    def on_birth(self, birth: Birth, size: int, *, connected: bool) -> None:
        """Handle the part of a device's birth that concerns no job: admission, signs of a clone, rollouts. `connected`
        says whether the device was connected before. Raises `ProtocolError` if the fleet has as many devices as it may
        have."""
        self.registry.admit(birth.device, one_line(birth.software), size)
        self.registry.note_start(birth.device)
        self._messages.note_warnings(birth)
        profile = one_line(birth.profile, 64)
        self.registry.note_birth(
            birth.device, birth.session, profile, birth.samples, self._monotonic(), connected=connected
        )
        self.registry.note_temperature(birth.device, (birth.probe or {}).get("temperature_c"))
        if self._rollouts is not None:
            self._rollouts.on_birth(birth.device)

    def exclude_device(self, birth: Birth, size: int) -> None:
        """Note a device that reports why it can't start. Raises `ProtocolError` as `on_birth`."""
        self.registry.admit(birth.device, one_line(birth.software), size)
        problem = f"it can't start: {one_line(birth.trouble or '')}"
        self.registry.exclude(
            birth.device, problem, one_line(birth.profile, 64), birth.samples, cannot_start=True
        )  # fmt: skip

    def assign(self, births: Iterable[Birth]) -> set[str]:
        """Assign devices to the job, all in one transaction; the coordinator decides which of them get work. Returns
        the names of the devices that can take part."""
        self._begin_transaction()
        events = []
        for birth in births:
            if not self._admit(birth):
                continue
            with self._log_context(birth.device):
                event = self._messages.birth_event(birth)
            events += [event] if event is not None else []
        self._collect_uploads()
        for event in events:
            with self._log_context(event.device):
                # The coordinator begins a round after the last of them, so that it asks all who have come.
                self._handle(replace(event, is_last_of_batch=event is events[-1]))
                self.registry.introduce(event.device)
        return {event.device for event in events if not self.state.devices[event.device].excluded}

    def _admit(self, birth: Birth) -> bool:
        """Admit a connected device to the job, and continue its upload; returns whether it may take part."""
        try:
            self.registry.admit(birth.device, one_line(birth.software), 0)
        except ProtocolError as error:
            log.warning("%s%s", self.registry.prefix, error)
            return False
        birth_values = birth.device, birth.session, birth.answer_s or 0.0, self._monotonic()
        with self._log_context(birth.device):
            self.outbox.send_requests(self._uploads.on_birth(*birth_values, can_upload=PUT_ABILITY in birth.abilities))
        return True

    def unassign(self, device: str, session: int) -> None:
        """Take a device away from the job, because its connection `session` has ended or it works for another job."""
        self._begin_transaction()
        event = self._messages.on_disconnect(device, session)
        device_state = self.state.devices.get(device)
        if device_state is not None and device_state.online:
            if device_state.session == session and self.demand.awaits_part_of(device):
                round_number = self.state.round_of(self.state.tasks[device])
                log.info(
                    "%sdevice %s disconnected while it worked on round %d", self.registry.prefix, device, round_number
                )
            self._handle(event)

    def drop_part(self, device: str, failure: Failure) -> None:
        """End a device's part in the round, because the server no longer listens to the device."""
        self._begin_transaction()
        for event in self._messages.removal_events(device, failure):
            self._handle(event)

    def remove_member(self, device: str) -> None:
        """Forget a device that is no longer a member."""
        if self._rollouts is not None:
            self._rollouts.drop_boards([device])
        log.warning("%sdevice %s was revoked", self.registry.prefix, device)
        self.registry.clones.forget(device)
        self._dispatcher.revoked.add(device)
        self.drop_part(device, Failure(FailureKind.REVOKED, "it was revoked"))

    def readmit(self, device: str) -> None:
        """Note that a device has announced itself: if it was revoked, it is a member again."""
        self._dispatcher.revoked.discard(device)

    def cancel_part(self, device: str, part_fields: Mapping[str, Any]) -> None:
        """Cancel the part of a round that a device holds, if it can no longer count."""
        self._messages.cancel_outdated_part(device, **part_fields)

    def send_finished(self, devices: Iterable[str]) -> None:
        for device in devices:
            self.outbox.send(device, Finished(self.job.name), self.job.name)

    def offered_digests(self, device: str) -> frozenset[str]:
        """Digests that a device's offer names; may be called from any thread."""
        return self._messages.offered_digests(device)

    def may_fetch(self, device: str | None, sha256: str) -> bool:
        """Whether a device may fetch a blob of its offer; for None, whether any device may. Called from any thread."""
        devices = list(self.state.tasks) if device is None else [device]
        return any(sha256 in self.offered_digests(name) for name in devices)

    def offers_blob(self, device: str, sha256: str) -> bool:
        """Whether a device may fetch a blob, for its part in this job or as a release."""
        return sha256 in self._messages.fetchable_digests(device)

    # For observers.

    def snapshot(self, fleet: FleetSnapshot) -> JobSnapshot:
        return self._snapshots.snapshot(fleet)

    def take_events(self) -> list[TurnEvent]:
        """The events since the last call."""
        events, self._observer_events = self._observer_events, []
        return events

    def _note_event(self, what: on.Event | do.Command | DevicesChanged | TurnSaved | RoundEnded | TurnEnded) -> None:
        self._observer_events.append(TurnEvent(self._now, what))

    # Events and commands.

    def _begin_transaction(self) -> None:
        """Begin a transaction: all its events happen at one time."""
        if self._unsaved_events:
            return
        if self.state.phase in self._phases_without_deadline and abs(moved_s := self._steady_clock.follow()) > 1.0:
            self.state.shift_deadlines(moved_s)
            heapq.heappush(self._alarms, self._steady_clock())
        self._now = self._steady_clock()

    def _handle(self, event: on.Event) -> None:
        """Let the coordinator handle an event; the end of the turn saves it and carries out its commands."""
        if isinstance(event, on.Closed):
            event = replace(event, spent_bytes=sum(self.registry.total_traffic))
        self._pending_commands += self._coordinator.handle(event, self._now)
        self._unsaved_events.append(event)
        self.needs_assignment = True
        self._note_event(event)
        self._messages.report_to_quarantine(event)
        self._journal.note_event(event)
        if isinstance(event, on.Folded):
            self.registry.plan_log.warn_of_doubt(event.device, self.state.devices[event.device])
        elif isinstance(event, on.UpdateRejected):
            kinds = [task.kind for task in self.state.tasks.values()]
            divergence.warn_of_rejection(event, self.job, self.registry.prefix, kinds)

    def _collect_uploads(self) -> None:
        for event in self._dispatcher.collect_uploads():
            if not self._channel.take_upload(event):
                self._handle(event)

    def _commit(self) -> None:
        """End the transaction: save its events, then carry out their commands, which may lead to further events."""
        while self._unsaved_events:
            events, self._unsaved_events = self._unsaved_events, []
            commands, self._pending_commands = self._pending_commands, []
            self._save(events)
            self._carry_out(commands)
        # The epochs that messages have begun (counts of their signers' starts, by which old messages are refused) are
        # saved before any answer leaves, even if no event was saved with them.
        self._database.flush()
        self.outbox.deliver()

    def _save(self, events: Sequence[on.Event]) -> None:
        if changed := self.state.devices.changed | self.state.tasks.changed:
            self._note_event(DevicesChanged(frozenset(changed)))
            self.demand.note_changes(changed)
        seconds = self._journal.save(events, self._now)
        if seconds is not None:
            self._note_event(TurnSaved(seconds))
        for summary in self._journal.take_finished_rounds():
            # A copy: the state drops the devices' parts of earlier rounds.
            unreached = self.registry.unreached(summary["round"], summary["devices"])
            self._note_event(RoundEnded(dict(summary), *self.registry.total_traffic, unreached))

    def _carry_out(self, commands: list[do.Command]) -> None:
        """Carry out commands whose events are saved. Heavy ones are only handed to the executor's thread."""
        self._executor.expect(commands)
        for command in commands:
            # A finished job's coordinator may order `Finish` again; observers see it once.
            if not isinstance(command, do.Finish) or not self.is_finished:
                self._note_event(command)
            match command:
                case do.WakeAt():
                    heapq.heappush(self._alarms, command.at)
                case do.Finish():
                    if not self.is_finished:
                        self.is_finished = self.needs_assignment = True
                        reason_text = f"; it {command.reason}" if command.reason else ""
                        log.info("job %s is finished: global model %s%s", self.job.name, command.model, reason_text)
                case do.SumMasked():
                    self._channel.begin_sums(command)
                case do.Score():
                    # Log which parts of the model boards train, if they differ from those of the round before.
                    description = self._coordinator.grants.describe()
                    if description and description != self._logged_grants:
                        log.info("%sround %d: %s", self.registry.prefix, command.round, description)
                    self._logged_grants = description
                    self._executor.submit(command)
                case do.Extract() | do.FoldUpdate() | do.Close() | do.Evaluate():
                    self._executor.submit(command)
                case _:
                    for event in self._dispatcher.run(command):
                        self._handle(event)

    # Time.

    def _take_due_alarms(self) -> bool:
        """Remove the alarms of the coordinator whose time has come; returns whether there were any."""
        due = False
        while self._alarms and self._alarms[0] <= self._now:
            heapq.heappop(self._alarms)
            due = True
        return due

    def _tick(self, now: float) -> None:
        """Do the work that is due twice a second: repeat offers and requests, save what may wait."""
        self._journal.save_unplanned_devices()
        for device, size in self.served_job.take_sent_bytes().items():
            self.registry.count_sent(device, size)
        if self._rollouts is not None:
            self._rollouts.tick()
        self.registry.clones.expire(now)
        # Crashes are stored in a file of their own, not in a job's transaction: so the epochs of their messages are
        # saved before the crashes are acknowledged.
        self._database.flush()
        self._messages.save_crashes()
        for event in self._dispatcher.repeat_offers():
            self._handle(event)
        self.outbox.send_requests(self._uploads.on_tick(now))
        self._collect_uploads()
