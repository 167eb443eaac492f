"""Answers the server's scheduler which devices a job needs: how many, which it awaits, and which may take part."""

from __future__ import annotations

from collections.abc import Collection

from fedprune.coordination import Phase, State
from fedprune.coordination.fair_scheduler import JobDemand
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.jobs.state import Progress
from fedprune_server.engine.update_channel import UpdateChannel
from fedprune_server.observation.snapshot import AWAITED_PROGRESS


class DeviceDemand:
    """The demand of a job for devices. The coordinator's `state` is read here, never changed. `weight` is the job's
    share of the devices in comparison with other jobs; 0 to pause it."""

    def __init__(self, job: Job, state: State, schedule: Schedule, channel: UpdateChannel, weight: float) -> None:
        self._job, self._state, self._schedule, self._channel, self._weight = job, state, schedule, channel, weight
        self._tracks_changes = False
        self._changed_devices: set[str] = set()
        self._last_phase: Phase | None = None

    def awaits_part_of(self, device: str) -> bool:
        """Whether the job awaits a part of a round from a device."""
        task = self._state.tasks.get(device)
        if task is not None and self._channel.holds_devices and task.progress is Progress.FOLDED:
            return self._state.phase in (Phase.TRAINING, Phase.CLOSING)
        if task is None or task.progress not in AWAITED_PROGRESS:
            return False
        if task.basis is not None:  # a part of an asynchronous job, which counts in whatever round it arrives
            return self._state.phase is not Phase.FINISHED
        return self._state.phase in (Phase.SCORING, Phase.TRAINING)

    def may_take_part(self, device: str, session: int) -> bool:
        """Whether a device can take part in the job, as far as is known."""
        device_state = self._state.devices.get(device)
        return device_state is None or device_state.session != session or not device_state.excluded

    def has_work_for(self, device: str) -> bool:
        """Whether the job would give a device work now. An asynchronous job gives it no second part on one model."""
        task = self._state.tasks.get(device)
        return task is None or task.basis is None or (task.progress is Progress.REFUSED and task.deadline is None)

    def track_changes(self) -> None:
        """Collect the devices that change, for `take_changes`."""
        self._tracks_changes = True

    def take_changes(self) -> set[str]:
        """Devices for which this object may answer otherwise than at the last call."""
        self.note_changes(self._state.devices.changed | self._state.tasks.changed)
        changes, self._changed_devices = self._changed_devices, set()
        return changes

    def present(self) -> JobDemand | None:
        """The job's present demand; None if it is finished."""
        state = self._state
        if state.phase is Phase.FINISHED:
            return None
        weight = 0.0 if state.paused else self._weight
        if state.phase is Phase.WAITING:  # the round that begins next takes as many devices as there are
            return JobDemand(self._job.name, weight, self._job.devices, 2**31)
        if not self._schedule.asynchronous:
            return JobDemand(self._job.name, weight, self._job.devices, 0)
        parts_under_way = state.tasks.count(*AWAITED_PROGRESS)
        can_begin = state.phase is Phase.TRAINING
        free_places = max(0, (self._schedule.concurrent or 2**31) - parts_under_way) if can_begin else 0
        return JobDemand(self._job.name, weight, 1, free_places, parts_under_way)

    def note_changes(self, devices: Collection[str]) -> None:
        """Note changed devices, if they are tracked. A change of the phase may concern all devices that have a part."""
        if not self._tracks_changes:
            return
        self._changed_devices.update(devices)
        if self._state.phase is not self._last_phase:
            self._last_phase = self._state.phase
            self._changed_devices |= self._state.tasks.keys()
