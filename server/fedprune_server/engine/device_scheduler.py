"""Assigns connected devices to a server's jobs, looking only at devices that have changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprune.coordination.fair_scheduler import FairScheduler, JobDemand
from fedprune.wire.messages import Birth
from fedprune_server.engine.job_runner import JobRunner


class SoleJob:
    """Assigns all devices to the only job of a server, at once.

    Args:
        connected: The devices that are connected, with their births.
    """

    def __init__(self, runner: JobRunner, connected: Mapping[str, Birth]) -> None:
        self._runner, self._connected = runner, connected

    def assignments(self) -> Mapping[str, str]:
        """The job of each device that is connected."""
        return dict.fromkeys(self._connected, self._runner.job.name)

    def came(self, device: str, *, reconnected: bool) -> None:
        self._runner.assign([self._connected[device]])

    def left(self, device: str, session: int) -> None:
        self._runner.unassign(device, session)

    def share(self, now: float, *, finished: bool) -> None:
        """Do nothing: no device waits for a job."""


class DeviceScheduler:
    """Shares devices out among several jobs: takes back those that have done their part, and assigns free ones.

    Args:
        connected: The devices that are connected, with their births.

    Attributes:
        lent: Names of the jobs by device; free devices are left out.
    """

    def __init__(self, runners: Mapping[str, JobRunner], connected: Mapping[str, Birth]) -> None:
        self._runners, self._connected = runners, connected
        self._scheduler = FairScheduler()
        self.lent: dict[str, str] = {}
        self._at_work: dict[str, str] = {}
        self._free: set[str] = set()
        self._takers: dict[str, set[str]] = {job: set() for job in runners}  # connected devices that suit a job
        self._unfit: dict[str, set[str]] = {}  # jobs that can't use a device
        self._stale: set[str] = set()  # devices to look at
        self._alone: str | None = None
        self._charged_at: float | None = None
        for runner in runners.values():
            runner.track_changes()

    def assignments(self) -> Mapping[str, str]:
        """The job that has a device, by device; free ones are left out."""
        return self.lent

    def came(self, device: str, *, reconnected: bool) -> None:
        """A device has announced itself, on a new connection if `reconnected`."""
        self._stale.add(device)
        if reconnected:
            self._unfit.pop(device, None)
        if device in self.lent:
            self._assign(self.lent[device], [device])

    def left(self, device: str, session: int) -> None:
        self._stale.add(device)
        job = self.lent.pop(device, None)
        if job is not None:
            self._runners[job].unassign(device, session)

    def share(self, now: float, *, finished: bool) -> None:
        """Take devices back and assign free ones until nothing changes; `finished` once all jobs are done."""
        if self._charged_at is not None:
            self._scheduler.charge(self._at_work, max(0.0, now - self._charged_at))
        self._charged_at = now
        if finished:
            self._at_work = {}
            return
        seen = set[str]()
        for _ in range(len(self._runners) + len(self._connected)):
            if not self._share_once(seen):
                break
        for device in seen | self._stale | self._changed():
            job = self.lent.get(device)
            if job is not None and self._runners[job].awaits_part_of(device):
                self._at_work[device] = job
            else:
                self._at_work.pop(device, None)

    def _changed(self) -> set[str]:
        """Devices that may have changed, after noting which jobs they suit."""
        for runner in self._runners.values():
            self._stale |= runner.changes()
        for device in self._stale:
            for job, takers in self._takers.items():
                if device in self._connected and self._takes(job, device):
                    takers.add(device)
                else:
                    takers.discard(device)
        return self._stale

    def _able(self) -> tuple[list[JobDemand], list[JobDemand]]:
        """The jobs that are not finished, and those of them that have enough devices."""
        demands = [b for d in self._runners.values() if (b := d.demand()) is not None]
        return demands, [b for b in demands if b.able(len(self._takers[b.job]))]

    def _share_once(self, seen: set[str]) -> bool:
        """Share out free devices; returns whether a job got any."""
        stale = self._changed()
        _, able = self._able()
        alone = able[0].job if len(able) == 1 else None
        if alone != self._alone:
            self._alone, stale = alone, stale | self._connected.keys()
        self._stale = set()
        seen |= stale
        for device in sorted(stale):
            self._look(device)
        if alone is not None:
            found = {alone: sorted(d for d in self._free if self._takes(alone, d))}
        else:
            self._changed()
            demands, able = self._able()
            found = self._scheduler.assign(demands, self._free, self._connected, self._takes, self._fits, able)
        for job, devices in found.items():
            self._assign(job, devices)
        return any(found.values())

    def _look(self, device: str) -> None:
        """Take a device back from a job that no longer awaits its part, and mark it free or assign it to the job whose
        part it works on."""
        self._free.discard(device)
        birth, job = self._connected.get(device), self.lent.get(device)
        if birth is None or (job is not None and (job == self._alone or self._runners[job].awaits_part_of(device))):
            return
        if job is not None:
            del self.lent[device]
            self._runners[job].unassign(device, birth.session)
        # After a restart of either side a part may be under way: the device continues with it.
        mine = next((n for n, d in self._runners.items() if d.awaits_part_of(device)), None)
        if mine is None:
            self._free.add(device)
        elif mine not in self._unfit.get(device, ()):
            self._assign(mine, [device])

    def _takes(self, job: str, device: str) -> bool:
        unfit = self._unfit.get(device, ())
        return job not in unfit and self._runners[job].may_take_part(device, self._connected[device].session)

    def _fits(self, job: str, device: str) -> bool:
        return self._takes(job, device) and self._runners[job].has_work_for(device)

    def _assign(self, job: str, devices: Sequence[str]) -> None:
        self._stale |= set(devices)
        fit = self._runners[job].assign([self._connected[d] for d in devices])
        for device in devices:
            if device in fit:
                self.lent[device] = job
            else:
                self._unfit.setdefault(device, set()).add(job)
                self.lent.pop(device, None)
