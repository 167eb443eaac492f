"""What updates count for in an asynchronous job, worked out from the state as the schedule says."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination.state import Progress, State, Task
from fedprune.influence import weight_limit
from fedprune.job import Job
from fedprune.schedule import Arrival, Schedule


class Shares:
    """The schedule's arithmetic on a job's state.

    Args:
        state: The coordinator's; read, never changed.
        schedule: The strategy's.
        job: Says the most samples that a device counts for.
        uniform: Whether devices count alike, whatever their samples.
    """

    def __init__(self, state: State, schedule: Schedule, job: Job, *, uniform: bool) -> None:
        self._state = state
        self._schedule = schedule
        self._job = job
        self._uniform = uniform
        self._limit = 0

    def weight(self, name: str) -> int:
        """What a device's update will count for if nobody comes or goes: else the sums are made anew."""
        state, fleet = self._state, self._fleet()
        first = self._arrival(state.tasks[name])
        tasks = (t for n, t in state.tasks.items() if n != name and t.progress is not Progress.REFUSED)
        buffers = (d.buffer for n, d in state.devices.items() if n not in state.tasks and d.buffer is not None)
        others: Iterable[Arrival]
        if self._schedule.mixing == "unbiased":
            others = [self._arrival(t) for t in tasks]
            others += [self._kept(b) for b in buffers] if self._schedule.keep else []
        else:
            # All that matters of others is whether any is stale: of every kind one will do.
            kinds = {(state.round_of(t), 0.0) for t in tasks}
            if self._schedule.keep:
                kinds |= {(int(b["round"]), float(b["share"])) for b in buffers}
            others = (Arrival(state.round - number, 1, 0.0, share) for number, share in kinds)
        return self._schedule.weights([first, *others], fleet, uniform=self._uniform)[0]

    def entering(self, fresh: dict[str, Task]) -> dict[str, Any]:
        """What the sums are made of: these updates and, where the schedule keeps them, everybody else's last.

        Returns:
            JSON for `State.closing`: `rate`, `fresh` (names) and `weights` by name.
        """
        state, schedule, fleet = self._state, self._schedule, self._fleet()
        entering = {n: self._arrival(t) for n, t in fresh.items()}
        others = []
        for name, device in sorted(state.devices.items()):
            kept = None if device.buffer is None else self._kept(device.buffer)
            if name in entering or (device.excluded and kept is None):
                continue
            if schedule.keep and kept is not None and schedule.fits(kept.staleness):
                entering[name] = kept
            else:
                others.append(kept or Arrival(0, min(device.samples, self._limit)))
        names = sorted(entering)
        arrivals = [entering[n] for n in names]
        weights = schedule.weights(arrivals, fleet, uniform=self._uniform)
        rate = schedule.step(arrivals, others, uniform=self._uniform)
        return {"rate": rate, "fresh": sorted(fresh), "weights": dict(zip(names, weights, strict=True))}

    def buffer(self, task: Task, contribution: dict[str, Any]) -> dict[str, Any]:
        """What a device's counted update leaves behind.

        Args:
            task: The device's part.
            contribution: The update, as `plain` gives it; dropped where the schedule doesn't keep it.
        """
        return {
            "round": self._state.round_of(task),
            "samples": task.samples,
            "seconds": task.seconds,
            "share": self._schedule.share(self._arrival(task)),
            "contribution": contribution if self._schedule.keep else None,
        }

    def _arrival(self, task: Task) -> Arrival:
        staleness, samples = self._state.round - self._state.round_of(task), min(task.samples, self._limit)
        return Arrival(staleness, samples, task.seconds or 0.0)

    def _kept(self, buffer: dict[str, Any]) -> Arrival:
        staleness = self._state.round - int(buffer["round"])
        return Arrival(staleness, min(buffer["samples"], self._limit), buffer["seconds"] or 0.0, buffer["share"])

    def _fleet(self) -> list[int]:
        """What all devices count for; with it the limit is made anew."""
        samples = [d.samples for d in self._state.devices.values()]
        self._limit = weight_limit(samples, self._job.weight_limit, self._job.most_samples)
        return [min(n, self._limit) for n in samples]


def plain(value: do.Basis | do.Contribution) -> dict[str, Any]:
    """As JSON, with lists for tuples."""
    body: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return body
