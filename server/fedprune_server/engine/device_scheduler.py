"""Which job of a server has which device, kept by what changes: nobody looks at a fleet where nothing has happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprune.coordination.device_scheduler import FairScheduler, JobDemand
from fedprune.wire.messages import Birth
from fedprune_server.engine.job_runner import JobDesk


class Loans:
    """Takes devices back that have done their part, and lends those that are free.

    Args:
        desks: The jobs by name.
        here: The devices that are there, with what they say of themselves; whoever changes it says so.

    Attributes:
        lent: Which job has which device; free ones are left out.
    """

    def __init__(self, desks: Mapping[str, JobDesk], here: Mapping[str, Birth]) -> None:
        self._desks, self._here = desks, here
        self._scheduler = FairScheduler()
        self.lent: dict[str, str] = {}
        self._at_work: dict[str, str] = {}
        self._free: set[str] = set()
        self._takers: dict[str, set[str]] = {job: set() for job in desks}  # who is there and can take part in a job
        self._unfit: dict[str, set[str]] = {}  # jobs that can make nothing of a device
        self._stale: set[str] = set()  # whom to look at
        self._alone: str | None = None

    def came(self, device: str, *, anew: bool) -> None:
        """A device has announced itself.

        Args:
            device: Its name.
            anew: Whether on another connection than before.
        """
        self._stale.add(device)
        if anew:
            self._unfit.pop(device, None)

    def left(self, device: str, session: int | None) -> None:
        """A device isn't there any more.

        Args:
            device: Its name.
            session: The number of the connection that it had.
        """
        self._stale.add(device)
        job = self.lent.pop(device, None)
        if job is not None and session is not None:
            self._desks[job].recall(device, session)

    def renew(self, device: str) -> None:
        """Let the job that has a device hear how it describes itself now."""
        if device in self.lent:
            self._hand(self.lent[device], [device])

    def charge(self, seconds: float) -> None:
        """Note that devices have been at work for so long."""
        self._scheduler.charge(self._at_work, seconds)

    def end(self) -> None:
        """All jobs are finished: nobody is at work."""
        self._at_work = {}

    def share(self) -> None:
        """Take back who has done its part, and lend who is free, until nothing changes any more."""
        seen = set[str]()
        for _ in range(len(self._desks) + len(self._here)):
            if not self._share_once(seen):
                break
        for device in seen | self._stale | self._changed():
            job = self.lent.get(device)
            if job is not None and self._desks[job].works(device):
                self._at_work[device] = job
            else:
                self._at_work.pop(device, None)

    def _changed(self) -> set[str]:
        """Devices that something may have changed about; whose part in a job it is, is seen to here."""
        for desk in self._desks.values():
            self._stale |= desk.changes()
        for device in self._stale:
            for job, takers in self._takers.items():
                if device in self._here and self._takes(job, device):
                    takers.add(device)
                else:
                    takers.discard(device)
        return self._stale

    def _able(self) -> tuple[list[JobDemand], list[JobDemand]]:
        """The jobs that are not finished, and those of them that enough devices are there for."""
        borrowers = [b for d in self._desks.values() if (b := d.borrower()) is not None]
        return borrowers, [b for b in borrowers if b.able(len(self._takers[b.job]))]

    def _share_once(self, seen: set[str]) -> bool:
        """Share out what is free; returns whether a job got something."""
        stale = self._changed()
        _, able = self._able()
        alone = able[0].job if len(able) == 1 else None
        if alone != self._alone:
            self._alone, stale = alone, stale | self._here.keys()
        self._stale = set()
        seen |= stale
        for device in sorted(stale):
            self._look(device)
        if alone is not None:
            found = {alone: sorted(d for d in self._free if self._takes(alone, d))}
        else:
            self._changed()
            borrowers, able = self._able()
            found = self._scheduler.assign(borrowers, self._free, self._here, self._takes, self._fits, able)
        for job, devices in found.items():
            self._hand(job, devices)
        return any(found.values())

    def _look(self, device: str) -> None:
        """See whether a device is free, or at which job's part it is."""
        self._free.discard(device)
        birth, job = self._here.get(device), self.lent.get(device)
        if birth is None or (job is not None and (job == self._alone or self._desks[job].works(device))):
            return
        if job is not None:
            del self.lent[device]
            self._desks[job].recall(device, birth.session)
        # After a restart of either side a part may be under way: it is gone on with.
        mine = next((n for n, d in self._desks.items() if d.works(device)), None)
        if mine is None:
            self._free.add(device)
        elif mine not in self._unfit.get(device, ()):
            self._hand(mine, [device])

    def _takes(self, job: str, device: str) -> bool:
        unfit = self._unfit.get(device, ())
        return job not in unfit and self._desks[job].takes(device, self._here[device].session)

    def _fits(self, job: str, device: str) -> bool:
        return self._takes(job, device) and self._desks[job].fits(device)

    def _hand(self, job: str, devices: Sequence[str]) -> None:
        """Let a job have devices, all at once."""
        self._stale |= set(devices)
        fit = self._desks[job].lend([self._here[d] for d in devices])
        for device in devices:
            if device in fit:
                self.lent[device] = job
            else:
                self._unfit.setdefault(device, set()).add(job)
                self.lent.pop(device, None)
