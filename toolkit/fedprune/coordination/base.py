"""The base class of the synchronous and the asynchronous coordinator, which decide what happens next in a job.

`handle` takes an event and the time, and returns the commands that follow. Here: which method an event goes to, devices
that come and go, and single *parts* (a part is a device's participation in a round). The subclasses decide when rounds
begin and close.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.grants import Grants
from fedprune.coordination.job_end import EPSILON_NEXT, early_end_reason, spent_total_reason
from fedprune.coordination.part_commands import PartCommands
from fedprune.coordination.patience import MAX_FAILURES, ROUND, Patience, answers_of_earlier_connections
from fedprune.coordination.privacy_budget import JobPrivacyBudget
from fedprune.coordination.ready_devices import ReadyDevices
from fedprune.coordination.round_prediction import predict_round
from fedprune.coordination.stragglers import BEFORE_OFFER, DEADLINE_PASSED
from fedprune.coordination.width_planner import PlannedWidths, WidthPlanner
from fedprune.core.errors import ConfigError, FedpruneError
from fedprune.core.metrics import credible_metrics
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import SYNCHRONOUS_SCHEDULE
from fedprune.jobs.state import FAILED, DeviceTask, JobDevice, Phase, Progress, State
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Recipe
from fedprune.planning.correction import Correction
from fedprune.strategies import compose
from fedprune.strategies.allocation import Allocator, Fixed, Fleet
from fedprune.updates.codecs import CODECS

Commands = list[do.Command]

# Progress of parts that show that the fleet is heard.
ANSWERED = (Progress.PULLING, Progress.STORED, Progress.FOLDED)


class Coordinator(ABC):
    """The part of a coordinator that all schedules share.

    `state` is that of a new job, `State(model=digest of the initial weights)`, or where to go on; `frozen` are the
    tensors that the model's author froze. Raises `ConfigError` if the job's strategy or options are wrong, or the job
    began with privacy and would continue without.
    """

    # Whether the server learns only sums of updates, and never a single one.
    is_masked = False

    def __init__(self, job: Job, architecture: Architecture, state: State, frozen: Collection[str] = ()) -> None:
        self.job = job
        self.architecture = architecture
        self.state = state
        self.strategy = compose(job, architecture.sizes)
        self.schedule = self.strategy.schedule or SYNCHRONOUS_SCHEDULE
        self.planner = WidthPlanner(job, self.strategy, architecture, frozen)
        job_allocator = Fixed(job.density) if job.density else PlannedWidths(self.planner)
        self.allocator: Allocator = self.strategy.allocator or job_allocator
        self._frozen = frozen
        ceiling = None if job.ignores_plans else self.planner
        self.fleet = Fleet(job, architecture, state, self.strategy.min_channels, ceiling)
        self.grants = Grants(job, self.strategy, architecture, state, asks_alike=self.is_masked)
        self.part_commands = PartCommands(job, self.strategy, state)
        self.privacy_budget = JobPrivacyBudget(state, job.privacy)
        self._shared_codecs: dict[tuple[str, ...], list[str]] = {}  # as devices share them
        self._ready_devices = ReadyDevices(state, self.privacy_budget.may_be_offered)
        self._patience = Patience(job.deadline_s, state.devices.values())
        if self.strategy.exploration_rounds and self.schedule.asynchronous:
            raise ConfigError(
                f"strategy {self.strategy.name}: rounds of exploration ask all devices at once",
                expected="a synchronous schedule",
                got="an asynchronous one",
            )

    def handle(self, event: on.Event, now: float) -> Commands:
        """Handle one event, and return the commands that follow, in the order in which they should start.

        `now` is the caller's clock, in seconds. Raises `TypeError` if it is no event.
        """
        match event:
            case on.DeviceBorn():
                return self._on_device_born(event, now)
            case on.DeviceDied():
                return self._on_device_died(event)
            case on.Scored():
                state = self.state
                if state.phase is not Phase.SCORING or event.round != state.round:
                    return []
                state.ranking, state.order = event.ranking, event.order
                if event.model:
                    state.model, state.memory = event.model, dict(event.memory)
                return self._begin_parts(now)
            case on.Extracted():
                return self._on_extracted(event, now)
            case on.WorkReported():
                task = self._awaited_task(event, Progress.OFFERED)
                if task is not None and task.offered_at is not None and task.deadline is not None:
                    limit_s = self._patience.working_limit_s(self.state.devices[event.device])
                    task.deadline = max(task.deadline, task.offered_at + limit_s)
                return []
            case on.UpdateAnnounced():
                return self._on_update_announced(event, now)
            case on.UpdateStored():
                return self._on_update_stored(event, now)
            case on.UpdateRejected():
                return self._on_update_rejected(event, now)
            case on.OfferRefused():
                # One whose update is being pulled has lost it, and can't make another.
                task = self._awaited_task(event, Progress.OFFERED) or self._awaited_task(event, Progress.PULLING)
                return self._give_up(task, event, now) + self._take_late_answer(event, now)
            case on.Folded():
                return self._on_folded(event, now)
            case on.Closed():
                # A crash may lose bytes that were counted after the last save: what a round has seen stays spent.
                self.state.spent_bytes = max(self.state.spent_bytes, event.spent_bytes)
                self.state.spent_macs = max(self.state.spent_macs, event.spent_macs)
                return self._on_closed(event, now)
            case on.Evaluated():
                is_awaited = self.state.phase is Phase.EVALUATING and event.round == self.state.round
                return self._end_round(event.metrics, now) if is_awaited else []
            case on.Ticked():
                return [] if self.state.paused else self._on_ticked(event, now)
            case on.Paused():
                return self._on_paused(event, now)
            case on.Resumed():
                return self.resume(now)
        raise TypeError(f"unknown event {type(event).__name__}")

    def resume(self, now: float) -> Commands:
        """Commands after the state was loaded: everything that may have been under way when the last shell ended.

        All devices count as offline until they announce themselves again. Their shares of the model are allocated
        again, since settings may have changed, and deadlines start again. A finished job continues if it has been given
        more rounds.
        """
        state = self.state
        state.drop_incompatible_parts(asynchronous=self.schedule.asynchronous, masked=self.is_masked)
        self._mark_all_offline()
        if state.phase is Phase.FINISHED and not self._is_last_round():
            state.phase = Phase.WAITING
        state.wake_times = []
        state.paused_at = now if state.paused else None
        match state.phase:
            case Phase.CLOSING:
                return [self._close_command()]
            case Phase.EVALUATING:
                return [self._evaluate_command()]
            case Phase.FINISHED:
                return [self._finish_command()]
        return self._resume_round(now)

    @property
    def weighs_uniformly(self) -> bool:
        """Whether devices count alike, whatever their samples: under privacy no board may weigh more than another, and
        in sums weights would tell of single updates."""
        return self.job.privacy.is_on or self.is_masked or self.strategy.aggregator.weighting == "uniform"

    # What a coordinator's rounds are.

    @abstractmethod
    def _begin_parts(self, now: float) -> Commands:
        """Begin the parts of a round whose channels are ranked."""

    @abstractmethod
    def _on_extracted(self, event: on.Extracted, now: float) -> Commands:
        """Offer a part that is ready, and set its deadline or the round's."""

    @abstractmethod
    def _close_command(self) -> do.Command:
        """The command that turns sums into the next model."""

    @abstractmethod
    def _resume_round(self, now: float) -> Commands:
        """Continue after a restart, before a round or while its channels are ranked or its devices train."""

    def _is_late(self, event: on.UpdateAnnounced) -> bool:
        """Whether an update can't count any more, whichever part it is of."""
        return False

    @abstractmethod
    def _on_update_stored(self, event: on.UpdateStored, now: float) -> Commands:
        """Acknowledge an update that is on the disk, so that the device may delete it, and add it while sums are
        open."""

    @abstractmethod
    def _on_update_rejected(self, event: on.UpdateRejected, now: float) -> Commands:
        """Give up the part of a device whose update was pulled or added, but doesn't count."""

    @abstractmethod
    def _continue_round(self, now: float) -> Commands:
        """React to the end of a part, whatever its outcome."""

    @abstractmethod
    def _on_closed(self, event: on.Closed, now: float) -> Commands:
        """Note whose updates are in the next model, and have it evaluated; repeat the round if none is."""

    @abstractmethod
    def _end_round(self, metrics: Mapping[str, float], now: float) -> Commands:
        """Add a round to the history, and begin the next one or finish."""

    @abstractmethod
    def _on_ticked(self, event: on.Ticked, now: float) -> Commands:
        """Give up what is late; where a clock was set back, ask again to be woken."""

    @abstractmethod
    def _begin_pending(self, now: float) -> Commands:
        """Begin what can begin now that the job is resumed or devices have come."""

    # What they have in common.

    def _resume_parts(self, now: float) -> Commands:
        """Commands for parts that were under way."""
        extracting = [n for n, task in sorted(self.state.tasks.items()) if task.progress is Progress.EXTRACTING]
        commands: Commands = [*self.part_commands.extract_commands(extracting)]
        for name, task in sorted(self.state.tasks.items()):
            task.offered_at = None  # on the clock of the shell that has ended
            task.deadline = None if task.deadline is None else now + self.job.deadline_s
            if task.progress is Progress.PULLING and task.update is not None:
                # The announcement will be repeated, too; pulling is resumed from what is on disk.
                commands.append(do.PullUpdate(name, self.state.round_of(task), task.attempt, task.update))
        return commands

    def _on_update_announced(self, event: on.UpdateAnnounced, now: float) -> Commands:
        """Answer a device that has trained: pull its update if it is expected, repeat the earlier answer, or cancel."""
        task, is_late = self.state.tasks.get(event.device), self._is_late(event)
        is_of_round = task is not None and event.round == self.state.round_of(task)
        if task is not None and is_of_round and event.attempt == task.attempt and is_based_on_offer(event, task):
            if task.progress in (Progress.STORED, Progress.FOLDED):
                return [self._settle_announcement(event, task)]
            if task.progress is Progress.REFUSED:
                return self._cancel_late_answer(event, task.reason, now)
            if not is_late:
                return [self._pull_command(event, task, now)]
        if task is not None and is_of_round and task.progress in BEFORE_OFFER:
            return []  # the offer that it gets in a moment says whether this update still counts
        reason = "the round is over" if is_late or task is None else "another offer took this one's place"
        return self._cancel_late_answer(event, reason, now)

    def _send_offer(self, task: DeviceTask, event: on.Extracted, now: float) -> do.SendOffer:
        """Offer a part that is ready, and give it the time that its device may take."""
        self.privacy_budget.count_offer(event.device)
        task.offer, task.progress, task.offered_at = event.offer, Progress.OFFERED, now
        device = self.state.devices[event.device]
        task.deadline = now + self._patience.limit_s(
            device, ROUND, lambda: self._predicted_s(event.device, device, task), training_size(task)
        )
        return do.SendOffer(event.device, event.round, event.attempt, event.offer)

    def _predicted_s(self, name: str, device: JobDevice, task: DeviceTask) -> float | None:
        """Seconds that a round is predicted to take a device; None where nothing is known of its kind."""
        inputs = (self.job, self.strategy, self.architecture, name, device, task.widths, task.density, task.samples)
        correction = Correction(**device.correction)
        try:
            costs = predict_round(*inputs, accumulate=task.accumulate, correction=correction, frozen=self._frozen)
            return costs.round_s + (task.work - 1) * costs.train_s
        except FedpruneError:
            return None

    # Silence.

    def _note_silence(self, name: str, task: DeviceTask, now: float) -> None:
        """Count a wait for a device's answer that was in vain; `task` is the part.

        Until the job's deadline it isn't asked again: another offer would have it drop the work that it may be at.
        """
        device = self.state.devices[name]
        # An update that is announced may wait for its turn to be pulled, which is no fault of the device.
        if not device.online or task.progress is not Progress.OFFERED:
            return
        waited_s = self.job.deadline_s if task.offered_at is None else now - task.offered_at
        if task.offer is not None and waited_s < self.job.deadline_s:
            device.silent_since, device.asked_again_at = task.offered_at, now - waited_s + self.job.deadline_s
            device.silent_offer = [self.state.round_of(task), task.attempt, task.offer["weights"]["sha256"]]
        self._count_silence(device, waited_s, now)

    def _late_command(self, name: str, number: int, task: DeviceTask) -> do.SendOffer | do.Cancel:
        """The end of a part that was awaited too long. Until the job's deadline the device gets its offer once more:
        it may have missed it, or be at work, and its answer shows how long it takes."""
        if self.state.devices[name].silent_since is None or task.offer is None:
            return do.Cancel(name, number, task.attempt, DEADLINE_PASSED)
        return do.SendOffer(name, number, task.attempt, task.offer)

    def _count_silence(self, device: JobDevice, waited_s: float, now: float) -> None:
        self._count_failure(device, FailureKind.LATE, f"no answer to an offer within {waited_s:.3g} s", now)

    def _count_failure(
        self, device: JobDevice, kind: str, reason: str, now: float | None = None, allowed: int = MAX_FAILURES
    ) -> None:
        """Count a failure; exclude the device after `allowed` in a row: where `now` is given, for a time."""
        device.failures += 1
        # The kind is that of the last failure: an operator can act on that one.
        if device.failures >= allowed:
            device.excluded_by = str(FailureKind(kind).value)
            device.excluded = f"{device.failures} rounds in a row without an update that counts, lastly: {reason}"
            device.asked_again_at = None if now is None else now + self._patience.exclusion_s(device)

    def _take_late_answer(self, event: on.UpdateAnnounced | on.OfferRefused, now: float) -> Commands:
        """Ask a silent device again once it answers its offer. The next wait for it is as long as its update took."""
        device, base = self.state.devices.get(event.device), getattr(event, "base", None)
        answer = [event.round, event.attempt] if base is None else [event.round, event.attempt, base]
        if device is None or device.silent_since is None or (device.silent_offer or [])[: len(answer)] != answer:
            return []
        if base is not None and (seconds := now - device.silent_since) < self.job.deadline_s:
            self._patience.note_answer(device, ROUND, seconds)
            device.failures = 0
        device.readmit()
        return self._begin_pending(now)

    def _cancel_late_answer(self, event: on.UpdateAnnounced, reason: str, now: float) -> Commands:
        """Cancel an update that no longer counts."""
        return [do.Cancel(event.device, event.round, event.attempt, reason), *self._take_late_answer(event, now)]

    def _readmit_due_devices(self, now: float) -> None:
        """Ask devices again that were silent, and whose time is over."""
        for name in self._ready_devices.silent_devices():
            if (self.state.devices[name].asked_again_at or 0.0) <= now:
                self.state.devices[name].readmit()

    def _next_readmission(self) -> float | None:
        """When a device is asked again that was silent."""
        names = self._ready_devices.silent_devices()
        return min((self.state.devices[name].asked_again_at or 0.0 for name in names), default=None)

    @property
    def _min_devices(self) -> int:
        """Devices with which a round begins; those that have failed or are silent must not stop the job."""
        devices, wanted = self.state.devices, self.job.devices
        return max(1, min(wanted, max(len(devices), wanted) - devices.count(FAILED)))

    def _on_device_born(self, event: on.DeviceBorn, now: float) -> Commands:
        """Add or renew a device, and give it what it has missed; with enough devices a job begins."""
        former = self.state.devices.get(event.device)
        if not self._admit(event):
            return []
        if self.state.phase is Phase.FINISHED:
            return [do.TellFinished(event.device, self.state.model)]
        commands = self._resume_part(event.device, former)
        return commands + self._begin_pending(now) if event.is_last_of_batch else commands

    def _on_paused(self, event: on.Paused, now: float) -> Commands:
        """Stop the round's clock; when the job is resumed, boards have as much time left as before."""
        state = self.state
        if state.paused is event.paused:
            return []
        paused_s = 0.0 if state.paused_at is None else now - state.paused_at
        state.paused, state.paused_at = event.paused, now if event.paused else None
        if event.paused:
            return []
        state.shift_deadlines(paused_s)
        return [*self._begin_pending(now), *([] if state.deadline is None else [do.WakeAt(state.deadline)])]

    def _on_folded(self, event: on.Folded, now: float) -> Commands:
        task = self._awaited_task(event, Progress.STORED)
        if task is None:
            return []
        task.progress = Progress.FOLDED
        device, offer = self.state.devices[event.device], task.offer or {}
        # Failures count in a row: an update that passes its checks ends the row.
        device.failures = 0
        # The device continues from these channels in its next part, so that their order must be known then.
        if self._is_continued_from(offer):
            weights = offer["weights"]["sha256"] if "weights_codec" in offer else None
            device.held = {k: offer[k] for k in ("selection", "ranking", "widths")} | {"weights": weights}
        self.allocator.learn(self.fleet, event.device, task, task.seconds)
        self._bind(event.device)
        self.planner.learn(event.device, device, task)
        return self._continue_round(now)

    def _is_continued_from(self, offer: Mapping[str, Any]) -> bool:
        """Whether what a device keeps of its part belongs to the channels that it was sent."""
        keeps = bool(offer.get("recipe", {}).get("keep_optimizer_state"))
        return keeps or bool({"codec", "weights_codec"} & offer.keys())

    def _give_up(self, task: DeviceTask | None, event: on.UpdateRejected | on.OfferRefused, now: float) -> Commands:
        """Record that a device's part has failed, if it was awaited, and continue with the others."""
        if task is None:
            return []
        task.refuse(event.reason, event.kind)
        self._count_failure(self.state.devices[event.device], task.kind, event.reason)
        return self._continue_round(now)

    def _awaited_task(self, event: on.PartEvent | on.Extracted, progress: Progress) -> DeviceTask | None:
        """The task that an event is about, if it is still awaited and has this progress."""
        task = self.state.task_at(event.device, event.round, event.attempt)
        if task is None or not self.state.awaits(task):
            return None
        return task if task.progress is progress else None

    def _admit(self, event: on.DeviceBorn) -> bool:
        """Add or renew a device by its announcement; False for one of an earlier connection, delivered late.

        An offline device is believed: if it lost its storage it counts its connections from the beginning.
        """
        state = self.state
        former = state.devices.get(event.device)
        if former is not None and former.online and event.session < former.session:
            return False
        shared_codecs = tuple(c for c in CODECS if c in event.codecs)  # others would be kept for ever
        codecs = self._shared_codecs.setdefault(shared_codecs, list(shared_codecs))
        device = JobDevice(
            session=event.session,
            online=True,
            profile=event.profile,
            probe=event.probe,
            samples=event.samples,
            codecs=codecs,
        )
        if former is None:
            device.last_offered_round = state.round
        else:
            # What the server remembers of a device outlives its connection.
            device.past, device.last_counted_round, device.held = former.past, former.last_counted_round, former.held
            device.last_offered_round, device.missed_rounds = former.last_offered_round, former.missed_rounds
            device.allocation, device.buffer, device.releases = former.allocation, former.buffer, former.releases
            device.failures, device.answer_s = former.failures, former.answer_s
            device.silent_offer = former.silent_offer
            if former.session != event.session:
                # One more failure excludes it again: it may end with each offer, and connect again.
                device.failures = min(former.failures, MAX_FAILURES - 1)
                device.answer_s = answers_of_earlier_connections(former)
        state.devices[event.device] = device
        self.planner.keep_correction(former, device)
        self.allocator.admit(self.fleet, event.device, former)
        self._bind(event.device)
        # It has not connected again; without a plan there is nothing that it could be asked for.
        if device.widths and former is not None and former.online and former.session == event.session:
            device.silent_since, device.asked_again_at = former.silent_since, former.asked_again_at
            if former.excluded_by:
                device.excluded, device.excluded_by = former.excluded, former.excluded_by
        return True

    def _resume_part(self, name: str, former: JobDevice | None) -> Commands:
        """Commands for the part of a device that has connected again, before its update is here: the offer or a pull.

        On the same connection it still has what it announced: that is pulled once more, which changes nothing while it
        is under way. On a new one it may have missed the offer or, with its storage, have lost the update: then nobody
        else would tell it to train. A device that still has the update answers with the same announcement.
        """
        task = self.state.tasks.get(name)
        if task is None or not task.offer or task.progress not in (Progress.OFFERED, Progress.PULLING):
            return []
        number, is_announced = self.state.round_of(task), task.progress is Progress.PULLING
        is_new_connection = former is None or former.session != self.state.devices[name].session
        if is_announced and task.update is not None and not is_new_connection:
            return [do.PullUpdate(name, number, task.attempt, task.update)]
        return [do.SendOffer(name, number, task.attempt, task.offer, is_announced)]

    def _note_answer(self, name: str, task: DeviceTask, now: float) -> None:
        """Remember what an answer took. The rest takes the server's time, too: a transfer waits for its turn."""
        if task.progress is Progress.OFFERED and task.offered_at is not None:
            seconds = now - task.offered_at
            self._patience.note_answer(self.state.devices[name], ROUND, seconds, training_size(task))
            task.deadline = task.offered_at + self.job.deadline_s
            if not self.state.tasks.count(*ANSWERED):
                # What kept the first may have kept all, such as the broker: the others have as long again.
                for other in self.state.tasks.values():
                    if other.progress is Progress.OFFERED and other.offered_at is not None and other.deadline:
                        other.deadline = max(other.deadline, min(now + seconds, other.offered_at + self.job.deadline_s))

    def _pull_command(self, event: on.UpdateAnnounced, task: DeviceTask, now: float) -> do.PullUpdate:
        """Pull what a device announces; another update than before replaces that one, which the device has no more."""
        if task.progress is Progress.OFFERED or task.update != event.weights:
            self._note_answer(event.device, task, now)
            task.progress, task.update = Progress.PULLING, event.weights
            task.steps, task.metrics = counted_steps(event, task), credible_metrics(event.metrics)
        return do.PullUpdate(event.device, event.round, event.attempt, event.weights)

    def _store_update(self, event: on.UpdateStored, now: float) -> DeviceTask | None:
        """Record in its part that an update is here. Returns the part; None if it doesn't wait for this update."""
        task = self._awaited_task(event, Progress.PULLING)
        if task is None or event.weights != (task.update or {}).get("sha256"):  # another update has replaced that one
            return None
        task.progress, task.weights = Progress.STORED, event.weights
        task.seconds = None if task.offered_at is None else now - task.offered_at
        return task

    def _settle_announcement(self, event: on.UpdateAnnounced, task: DeviceTask) -> do.Acknowledge | do.Cancel:
        """The answer to a device whose update is here. If it has trained once more meanwhile, without its storage, the
        first update counts: an acknowledgement of that one would leave it announcing the second."""
        if event.weights.get("sha256") != task.weights:
            return do.Cancel(event.device, event.round, event.attempt, "an earlier update of this offer is here")
        return do.Acknowledge(event.device, event.round, event.attempt, task.weights)

    def _on_device_died(self, event: on.DeviceDied) -> Commands:
        device = self.state.devices.get(event.device)
        if device is not None and device.session == event.session:
            device.online = False
        return []

    def _mark_all_offline(self) -> None:
        """After a restart, mark devices as offline until they announce themselves, and allocate their shares again."""
        for name, device in self.state.devices.items():
            exclusion = device.excluded, device.excluded_by
            device.online, device.excluded, device.excluded_by = False, "", ""
            device.silent_since = device.asked_again_at = None  # on the clock of the shell that has ended
            self.allocator.admit(self.fleet, name, None)
            self._bind(name)
            if exclusion[1]:  # until it announces itself: the job goes on without it meanwhile
                device.excluded, device.excluded_by = exclusion

    def _new_task(self, device: JobDevice, attempt: int, **settings: Any) -> DeviceTask:
        """A device's part of the present round."""
        return DeviceTask(
            attempt,
            **self.grants.grant_of(device)._asdict(),
            samples=device.samples,
            past=device.past,
            last_counted_round=device.last_counted_round,
            accumulate=device.accumulate,
            **settings,
        )

    def _keep_past(self, name: str, task: DeviceTask) -> None:
        """Record the round of a device's counted update and, if the strategy continues from it, the update."""
        self.state.devices[name].last_counted_round = self.state.round_of(task)
        if self.strategy.keeps_past:
            contribution = self.part_commands.contribution(name, task, task.weight)
            past = do.LastCountedUpdate(
                round=contribution.basis.round,
                weights=task.weights,
                # As it was sent: an extractor may have chosen fewer channels than the part says, or others.
                ranking=contribution.ranking or contribution.basis.ranking,
                widths=contribution.widths or task.widths,
                mask=contribution.mask,
                codec=contribution.codec,
                sent=contribution.sent if contribution.codec else None,
            )
            self.state.devices[name].past = vars(past) | {"widths": list(past.widths)}

    def _finish_budget_spent(self, number: int) -> Commands:
        """End a job of which no device may be asked once more; its result is the model of its last round."""
        self.state.round, self.state.phase = number, Phase.FINISHED
        self.state.tasks, self.state.deadline = TrackedDict(), None
        return [self._finish_command()]

    def _begin_round(self, now: float) -> bool:
        """Count a round, and decide what devices can hold and train in it. Returns whether densities have changed."""
        self.state.round += 1
        if self.state.began_at is None:
            self.state.began_at = now
        densities_changed = self.allocator.open(self.fleet)
        self._bind(*self.state.devices)
        self.grants.begin_round()
        return densities_changed

    def _bind(self, *names: str) -> None:
        """Bring devices under their plans whose widths an allocator of a user's set without asking."""
        for name in names if self.fleet.ceiling is not None else ():
            self.planner.bind(name, self.state.devices[name], masks_elements=self.allocator.masks_elements)

    def _finish_command(self) -> do.Finish:
        return do.Finish(self.state.model, early_end_reason(self.job, self.state))

    def _finish_if_over(self) -> Commands:
        """End a job that is between two rounds and may have no other: a restart may have lowered what it may have, also
        within its first round, if updates were sent that couldn't be used."""
        is_over = self._is_last_round() if self.state.history else bool(spent_total_reason(self.job, self.state))
        if not is_over:
            return []
        self.state.phase = Phase.FINISHED
        return [self._finish_command()]

    def _is_last_round(self) -> bool:
        """Whether the job ends with the round that has just ended."""
        is_spent = self._is_privacy_exhausted() or bool(spent_total_reason(self.job, self.state))
        return self.state.round >= self.job.rounds or is_spent or self.allocator.done(self.fleet)

    def _is_privacy_exhausted(self) -> bool:
        """Whether another round would take a device beyond the budget of privacy."""
        budget, history = self.job.privacy.epsilon_budget, self.state.history
        exhausted_account = self.state.spent_under or {}  # seen when a round closed, not before
        if budget and self.job.privacy.account_settings.items() <= exhausted_account.items():
            return True
        return bool(budget and history and history[-1]["metrics"].get(EPSILON_NEXT, 0.0) > budget)

    def _evaluate_command(self) -> do.Evaluate:
        """The command that measures the model. Where the fleet shares a core (the width that most boards train
        together), only the core is measured: channels beside it are untrained, and answer by chance."""
        state, budget = self.state, self.privacy_budget
        costs = budget.largest_cost(), budget.largest_cost_after_next()
        widths = self.grants.core if state.ranking else ()
        return do.Evaluate(state.round, state.model, *costs, state.ranking or "", widths)


def is_based_on_offer(event: on.UpdateAnnounced, task: DeviceTask) -> bool:
    """Whether an update was trained from the weights of this task's offer, and not in an earlier run of the job."""
    # Round and attempt begin at 1 again in a job that was started anew, so that they can't tell the runs apart.
    return task.offer is not None and event.base == task.offer["weights"]["sha256"]


def training_size(task: DeviceTask) -> float:
    """How much a part trains, in a unit that is the same for all parts: computations grow with the square of widths."""
    recipe, samples = Recipe.from_dict((task.offer or {})["recipe"]), max(1, task.samples)
    return recipe.steps(samples) * min(recipe.batch_size, samples) * task.density**2


def counted_steps(event: on.UpdateAnnounced, task: DeviceTask) -> int:
    """Optimiser steps behind an update: as many as it reports, at most those of its recipe."""
    recipe = Recipe.from_dict((task.offer or {})["recipe"])
    # More steps than the recipe has are not believed: evidence divides movements by their number.
    return max(1, min(event.steps, recipe.steps(task.samples)))
