"""Several toy jobs on one fleet in memory."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import State
from fedprune.jobs.job import Job
from fedprune.wire.messages import Birth, Finished, Offer
from fedprune.wire.queues import ConnectionUp
from fedprune_server.engine.job_runner import JobRunner
from fedprune_server.engine.runnable_job import RunnableJob
from fedprune_server.engine.server import Server
from fedprune_server.transfer.http import NO_BLOBS
from support.fakes.fleet import Air, ToyDevice, ToyWorker, quick, server_of
from support.fakes.tiny_job import ARCHITECTURE


class KilledError(BaseException):
    """What a SIGKILL is to a process."""


class JobsDevice(ToyDevice):
    """A toy device that tells jobs apart, and notes which offers reached it while it was at work on another job's."""

    def __init__(self, name: str, folder: Path, air: Air) -> None:
        super().__init__(name, folder, air)
        self.clashes: list[tuple[str, str]] = []
        self.jobs: list[str] = []

    def take(self, offer: Offer) -> None:
        before = self.offer
        if before is not None and before.job != offer.job:
            if self.pulls or (self.pending is not None and self.pending.job != offer.job):
                self.clashes.append((before.job, offer.job))
            self.offer = None
        self.jobs.append(offer.job)
        super().take(offer)

    def send_birth(self) -> None:
        assignment = None
        if self.offer is not None and (self.pulls or self.pending is not None):
            assignment = {"job": self.offer.job, "round": self.offer.round, "attempt": self.offer.attempt}
        more = {"held": assignment, "abilities": self.abilities, "warnings": self.warnings}
        self.say(Birth(self.name, self.session, self.profile, 10, "test", **more))

    def hear(self, topic: str, payload: bytes) -> None:
        pending = self.pending
        super().hear(topic, payload)
        last = self.heard[-1] if self.heard else None
        if isinstance(last, Finished) and pending is not None and pending.job != last.job:
            self.pending = pending


class SeveralJobs:
    """A server's folders for several jobs, an air and devices, out of which hosts are made."""

    def __init__(self, folder: Path, jobs: list[Job], names: str, weights: dict[str, float] | None = None) -> None:
        self.folder, self.jobs, self.weights = folder, jobs, weights or {}
        folder.mkdir(exist_ok=True)
        self.air = Air()
        self.runners: dict[str, JobRunner] = {}
        self.workers: dict[str, ToyWorker] = {}
        self.web = NO_BLOBS
        self.open_store: Callable[[Path], BlobStore] = lambda folder: BlobStore(folder / "blobs", durable=False)
        for name in names:
            self.air.devices[name] = JobsDevice(name, folder / "devices", self.air)

    def host(self, **first: Any) -> Server:
        """A server on what the folders hold, as a new process would make it; `first` are options of the first job."""
        jobs: list[tuple[RunnableJob, dict[str, Any]]] = []
        for job in self.jobs:
            path = self.folder / job.name
            path.mkdir(exist_ok=True)
            storage, store = quick(path), self.open_store(path)
            worker = self.workers[job.name] = ToyWorker(store)
            state = storage.load()
            if state is None:
                state = State(model=worker.initial())
                storage.save(state, (), 0.0)
            weight = self.weights.get(job.name, 1.0)
            runnable = RunnableJob(
                job, ARCHITECTURE, state, storage, store, worker, keep=100, weight=weight, prefix=f"{job.name}: "
            )
            jobs.append((runnable, {"blobs": self.web, **({} if jobs else first)}))
        server = server_of(jobs, self.air, lambda: self.air.now)
        self.runners = server.runners
        return server

    def run(self, host: Server | None = None) -> dict[str, State]:
        """Run until all jobs are done, letting time pass only when nothing else can happen."""
        host = host or self.host()

        def idle() -> None:
            if host.is_busy:
                time.sleep(0.0005)
                return
            self.air.now += 0.5
            for device in self.air.devices.values():
                device.turn()
            if self.air.now > 10_000:
                raise TimeoutError("the jobs don't come to an end")

        self.air.on_idle = idle
        host.run(until_finished=True)
        return {name: d.state for name, d in self.runners.items()}

    def die(self, point: str, count: int) -> None:
        """Let the server die at the count-th passage of a point."""
        passed = [0]

        def step() -> None:
            passed[0] += 1
            if passed[0] == count:
                raise KilledError

        publish = self.air.publish

        def dying_publish(topic: str, payload: bytes, qos: int = 1) -> bool:
            sent = publish(topic, payload, qos)
            step()
            return sent

        if point == "after sending":
            self.air.publish = dying_publish  # type: ignore[method-assign]
            return
        for runner in self.runners.values():
            save = runner._journal._storage.save

            def dying(*arguments: Any, save: Any = save) -> bool:
                if point == "before saving":
                    step()
                saved = bool(save(*arguments))
                if point == "after saving":
                    step()
                return saved

            runner._journal._storage.save = dying  # type: ignore[method-assign, assignment]

    def restart(self) -> None:
        """A new connection, for a new process on the same folders."""
        self.air.__dict__.pop("publish", None)
        self.air.inbox = deque([ConnectionUp()])

    @property
    def clashes(self) -> list[tuple[str, str]]:
        """Offers that reached a device in the middle of another job's part."""
        return [c for d in self.air.devices.values() if isinstance(d, JobsDevice) for c in d.clashes]


def rename_job(job: Job, name: str, **changes: object) -> Job:
    """The same job by another name."""
    return replace(job, name=name, **changes)  # type: ignore[arg-type]
