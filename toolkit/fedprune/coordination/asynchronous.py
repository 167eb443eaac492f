"""Coordinates asynchronous jobs: idle devices train the current model, and each closed round makes the next model.

A round has four steps: rank the channels (if due), collect updates until the schedule closes the round, aggregate,
evaluate (if due). Devices don't wait for that: a device may train across several rounds. Its offer keeps the number of
the round in which it was made, and the model from which its submodel was cut. A device trains a model once, then waits
for the next: so device and round identify an update, and equal events give equal bits.

A *part* is one device's work in a round (its task); a *contribution* is a stored update with its weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from msgspec import convert

from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.availability import WORKING_PROGRESS, DeviceIndex
from fedprune.coordination.base import Commands, Coordinator
from fedprune.coordination.job_end import spent_total_reason
from fedprune.coordination.staleness import UpdateWeights, plain_json
from fedprune.coordination.stragglers import DEADLINE_PASSED
from fedprune.core.rng import keyed_generator
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, Phase, Progress, State
from fedprune.model.architecture import Architecture


class AsynchronousCoordinator(Coordinator):
    """Rounds that close by arrivals or by windows, over devices that never wait for one another.

    Updates that come while a round is ranked, closed or evaluated count for the next round. A device that is late, or
    whose update is too stale, gets a new offer; a device that refused gets it at its deadline, even for the same model.
    """

    def __init__(self, job: Job, architecture: Architecture, state: State, frozen: Collection[str] = ()) -> None:
        super().__init__(job, architecture, state, frozen)
        concurrent = self.schedule.concurrent
        self._device_index = DeviceIndex(
            state, self.privacy_budget.may_be_offered, self._queue_number if concurrent else None
        )
        self._update_weights = UpdateWeights(state, self.schedule, job, uniform=self.weighs_uniformly)

    def handle(self, event: on.Event, now: float) -> Commands:
        return super().handle(event, now) + self._request_wake(now)

    def resume(self, now: float) -> Commands:
        commands = super().resume(now)
        return self._resume_parts(now) + commands + self._request_wake(now)

    def _resume_round(self, now: float) -> Commands:
        """Continue a round after a restart; its window starts again, since the former shell's clock is gone."""
        state = self.state
        if state.phase is Phase.SCORING:
            return [self._score_command()]
        if state.phase is Phase.WAITING:
            return self._finish_if_over()
        state.opened_at = now
        for task in state.tasks.values():
            task.arrived_at = None if task.arrived_at is None else min(task.arrived_at, now)
        return self._fold_stored_updates() + self._close_if_due(now)

    # A round begins.

    def _begin_pending(self, now: float) -> Commands:
        state = self.state
        if state.phase is not Phase.WAITING:
            return self._begin_idle_parts(now)
        return [] if state.paused or state.devices.count(True) < self._min_devices else self._open_round(now)

    def _open_round(self, now: float) -> Commands:
        state = self.state
        densities_changed = self._begin_round(now)
        state.opened_at = state.deadline = None
        is_due = densities_changed or (state.round - 1) % self.schedule.score_every == 0
        if state.ranking is not None and not is_due:
            return self._begin_parts(now)
        state.phase = Phase.SCORING
        state.ranking = state.order = None
        return [self._score_command()]

    def _score_command(self) -> do.Score:
        state = self.state
        ready = self._ready_devices.names(self._ready_devices.places())
        return do.Score(state.round, state.model, dict(state.memory), tuple(ready))

    def _begin_parts(self, now: float) -> Commands:
        """Cancel parts that have become too stale, and add the updates that wait for a round."""
        state = self.state
        state.phase, state.opened_at = Phase.TRAINING, now
        commands: Commands = []
        for name, task in sorted(state.tasks.items()) if self.schedule.max_staleness else ():
            is_stale = not self.schedule.accepts_staleness(state.round - state.round_of(task))
            if is_stale and task.progress is not Progress.REFUSED:
                if task.progress in (Progress.OFFERED, Progress.PULLING):
                    commands.append(do.Cancel(name, state.round_of(task), task.attempt, self._stale_reason))
                task.refuse(self._stale_reason, FailureKind.STALE)
                task.deadline = None
        return commands + self._fold_stored_updates() + self._begin_idle_parts(now) + self._close_if_due(now)

    @property
    def _stale_reason(self) -> str:
        return f"the model has moved more than {self.schedule.max_staleness} times since"

    def _begin_idle_parts(self, now: float) -> Commands:
        """Begin parts of the current model for idle devices, as many as may work at a time."""
        state = self.state
        if state.phase is not Phase.TRAINING or state.paused:
            return []
        free_turns = len(state.devices)
        if self.schedule.concurrent:
            free_turns = self.schedule.concurrent - state.tasks.count(*WORKING_PROGRESS)
        if free_turns <= 0:
            return []
        idle = self._device_index.first_idle(free_turns)
        if not idle:
            budget_is_spent = (
                not self._device_index.may_bring_update
                and not self._device_index.arrival_times
                and self.privacy_budget.no_device_may_be_offered()
            )
            return self._finish_budget_spent(state.round - 1) if budget_is_spent else []
        # The part keeps the model that it was cut from (its basis): there are newer ones when its update comes.
        basis = plain_json(self.part_commands.current_basis())
        for name in idle:
            device, former_task = state.devices[name], state.tasks.get(name)
            is_repeated = former_task is not None and state.round_of(former_task) == state.round
            attempt = former_task.attempt + 1 if former_task is not None and is_repeated else 1
            state.tasks[name] = self._new_task(device, attempt, basis=basis)
        return self.part_commands.extract_commands(idle)

    def _queue_number(self, name: str) -> float:
        """A device's number in the queue for offers: the round of its last offer, plus a lot among those of that round.

        In the order of names the last devices would starve where few may work at a time. The number stays as it is
        while the device waits.
        """
        offered_round = self.state.devices[name].last_offered_round
        return offered_round + keyed_generator(self.job.seed, offered_round, name, "turn").random()

    def _on_extracted(self, event: on.Extracted, now: float) -> Commands:
        task = self._awaited_task(event, Progress.EXTRACTING)
        if task is None:
            return []
        self.state.devices[event.device].last_offered_round = event.round
        return [self._send_offer(task, event, now)]

    # Updates come in.

    def _on_update_stored(self, event: on.UpdateStored, now: float) -> Commands:
        task = self._store_update(event, now)
        if task is None:
            return []
        task.arrived_at, task.deadline = now, None
        commands: Commands = [do.Acknowledge(event.device, event.round, event.attempt, event.weights)]
        if self.state.phase is Phase.TRAINING:
            commands.append(self._weighted_fold_command(event.device, task))
        return commands

    def _weighted_fold_command(self, name: str, task: DeviceTask) -> do.FoldUpdate:
        return self.part_commands.fold_command(name, task, self._update_weights.weight(name))

    def _fold_stored_updates(self) -> Commands:
        """Add updates that came while no sums were open."""
        return [self._weighted_fold_command(n, t) for n, t in self._device_index.unchecked_updates()]

    def _on_update_rejected(self, event: on.UpdateRejected, now: float) -> Commands:
        task = self._awaited_task(event, Progress.PULLING) or self._awaited_task(event, Progress.STORED)
        return self._give_up(task, event, now)

    def _give_up(self, task: DeviceTask | None, event: on.UpdateRejected | on.OfferRefused, now: float) -> Commands:
        """Give a failed part its deadline, when the device is asked again: at once it would fail in the same way."""
        if task is not None:
            task.deadline = task.deadline or now + self.job.deadline_s
        return super()._give_up(task, event, now)

    def _continue_round(self, now: float) -> Commands:
        return self._close_if_due(now) + self._begin_idle_parts(now)

    # Time.

    def _on_ticked(self, event: on.Ticked, now: float) -> Commands:
        state = self.state
        if state.phase in (Phase.WAITING, Phase.FINISHED):
            return []
        if state.wake_times and now < min(state.wake_times):
            return [do.WakeAt(min(state.wake_times))]  # a clock was set back
        state.wake_times = [at for at in state.wake_times if at > now]
        late_tasks: list[tuple[str, int, DeviceTask]] = []
        # Judged before any of them is given up, which would change what the others are judged by.
        judged = [(n, t := state.tasks[n], self._is_heard(t)) for n in self._device_index.late_devices(now)]
        for name, task, is_heard in judged:
            ends_at, task.deadline = (task.offered_at or 0.0) + self.job.deadline_s, None
            if task.progress is Progress.REFUSED:
                continue
            if is_heard:
                self._note_silence(name, task, now)
            elif now < ends_at:
                task.deadline = ends_at
                continue
            late_tasks.append((name, state.round_of(task), task))
            task.refuse(DEADLINE_PASSED, FailureKind.LATE)
        self._readmit_due_devices(now)
        commands = self._continue_round(now)
        # A device that is asked for the same again gets an offer instead of a cancellation: it continues.
        names_asked_again = {c.part.device for c in commands if isinstance(c, do.Extract)}
        ends: Commands = [
            self._late_command(name, number, task)
            for name, number, task in late_tasks
            if name not in names_asked_again or number != state.round
        ]
        return ends + commands

    def _is_heard(self, task: DeviceTask) -> bool:
        """Whether another update has come since a part was offered, or is coming."""
        arrivals, since = self._device_index.arrival_times, task.offered_at
        if self.state.tasks.count(Progress.PULLING, Progress.STORED) or since is None:  # offered before a restart
            return bool(self.state.tasks.count(Progress.PULLING, Progress.STORED))
        return bool(arrivals and arrivals[-1] >= since) or any(s["at"] > since for s in self.state.history[-1:])

    def _request_wake(self, now: float) -> Commands:
        """Ask for the next time at which something is due, unless an earlier one is asked for already."""
        state = self.state
        if state.phase is Phase.FINISHED:
            return []
        times = [self._device_index.next_deadline, state.deadline if state.phase is Phase.TRAINING else None]
        times.append(self._next_readmission())
        due_at = min((at for at in times if at is not None), default=None)
        if due_at is None or any(at <= due_at for at in state.wake_times):
            return []
        state.wake_times = [*state.wake_times, due_at]
        return [do.WakeAt(due_at)]

    # A round ends.

    def _close_if_due(self, now: float) -> Commands:
        state = self.state
        if state.phase is not Phase.TRAINING or state.opened_at is None:
            return []
        arrivals = self._device_index.arrival_times
        may_bring_more = self._device_index.may_bring_update or self._device_index.has_absent_device
        state.deadline = self.schedule.closes_at(state.opened_at, arrivals, may_bring_more, now)
        if state.deadline is None and arrivals:
            # Since the last update the devices at work had their time, and those that are away time to come back.
            state.deadline = max(state.opened_at, arrivals[-1]) + self.job.deadline_s
        if state.deadline is None or state.deadline > now:
            return []
        fresh = self._device_index.checked_updates()[: self.schedule.arrivals or None]
        # `rate` (the step size), `fresh` (names of devices whose updates are new) and `weights` (by name) are saved
        # with the state: after a restart the same updates enter with the same weights.
        state.closing = self._update_weights.closing_record(dict(fresh))
        state.phase, state.deadline = Phase.CLOSING, None
        return [self._close_command()]

    def _close_command(self) -> do.Close:
        state = self.state
        closing = state.closing or {}
        contributions, fresh_names = [], set(closing["fresh"])
        for name, weight in sorted(closing["weights"].items()):
            if name in fresh_names:
                contributions.append(self.part_commands.contribution(name, state.tasks[name], weight))
            else:
                kept_update = state.devices[name].buffer or {}
                contributions.append(replace(convert(kept_update["contribution"], do.Contribution), weight=weight))
        return do.Close(
            state.round, state.model, dict(state.memory), tuple(closing["fresh"]), tuple(contributions), closing["rate"]
        )

    def _on_closed(self, event: on.Closed, now: float) -> Commands:
        state = self.state
        if state.phase is not Phase.CLOSING or event.round != state.round or state.closing is None:
            return []
        fresh_names = set(state.closing["fresh"])
        for name, weight in state.closing["weights"].items():
            is_fresh = name in fresh_names
            if name in event.rejected and is_fresh:
                state.tasks[name].refuse(event.rejected[name], event.kinds.get(name, FailureKind.OTHER))
            elif name in event.rejected:
                state.devices[name].buffer = None
            elif is_fresh:
                task = state.tasks[name]
                task.reason = event.limited.get(name, "")
                contribution = self.part_commands.contribution(name, task, weight)
                state.devices[name].buffer = self._update_weights.buffer_record(task, plain_json(contribution))
                self._keep_past(name, task)
        if state.closing["weights"].keys() <= event.rejected.keys():
            # No update is left: the round continues collecting, and its devices are asked again, but not at once.
            for name in state.closing["fresh"]:
                state.tasks[name].deadline = now + self.job.deadline_s
            state.closing = None
            return self._begin_parts(now)
        state.model, state.memory = event.model, dict(event.memory)
        skips_evaluation = state.round % self.schedule.evaluate_every and state.round < self.job.rounds
        # The last round is evaluated always, and so is any that may turn out to be the last.
        if skips_evaluation and not self.job.privacy.epsilon_budget and not spent_total_reason(self.job, state, now):
            return self._end_round({}, now)
        state.phase = Phase.EVALUATING
        return [self._evaluate_command()]

    def _end_round(self, metrics: Mapping[str, float], now: float) -> Commands:
        state = self.state
        number = state.round
        fresh_names = set((state.closing or {}).get("fresh", ()))
        ended_tasks = {
            n: state.tasks[n] for n in sorted(fresh_names | self._device_index.failed_devices()) if n in state.tasks
        }
        new_tasks = {n: t for n, t in ended_tasks.items() if not t.in_summary}
        timings = {n: {"staleness": number - state.round_of(t), "seconds": t.seconds} for n, t in new_tasks.items()}
        devices = {n: t.summary() | timings[n] for n, t in new_tasks.items()}
        state.history.append({"round": number, "at": now, "model": state.model, "metrics": metrics, "devices": devices})
        for task in new_tasks.values():
            task.in_summary = True
        # A device that refused waits for its deadline, whatever becomes of the model meanwhile.
        for name, task in ended_tasks.items():
            if task.deadline is None:
                del state.tasks[name]
        state.closing = None
        if self.allocator.review(self.fleet, metrics):
            state.ranking = state.order = None
        if not self._is_last_round():
            return self._open_round(now)
        state.phase, state.tasks, state.wake_times = Phase.FINISHED, TrackedDict(), []
        return [self._finish_command()]
