"""Which of several jobs a device works for: one at a time, and every job in its turn.

A device is free when nothing of a round is awaited of it. A job that could begin a round waits in a queue, as does an
asynchronous one that has fewer devices at work than its share. First in line is the job that has had the least of the
devices' time for its weight. It gets the free devices that have worked least for it: as many as its round needs at
least, and at most its share of all that are there. It doesn't wait for a device at work for another job. Where too few
are free, those that fit it wait for it: no job behind it in the line takes one, so that none starves. A job that needs
more devices than are there is passed over and holds none.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class JobDemand:
    """A job that is not finished, as this rule sees it.

    Attributes:
        weight: Its share in comparison with the others'; 0 for a job that is paused.
        least: Devices that it needs to go on.
        most: How many it can use now; 0 where it is in the middle of a round.
        holds: Devices that work for it.
    """

    job: str
    weight: float
    least: int
    most: int
    holds: int = 0

    def able(self, takers: int) -> bool:
        """Whether it has a share, given the number of present devices that can take part in it."""
        return self.weight > 0 and takers >= max(1, self.least)


# Tells whether a job can give a device something to do, by the names of the job and the device.
Fits = Callable[[str, str], bool]


class FairScheduler:
    """Accounts for devices' time, and assigns the free ones. Does no I/O and reads no clock."""

    def __init__(self) -> None:
        self._used = defaultdict[str, float](float)
        self._worked = defaultdict[tuple[str, str], float](float)
        self._turns = Counter[tuple[str, str]]()
        self._queue: frozenset[str] = frozenset()

    def charge(self, at_work: Mapping[str, str], seconds: float) -> None:
        """Note that time has passed.

        Args:
            at_work: For which job each device has worked.
        """
        for device, job in at_work.items():
            self._used[job] += seconds
            self._worked[job, device] += seconds

    def used(self, job: str) -> float:
        """Seconds of devices' time that a job is charged with, more than it had if it was away from the line: a job
        can't save up time."""
        return self._used[job]

    def able(self, borrowers: Sequence[JobDemand], present: Collection[str], takes: Fits) -> list[JobDemand]:
        """The jobs among which devices are shared: those that enough devices are there for.

        Args:
            borrowers: Jobs that are not finished.
            present: All devices that are there, free or at work.
            takes: Which of them can take part in which job.
        """
        return [b for b in borrowers if b.able(sum(takes(b.job, d) for d in present))]

    def assign(
        self,
        borrowers: Sequence[JobDemand],
        free: Collection[str],
        present: Collection[str],
        takes: Fits,
        fits: Fits | None = None,
        able: Sequence[JobDemand] | None = None,
    ) -> dict[str, list[str]]:
        """Share the free devices out.

        Args:
            borrowers: Jobs that are not finished; the order decides where nothing else does.
            free: Devices of which nothing is awaited.
            present: All devices that are there.
            takes: Which of them can take part in which job.
            fits: Which of them a job would give something to do now; all of those by default.
            able: The result of `able`, if it is known.

        Returns:
            Which devices each job gets now; jobs that get none are left out.
        """
        fits = fits or takes
        able = self.able(borrowers, present, takes) if able is None else able
        self._enter(able)
        total = sum(b.weight for b in able)
        unassigned, assignments = set(free), dict[str, list[str]]()
        for demand in sorted((b for b in able if b.most > 0), key=self._served):
            job = demand.job
            # 1e-9: a share that is a whole number must not be rounded up by a floating-point error.
            share = math.ceil(len(present) * demand.weight / total - 1e-9) - demand.holds
            count = min(max(0 if demand.holds else demand.least, share, 0), demand.most)
            if not count:
                continue
            # Those that have worked least for a job come first: it is to learn from all devices.
            fitting_devices = (d for d in unassigned if fits(job, d))
            candidates = sorted(fitting_devices, key=lambda d: (self._worked[job, d], self._turns[job, d], d))
            if len(candidates) >= demand.least:
                assignments[job] = candidates[:count]
                self._turns.update((job, d) for d in assignments[job])
            # Where they are too few, they wait for the job all the same: it would starve if jobs behind it took them.
            unassigned.difference_update(candidates[:count])
        return {job: devices for job, devices in assignments.items() if devices}

    def _enter(self, able: Sequence[JobDemand]) -> None:
        """Charge jobs that are new, or come back to the line, with as much time as the one that has had least: they
        have no claim on what the others have had meanwhile."""
        least_served = min((self._served(b) for b in able if b.job in self._queue), default=0.0)
        for demand in able:
            if demand.job not in self._queue:
                self._used[demand.job] = max(self._used[demand.job], least_served * demand.weight)
        self._queue = frozenset(b.job for b in able)

    def _served(self, demand: JobDemand) -> float:
        return self._used[demand.job] / demand.weight
