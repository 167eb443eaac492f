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

    def weight(self, name: str) -> int:
        """What a device's update will count for if nobody comes or goes: else the sums are made anew."""
        state, limit = self._state, self._limit()
        fleet = self._fleet(limit)
        first = self._arrival(state.tasks[name], limit)
        tasks = (t for n, t in state.tasks.items() if n != name and t.progress is not Progress.REFUSED)
        buffers = (d.buffer for n, d in state.devices.items() if n not in state.tasks and d.buffer is not None)
        others: Iterable[Arrival]
        if self._schedule.mixing == "unbiased":
            others = [self._arrival(t, limit) for t in tasks]
            others += [self._kept(b, limit) for b in buffers] if self._schedule.keep else []
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
        state, schedule, limit = self._state, self._schedule, self._limit()
        fleet = self._fleet(limit)
        entering = {n: self._arrival(t, limit) for n, t in fresh.items()}
        others = []
        for name, device in sorted(state.devices.items()):
            kept = None if device.buffer is None else self._kept(device.buffer, limit)
            if name in entering or (device.excluded and kept is None):
                continue
            if schedule.keep and kept is not None and schedule.fits(kept.staleness):
                entering[name] = kept
            else:
                others.append(kept or Arrival(0, min(device.samples, limit)))
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
            "share": self._schedule.share(self._arrival(task, self._limit())),
            "contribution": contribution if self._schedule.keep else None,
        }

    def _arrival(self, task: Task, limit: int) -> Arrival:
        staleness, samples = self._state.round - self._state.round_of(task), min(task.samples, limit)
        return Arrival(staleness, samples, task.seconds or 0.0)

    def _kept(self, buffer: dict[str, Any], limit: int) -> Arrival:
        staleness = self._state.round - int(buffer["round"])
        return Arrival(staleness, min(buffer["samples"], limit), buffer["seconds"] or 0.0, buffer["share"])

    def _limit(self) -> int:
        samples = (d.samples for d in self._state.devices.values())
        return weight_limit(samples, self._job.weight_limit, self._job.most_samples)

    def _fleet(self, limit: int) -> list[int]:
        return [min(d.samples, limit) for d in self._state.devices.values()]


def plain(value: do.Basis | do.Contribution) -> dict[str, Any]:
    """As JSON, with lists for tuples."""
    body: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return body
