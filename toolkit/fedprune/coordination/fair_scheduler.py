"""Decides which of several jobs a device works for: one at a time, and every job in its turn.

A device is free when nothing of a round is awaited of it. A job that could begin a round waits in a queue, and so does
an asynchronous job with fewer devices at work than its share. The first job in the queue is the one that has had the
least device time for its weight. It gets the free devices that have worked least for it: at least as many as its round
needs, at most its share of all present devices. It doesn't wait for a device that works for another job. If too few are
free, the free ones that fit are reserved for it: no later job in the queue takes them, so that no job starves. A job
that needs more devices than are present is skipped and reserves none.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class JobDemand:
    """A job that is not finished, and the devices that it could use.

    Attributes:
        weight: Its share in comparison with the others'; 0 for a job that is paused.
        min_devices: Devices that it needs to go on.
        max_devices: Devices that it can use now; 0 where it is in the middle of a round.
    """

    job: str
    weight: float
    min_devices: int
    max_devices: int
    devices_at_work: int = 0

    def has_share(self, takers: int) -> bool:
        """Whether it has a share, given the number of present devices that can take part in it."""
        return self.weight > 0 and takers >= max(1, self.min_devices)


# Tells whether a job can give a device something to do, by the names of the job and the device.
JobDevicePredicate = Callable[[str, str], bool]


class FairScheduler:
    """Accounts for devices' time, and assigns the free ones. Does no I/O and reads no clock."""

    def __init__(self) -> None:
        self._job_seconds = defaultdict[str, float](float)
        self._device_seconds = defaultdict[tuple[str, str], float](float)
        self._assignment_counts = Counter[tuple[str, str]]()
        self._queue: frozenset[str] = frozenset()

    def charge(self, at_work: Mapping[str, str], seconds: float) -> None:
        """Note that this time has passed; `at_work` is the job that each device has worked for."""
        for device, job in at_work.items():
            self._job_seconds[job] += seconds
            self._device_seconds[job, device] += seconds

    def charged_seconds(self, job: str) -> float:
        """Seconds of device time that a job is charged with, in the queue or not: it can't save up time."""
        return self._job_seconds[job]

    def sharing_jobs(
        self, demands: Sequence[JobDemand], present: Collection[str], can_take_part: JobDevicePredicate
    ) -> list[JobDemand]:
        """The jobs among which devices are shared: those for which enough devices are present, free or at work."""
        return [d for d in demands if d.has_share(sum(can_take_part(d.job, device) for device in present))]

    def assign(
        self,
        demands: Sequence[JobDemand],
        free: Collection[str],
        present: Collection[str],
        can_take_part: JobDevicePredicate,
        has_work_for: JobDevicePredicate | None = None,
        sharing: Sequence[JobDemand] | None = None,
    ) -> dict[str, list[str]]:
        """Assign the free devices, of which nothing is awaited, to jobs; returns the devices of each job that gets any.

        Args:
            demands: Jobs that are not finished; between equals the first one comes first.
            present: All devices that are there, free or at work.
            has_work_for: Which of them a job would give something to do now; by default all that can take part.
            sharing: The result of `sharing_jobs`, if it was computed already.
        """
        has_work_for = has_work_for or can_take_part
        sharing = self.sharing_jobs(demands, present, can_take_part) if sharing is None else sharing
        self._charge_newcomers(sharing)
        total = sum(demand.weight for demand in sharing)
        unassigned, assignments = set(free), dict[str, list[str]]()
        for demand in sorted((d for d in sharing if d.max_devices > 0), key=self._seconds_per_weight):
            job = demand.job
            # 1e-9: a share that is a whole number must not be rounded up by a floating-point error.
            share = math.ceil(len(present) * demand.weight / total - 1e-9) - demand.devices_at_work
            count = min(max(0 if demand.devices_at_work else demand.min_devices, share, 0), demand.max_devices)
            if not count:
                continue
            # Those that have worked least for a job come first: it is to learn from all devices.
            fitting_devices = (d for d in unassigned if has_work_for(job, d))
            candidates = sorted(
                fitting_devices, key=lambda d: (self._device_seconds[job, d], self._assignment_counts[job, d], d)
            )
            if len(candidates) >= demand.min_devices:
                assignments[job] = candidates[:count]
                self._assignment_counts.update((job, d) for d in assignments[job])
            # Where they are too few, they wait for the job all the same: it would starve if jobs behind it took them.
            unassigned.difference_update(candidates[:count])
        return {job: devices for job, devices in assignments.items() if devices}

    def _charge_newcomers(self, able: Sequence[JobDemand]) -> None:
        """Charge jobs that are new in the queue, or come back to it, with as much time as the job that has had least:
        they have no claim on the time that the others have had meanwhile."""
        least_served = min((self._seconds_per_weight(d) for d in able if d.job in self._queue), default=0.0)
        for demand in able:
            if demand.job not in self._queue:
                self._job_seconds[demand.job] = max(self._job_seconds[demand.job], least_served * demand.weight)
        self._queue = frozenset(demand.job for demand in able)

    def _seconds_per_weight(self, demand: JobDemand) -> float:
        return self._job_seconds[demand.job] / demand.weight
