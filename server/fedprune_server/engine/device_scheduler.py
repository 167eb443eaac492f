"""Shares connected devices among the jobs of a server, looking only at devices that have changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from fedprune.coordination.fair_scheduler import FairScheduler, JobDemand
from fedprune.wire.messages import Birth
from fedprune_server.engine.job_runner import JobRunner


class DeviceScheduler:
    """Takes back the devices that have done their part in a round, and assigns free devices to jobs that need them.

    `connected` are the connected devices, each with its birth (the message by which it announces itself).
    `job_of_device` has no entries for free devices."""

    def __init__(self, runners: Mapping[str, JobRunner], connected: Mapping[str, Birth]) -> None:
        self._runners, self._connected = runners, connected
        self._scheduler = FairScheduler()
        self.job_of_device: dict[str, str] = {}
        self._working_devices: dict[str, str] = {}
        self._free_devices: set[str] = set()
        self._suitable_devices: dict[str, set[str]] = {job: set() for job in runners}
        # Jobs that refused a device, until it connects again: its profile can only change with a new session.
        self._unsuitable_jobs: dict[str, set[str]] = {}
        # Only these are checked in a turn: checking all of a large fleet in each turn would take most of its time.
        self._devices_to_check: set[str] = set()
        self._only_able_job: str | None = None  # the job that gets every device, since no other has enough of them
        self._charged_at: float | None = None
        for runner in runners.values():
            runner.demand.track_changes()

    def assignments(self) -> Mapping[str, str]:
        """The job of each device that has one."""
        return self.job_of_device

    def on_connect(self, device: str, *, reconnected: bool) -> None:
        """Note that a device has announced itself, on a new connection if `reconnected`."""
        self._devices_to_check.add(device)
        if reconnected:
            self._unsuitable_jobs.pop(device, None)
        if device in self.job_of_device:
            self._assign(self.job_of_device[device], [device])

    def on_disconnect(self, device: str, session: int) -> None:
        """Note that a connection of a device has ended, and take the device away from its job."""
        self._devices_to_check.add(device)
        job = self.job_of_device.pop(device, None)
        if job is not None:
            self._runners[job].unassign(device, session)

    def share_devices(self, now: float, *, finished: bool) -> None:
        """Take devices back and assign free ones until nothing changes; `finished` once all jobs are done."""
        if self._charged_at is not None:
            self._scheduler.charge(self._working_devices, max(0.0, now - self._charged_at))
        self._charged_at = now
        if finished:
            self._working_devices = {}
            return
        # A pass that assigns devices changes what their jobs need, so that another job may get a device in the next.
        for _ in range(len(self._runners) + len(self._connected)):
            if not self._share_once():
                break
        self._note_working(self._refresh_suitability())

    def _note_working(self, devices: Iterable[str]) -> None:
        """Note for which of these devices a job awaits their part in a round: their time is charged to that job."""
        for device in devices:
            job = self.job_of_device.get(device)
            if job is not None and self._runners[job].demand.awaits_part_of(device):
                self._working_devices[device] = job
            else:
                self._working_devices.pop(device, None)

    def _refresh_suitability(self) -> set[str]:
        """Update which jobs suit the changed devices; returns those devices."""
        for runner in self._runners.values():
            self._devices_to_check |= runner.demand.take_changes()
        for device in self._devices_to_check:
            for job, suitable_devices in self._suitable_devices.items():
                if device in self._connected and self._suits(job, device):
                    suitable_devices.add(device)
                else:
                    suitable_devices.discard(device)
        return self._devices_to_check

    def _current_demands(self) -> tuple[list[JobDemand], list[JobDemand]]:
        """Demands of the unfinished jobs, and of those among them for which enough suitable devices are connected."""
        demands = [demand for runner in self._runners.values() if (demand := runner.demand.present()) is not None]
        return demands, [demand for demand in demands if demand.has_share(len(self._suitable_devices[demand.job]))]

    def _share_once(self) -> bool:
        """Reassign changed devices, then assign free devices; returns whether a job got any of these."""
        devices_to_check = self._refresh_suitability()
        _, able_demands = self._current_demands()
        only_able_job = able_demands[0].job if len(able_demands) == 1 else None
        if only_able_job != self._only_able_job:  # then every device may belong to another job than before
            self._only_able_job, devices_to_check = only_able_job, devices_to_check | self._connected.keys()
        self._devices_to_check = set()
        for device in sorted(devices_to_check):
            self._reassign(device)
        self._note_working(devices_to_check)
        if only_able_job is not None:
            suitable_devices = [device for device in self._free_devices if self._suits(only_able_job, device)]
            assignments = {only_able_job: sorted(suitable_devices)}
        else:
            self._refresh_suitability()
            demands, able_demands = self._current_demands()
            assignments = self._scheduler.assign(
                demands, self._free_devices, self._connected, self._suits, self._has_work, able_demands
            )
        for job, devices in assignments.items():
            self._assign(job, devices)
        return any(assignments.values())

    def _reassign(self, device: str) -> None:
        """Take a device from a job that no longer awaits its part; assign it to the job that does, or mark it free."""
        self._free_devices.discard(device)
        birth, job = self._connected.get(device), self.job_of_device.get(device)
        if birth is None or (
            job is not None and (job == self._only_able_job or self._runners[job].demand.awaits_part_of(device))
        ):
            return
        if job is not None:
            del self.job_of_device[device]
            self._runners[job].unassign(device, birth.session)
        # After a restart of either side a part may be under way: the device continues with it.
        job_awaiting_part = next(
            (name for name, runner in self._runners.items() if runner.demand.awaits_part_of(device)), None
        )
        if job_awaiting_part is None:
            self._free_devices.add(device)
        elif job_awaiting_part not in self._unsuitable_jobs.get(device, ()):
            self._assign(job_awaiting_part, [device])

    def _suits(self, job: str, device: str) -> bool:
        unsuitable_jobs = self._unsuitable_jobs.get(device, ())
        return job not in unsuitable_jobs and self._runners[job].demand.may_take_part(
            device, self._connected[device].session
        )

    def _has_work(self, job: str, device: str) -> bool:
        return self._suits(job, device) and self._runners[job].demand.has_work_for(device)

    def _assign(self, job: str, devices: Sequence[str]) -> None:
        """Assign devices to a job, and note those that can't take part in it."""
        self._devices_to_check |= set(devices)
        able_devices = self._runners[job].assign([self._connected[device] for device in devices])
        for device in devices:
            if device in able_devices:
                self.job_of_device[device] = job
            else:
                self._unsuitable_jobs.setdefault(device, set()).add(job)
                self.job_of_device.pop(device, None)


class SingleJobScheduler:
    """Assigns every device to a job as soon as it connects. `connected` are the connected devices, each with its birth
    (the message by which it announces itself)."""

    def __init__(self, runner: JobRunner, connected: Mapping[str, Birth]) -> None:
        self._runner, self._connected = runner, connected

    def assignments(self) -> Mapping[str, str]:
        """The job of each connected device."""
        return dict.fromkeys(self._connected, self._runner.job.name)

    def on_connect(self, device: str, *, reconnected: bool) -> None:
        self._runner.assign([self._connected[device]])

    def on_disconnect(self, device: str, session: int) -> None:
        self._runner.unassign(device, session)

    def share_devices(self, now: float, *, finished: bool) -> None:
        """Do nothing: no device waits for a job."""
