"""Synchronous rounds: the coordinator asks devices, waits for updates up to a deadline, and closes the round.

It decides what happens next, and performs none of it: `handle(event, now)` depends only on the state, the event and the
time. The server and the simulator both feed it events and carry out its commands. The same events give the same
commands, so a simulation measures the code that runs in the field, and after a crash it is enough to load the state and
call `resume`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fedprune.aggregation.fixed_point import weight_in_round
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.coordination.base import ANSWERED, Commands, Coordinator
from fedprune.coordination.ready_devices import Integers
from fedprune.coordination.stragglers import (
    BEFORE_OFFER,
    DEADLINE_PASSED,
    ENOUGH_UPDATES,
    LOOKS_PER_DEADLINE,
    Stragglers,
    asked_devices,
    needed_devices,
)
from fedprune.coordination.weight_limits import capped_weights
from fedprune.core.rng import keyed_generator
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, Phase, Progress, State
from fedprune.model.architecture import Architecture

# A round that all devices refuse first pauses for this part of the deadline: with the usual 600 s, 1 minute.
FIRST_PAUSE_PARTS = 10


class SynchronousCoordinator(Coordinator):
    """Synchronous rounds with a deadline over a changing fleet.

    A round: wait for enough devices, rank the channels, extract a submodel for every chosen device, offer it, collect
    updates until all are in or the deadline has passed, turn their sums into the next global model, evaluate it. Each
    device's participation is its *part* of the round (`DeviceTask`). A round closes at its deadline with the updates
    that are on the server's disk. Without any update, or soon after its last device has refused, it starts again under
    the next attempt number, with a new choice of the devices that are present. The deadline counts from the last offer.

    `coordination.stragglers` says how many devices a round asks, and whether it closes without the slowest. Where
    `in_flight` limits the devices that work at a time, every device has the deadline for its own offer.
    `coordination.grants` says how much of the model a device trains.
    """

    def __init__(self, job: Job, architecture: Architecture, state: State, frozen: Collection[str] = ()) -> None:
        super().__init__(job, architecture, state, frozen)
        self._stragglers = Stragglers(state)
        self._wait_queue: WaitQueue | None = None

    def handle(self, event: on.Event, now: float) -> Commands:
        return super().handle(event, now) + self._adjust_deadline(now) + self._request_next_look(now)

    def _resume_round(self, now: float) -> Commands:
        state = self.state
        if state.phase is Phase.SCORING:
            return self._rescore(now)
        if state.phase is Phase.WAITING:
            return self._begin_next_round(now)
        state.deadline = None
        commands = self._start_deadline(now) + self._resume_parts(now)
        if not self.is_masked:
            stored = (Progress.STORED, Progress.FOLDED)
            commands += [
                self.part_commands.fold_command(n, t, t.weight)
                for n, t in sorted(state.tasks.items())
                if t.progress in stored
            ]
        return commands + self._begin_waiting_parts(self._progress_counts()) + self._request_next_look(now)

    def extend(self, now: float) -> Commands:
        """Begin the next round of a finished job that has been given more rounds, as if it had never finished."""
        if self.state.phase is not Phase.FINISHED or self._is_last_round():
            return []
        self.state.phase = Phase.WAITING
        return self._begin_next_round(now) + self._request_next_look(now)

    # A round begins.

    def _begin_pending(self, now: float) -> Commands:
        if self.state.phase is Phase.WAITING:
            return self._begin_next_round(now)
        return self._begin_waiting_parts(self._progress_counts())

    def _begin_next_round(self, now: float) -> Commands:
        state = self.state
        if state.phase is not Phase.WAITING:
            return []
        if finish := self._finish_if_over():
            return finish
        if state.paused:
            return []
        self._readmit_due_devices(now)
        if state.devices.count(True) < self._min_devices:
            return self._request_readmission()
        if self.privacy_budget.no_device_may_be_offered():
            return self._finish_budget_spent(state.round)
        ready = self._ready_devices.places()
        if not len(ready):  # those that are here are silent or have spent their budget of privacy; others are away
            return self._request_readmission()
        self._begin_round(now)
        # For devices that still haven't answered an earlier offer, the round is one more without them.
        for name in self._ready_devices.silent_devices():
            device = state.devices[name]
            if device.silent_since is not None and device.online and not device.excluded:
                self._count_silence(device, now - device.silent_since, now)
        state.tasks = self._new_tasks(self._draw_devices(ready, state.round, attempt=1), attempt=1)
        state.phase = Phase.SCORING
        state.ranking = state.order = None
        state.deadline = None
        return self._score_command()

    def _request_readmission(self) -> Commands:
        """Ask to be woken when a device is asked again that was silent."""
        readmission = self._next_readmission()
        return [] if readmission is None else [do.WakeAt(readmission)]

    def _draw_devices(self, ready: Integers, number: int, attempt: int) -> list[str]:
        """Names of the devices that round `number` asks: a keyed share of those that are ready; sorted."""
        share = self.schedule.participation or self.job.participation
        if number <= self.strategy.exploration_rounds:
            share = 1.0
        count = needed_devices(share, len(ready))
        count_asked = asked_devices(count, self.job.over_selection, len(ready))
        # A round that no device finished isn't offered to the same silent devices for ever.
        lot_key = ("participation",) if attempt == 1 else ("participation", attempt)
        drawn = ready[keyed_generator(self.job.seed, number, *lot_key).permutation(len(ready))]
        self.state.target_updates = count if count < count_asked else 0
        return self._ready_devices.names(np.sort(drawn[:count_asked]))

    def _new_tasks(self, asked: list[str], attempt: int) -> TrackedDict[DeviceTask]:
        """Parts for these devices, each with its widths and weight of now."""
        devices = {n: self.state.devices[n] for n in asked}
        # Decided before any update is in: neither the order of arrival nor an update's own word changes what counts.
        counts = {n: 1 if self.weighs_uniformly else d.samples for n, d in devices.items()}
        counts = capped_weights(counts, self.job.weight_limit, self.job.most_samples)
        total = sum(counts.values())
        tasks = TrackedDict[DeviceTask]()
        for name, device in devices.items():
            tasks[name] = self._new_task(device, attempt, weight=weight_in_round(counts[name], total, len(devices)))
        return tasks

    def _score_command(self) -> Commands:
        state = self.state
        return [do.Score(state.round, state.model, dict(state.memory), tuple(sorted(state.tasks)), self.grants.core)]

    def _rescore(self, now: float) -> Commands:
        """Score once more for the same devices, at the widths that they have now; without any, wait for others."""
        state = self.state
        for name, task in list(state.tasks.items()):
            device = state.devices[name]
            # The job's settings, and with them the plans, may have changed since the round began.
            task.widths, task.density, task.work = self.grants.grant_of(device)
            task.accumulate = device.accumulate
            if not task.widths:
                del state.tasks[name]
        if state.tasks:
            return self._score_command()
        # The round has not begun for anybody: its number is used again.
        state.round -= 1
        state.phase = Phase.WAITING
        return self._begin_next_round(now)

    def _begin_parts(self, now: float) -> Commands:
        state = self.state
        state.phase = Phase.TRAINING
        if self.job.in_flight:
            for task in state.tasks.values():
                task.progress = Progress.QUEUED
            self._wait_queue = None
            return self._begin_waiting_parts(self._progress_counts())
        return self.part_commands.extract_commands(sorted(state.tasks))

    def _begin_waiting_parts(self, counts: Counter[Progress]) -> Commands:
        """Begin the parts of devices that waited, as many as may work at a time."""
        tasks = self.state.tasks
        if not counts[Progress.QUEUED] or self.state.paused:
            return []
        free_turns = self.job.in_flight or len(tasks)
        free_turns -= sum(counts[p] for p in (Progress.EXTRACTING, Progress.OFFERED, Progress.PULLING))
        self._wait_queue = self._wait_queue or WaitQueue(self.state)
        names = self._wait_queue.next_devices(free_turns)
        for name in names:
            tasks[name].progress = Progress.EXTRACTING
        return self.part_commands.extract_commands(names)

    def _progress_counts(self) -> Counter[Progress]:
        """Numbers of the round's parts by progress."""
        return self.state.tasks.counts

    def _on_extracted(self, event: on.Extracted, now: float) -> Commands:
        task = self._awaited_task(event, Progress.EXTRACTING)
        return [] if task is None else [self._send_offer(task, event, now), *self._start_deadline(now)]

    def _start_deadline(self, now: float) -> Commands:
        """Set the round's deadline once all parts have been offered: a slow extraction must not cost devices time."""
        state = self.state
        if state.deadline is not None or state.tasks.count(*BEFORE_OFFER):
            return []
        state.deadline = now + self.job.deadline_s
        return [do.WakeAt(state.deadline)]

    def _adjust_deadline(self, now: float) -> Commands:
        """Have the round wait as long as the most patient of its waits. While no device has answered, the fault may be
        the server's or the broker's: until then the job's deadline counts."""
        state = self.state
        if state.phase is not Phase.TRAINING or state.deadline is None or not state.tasks.count(*ANSWERED):
            return []
        deadline = self._stragglers.latest_deadline()
        if deadline is None or deadline == state.deadline:
            return []
        state.deadline = deadline
        return [do.WakeAt(deadline)]

    # Updates come in.

    def _is_late(self, event: on.UpdateAnnounced) -> bool:
        return event.round != self.state.round or self.state.phase not in (Phase.SCORING, Phase.TRAINING)

    def _on_update_stored(self, event: on.UpdateStored, now: float) -> Commands:
        task = self._store_update(event, now)
        if task is None:
            return []
        acknowledgement = do.Acknowledge(event.device, event.round, event.attempt, event.weights)
        return [acknowledgement, self.part_commands.fold_command(event.device, task, task.weight)]

    def _on_update_rejected(self, event: on.UpdateRejected, now: float) -> Commands:
        task = (
            self._awaited_task(event, Progress.STORED)
            or self._awaited_task(event, Progress.FOLDED)
            or self._awaited_task(event, Progress.PULLING)
        )
        return self._give_up(task, event, now)

    # A round ends.

    def _on_ticked(self, event: on.Ticked, now: float) -> Commands:
        state = self.state
        if state.phase is Phase.WAITING:
            return self._begin_next_round(now)
        if state.phase is not Phase.TRAINING:
            return []
        is_over = state.deadline is not None and now >= state.deadline
        if not is_over and not self.job.in_flight:
            return [] if state.deadline is None else [do.WakeAt(state.deadline)]  # a clock was set back
        is_heard = bool(state.tasks.count(*ANSWERED))
        late_tasks, number = self._stragglers.late_tasks(now), state.round
        if not is_over and not is_heard:
            late_tasks = [(n, t) for n, t in late_tasks if (t.offered_at or 0.0) + self.job.deadline_s <= now]
        for name, task in late_tasks:
            if is_heard:
                self._note_silence(name, task, now)
            self._stragglers.stop_waiting(name, task, DEADLINE_PASSED)
        commands = self._continue_round(now)
        # A device that is asked again gets an offer instead of a cancellation: the same work continues.
        asked_again = {n for n, t in state.tasks.items() if t.progress in BEFORE_OFFER}
        return [*(self._late_command(n, number, t) for n, t in late_tasks if n not in asked_again), *commands]

    def _request_next_look(self, now: float) -> Commands:
        """Ask to be woken for the next look at deadlines of single devices, unless that was asked for."""
        state, next_look = self.state, now + self.job.deadline_s / LOOKS_PER_DEADLINE
        if (
            not self.job.in_flight
            or state.phase is not Phase.TRAINING
            or any(now < at <= next_look for at in state.wake_times)
        ):
            return []
        state.wake_times = [next_look]
        return [do.WakeAt(next_look)]

    def _on_folded(self, event: on.Folded, now: float) -> Commands:
        if self._awaited_task(event, Progress.STORED) is not None:
            self.state.devices[event.device].missed_rounds = 0
        return super()._on_folded(event, now)

    def _continue_round(self, now: float) -> Commands:
        state, counts = self.state, self._progress_counts()
        cancels: Commands = []
        for name, task in (unneeded := self._stragglers.unneeded_tasks(counts)):
            self._stragglers.stop_waiting(name, task, ENOUGH_UPDATES)
            cancels.append(do.Cancel(name, state.round, task.attempt, ENOUGH_UPDATES))
        if not unneeded and not all(progress.is_over for progress, count in counts.items() if count):
            return self._begin_waiting_parts(counts)
        # Whatever is in the sums counts: a round with one update closes, too.
        if counts[Progress.FOLDED]:
            state.phase = Phase.CLOSING
            return [*cancels, self._close_command()]
        return self._repeat_after_pause(now)

    def _restart_after_unusable_updates(self, now: float) -> Commands:
        """Start the round again after its deadline, as none of the updates in the sums could be used."""
        state = self.state
        state.phase = Phase.TRAINING
        if state.deadline is None or now < state.deadline:
            return self._start_deadline(now) or [do.WakeAt(state.deadline or now)]
        return self._repeat_round(now)

    def _repeat_after_pause(self, now: float) -> Commands:
        """Start a round again in which all devices refused, after a pause and at its deadline at the latest.

        The pause gives devices that refused time to recover, and keeps a fault that all have from making rounds spin:
        it doubles with each attempt.
        """
        state = self.state
        if state.deadline is not None and now >= state.deadline:
            return self._repeat_round(now)
        attempt = max((task.attempt for task in state.tasks.values()), default=1)
        retry = now + self.job.deadline_s * min(1.0, 2.0 ** min(attempt - 1, 8) / FIRST_PAUSE_PARTS)
        state.deadline = retry if state.deadline is None else min(state.deadline, retry)
        return [do.WakeAt(state.deadline)]

    def _repeat_round(self, now: float) -> Commands:
        """Start the round again with the devices that are present; wait for more if they are too few.

        If these are others than in the last attempt, channels are ranked again: scorers may go by who takes part.
        """
        state = self.state
        state.deadline = None
        self._readmit_due_devices(now)
        ready = self._ready_devices.places()
        former_devices, attempt = set(state.tasks), 1 + max((t.attempt for t in state.tasks.values()), default=0)
        is_able = len(ready) >= self._min_devices and not state.paused
        asked = self._draw_devices(ready, state.round, attempt) if is_able else []
        if not asked:
            state.tasks = TrackedDict()
            state.round -= 1
            state.phase = Phase.WAITING
            if self.privacy_budget.no_device_may_be_offered():
                return self._finish_budget_spent(state.round)
            return self._finish_if_over() or self._request_readmission()
        state.tasks = self._new_tasks(asked, attempt)
        # The ranking was made for these devices, and still fits them.
        if set(state.tasks) == former_devices:
            return self._begin_parts(now)
        state.phase = Phase.SCORING
        state.ranking = state.order = None
        return self._score_command()

    def _counted_tasks(self) -> dict[str, DeviceTask]:
        """The parts whose updates count."""
        return {n: t for n, t in sorted(self.state.tasks.items()) if t.progress is Progress.FOLDED}

    def _close_command(self) -> do.Command:
        return self._close_with(())

    def _close_with(self, sums: tuple[do.CohortSum, ...]) -> do.Close:
        state, tasks = self.state, self._counted_tasks()
        contributions = tuple(self.part_commands.contribution(n, t, t.weight) for n, t in tasks.items())
        return do.Close(state.round, state.model, dict(state.memory), tuple(tasks), contributions, sums=sums)

    def _judge_cohort_sums(self, event: on.Closed) -> tuple[list[list[str]], bool]:
        """The cohorts whose updates are known by their sum alone; and whether the next attempt at the round needs no
        pause, since fewer devices are suspected of having spoilt a sum."""
        return [], False

    def _on_closed(self, event: on.Closed, now: float) -> Commands:
        state = self.state
        if state.phase is not Phase.CLOSING or event.round != state.round:
            return []
        cohorts, retry_at_once = self._judge_cohort_sums(event)
        for name in event.limited.keys() & state.tasks.keys():
            state.tasks[name].reason = event.limited[name]
        for name in event.rejected.keys() & state.tasks.keys():
            state.tasks[name].refuse(event.rejected[name], event.kinds.get(name, FailureKind.OTHER))
        counted = self._counted_tasks()
        if not counted:
            state.closing = None
            return self._repeat_round(now) if retry_at_once else self._restart_after_unusable_updates(now)
        if not self.privacy_budget.release(counted, cohorts):  # too few delivered: their sum is not published
            state.spent_under, state.closing = self.job.privacy.account_settings, None
            return self._finish_budget_spent(state.round - 1)
        for name, task in counted.items():
            self._keep_past(name, task)
        state.model, state.memory = event.model, dict(event.memory)
        state.phase = Phase.EVALUATING
        return [self._evaluate_command()]

    def _end_round(self, metrics: Mapping[str, float], now: float) -> Commands:
        state = self.state
        state.history.append(self._round_summary(metrics, now))
        state.closing = None
        # After the history has the round, and before the next one is planned.
        self.allocator.review(self.fleet, metrics)
        if self._is_last_round():
            state.phase = Phase.FINISHED
            return [self._finish_command()]
        state.phase = Phase.WAITING
        return self._begin_next_round(now)

    def _round_summary(self, metrics: Mapping[str, float], now: float) -> dict[str, Any]:
        state = self.state
        return {
            "round": state.round,
            "at": now,
            "model": state.model,
            "metrics": metrics,
            "devices": {n: t.summary() for n, t in sorted(state.tasks.items())},
        }


class WaitQueue:
    """The order in which devices of a round get their offers, made of the state once: an event must not sort a fleet.

    Devices have their turns in the order of their names; a device that is away when its turn comes lets the others go
    first.
    """

    def __init__(self, state: State) -> None:
        self._state = state
        names = sorted(n for n, t in state.tasks.items() if t.progress is Progress.QUEUED)
        self._present, self._absent = deque(names), deque[str]()

    def next_devices(self, count: int) -> list[str]:
        """The next devices; fewer where no more wait."""
        names: list[str] = []
        while len(names) < count and (self._present or self._absent):
            waiting = self._present or self._absent
            name = waiting.popleft()
            task = self._state.tasks.get(name)
            if task is None or task.progress is not Progress.QUEUED:
                continue
            if waiting is self._present and not self._state.devices[name].online:
                self._absent.append(name)
            else:
                names.append(name)
        return names
