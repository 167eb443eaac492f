"""Weights of updates in an asynchronous job, computed from its state by the schedule."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination.limits import limit_of
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Arrival, Schedule
from fedprune.jobs.state import Progress, State, Task


class UpdateWeights:
    """The schedule's arithmetic on a job's state.

    Args:
        state: The coordinator's; read, never changed.
        job: Says the most samples that a device counts for.
        uniform: Whether devices count alike, whatever their samples.
    """

    def __init__(self, state: State, schedule: Schedule, job: Job, *, uniform: bool) -> None:
        self._state = state
        self._schedule = schedule
        self._job = job
        self._uniform = uniform
        self._changed = (state.devices.watch(), state.tasks.watch())
        self._samples: dict[str, int] = {}
        self._counts: Counter[int] = Counter()
        self._limit, self._total = 0, 0
        self._listed: dict[str, tuple[int, float, int]] = {}
        self._kinds: Counter[tuple[int, float]] = Counter()
        self._whole = 0

    def weight(self, name: str) -> int:
        """A device's weight if the fleet stays as it is; otherwise the sums are made again."""
        self._refresh()
        state, schedule = self._state, self._schedule
        first = self._arrival(state.tasks[name])
        others: list[Arrival]
        if schedule.mixing != "unbiased":
            # All that matters of others is whether any is stale: of every kind one will do.
            number, share, _ = self._listed[name]
            kinds = (k for k, count in self._kinds.items() if count > (k == (number, share)))
            others = [Arrival(state.round - number, 1, 0.0, share) for number, share in kinds]
        elif schedule.fit(self._whole, len(self._listed), self._total):
            others = []
        else:
            others = [a for n in self._listed if n != name and (a := self._counted(n)) is not None]
        return schedule.weights([first, *others], self._total, uniform=self._uniform)[0]

    def entering(self, fresh: dict[str, Task]) -> dict[str, Any]:
        """The addends of the sums: these updates and, if the schedule keeps them, the other devices' last ones.

        Returns:
            JSON for `State.closing`: `rate`, `fresh` (names) and `weights` by name.
        """
        self._refresh()
        state, schedule = self._state, self._schedule
        entering = {n: self._arrival(t) for n, t in fresh.items()}
        others = []
        for name, device in sorted(state.devices.items()) if schedule.keep or schedule.compares else ():
            kept = None if device.buffer is None else self._kept(device.buffer)
            if name in entering or (device.excluded and kept is None):
                continue
            if schedule.keep and kept is not None and schedule.fits(kept.staleness):
                entering[name] = kept
            else:
                others.append(kept or Arrival(0, min(device.samples, self._limit)))
        names = sorted(entering)
        arrivals = [entering[n] for n in names]
        weights = schedule.weights(arrivals, self._total, uniform=self._uniform)
        rate = schedule.step(arrivals, others, uniform=self._uniform)
        return {"rate": rate, "fresh": sorted(fresh), "weights": dict(zip(names, weights, strict=True))}

    def buffer(self, task: Task, contribution: dict[str, Any]) -> dict[str, Any]:
        """The record of a device's counted update.

        Args:
            contribution: The update, as `plain` gives it; dropped where the schedule doesn't keep it.
        """
        self._refresh()
        return {
            "round": self._state.round_of(task),
            "samples": task.samples,
            "seconds": task.seconds,
            "share": self._schedule.share(self._arrival(task)),
            "contribution": contribution if self._schedule.keep else None,
        }

    def _refresh(self) -> None:
        """Bring sums and counts up to date with what has changed in the state."""
        devices, names = self._state.devices, set().union(*self._changed)
        for changed in self._changed:
            changed.clear()
        new = {n: devices[n].samples for n in names if n in devices and self._samples.get(n) != devices[n].samples}
        if new:
            self._counts.subtract(self._samples[n] for n in new if n in self._samples)
            self._counts.update(new.values())
            self._counts += Counter()  # without the zeros
            self._samples |= new
            limit = limit_of(self._counts, self._job.weight_limit, self._job.most_samples)
            if limit != self._limit:
                names |= self._listed.keys()  # it may change what they count for
            self._limit = limit
            self._total = sum(c * (1 if self._uniform else max(1, min(n, limit))) for n, c in self._counts.items())
        for name in names:
            if name in self._listed:
                number, share, whole = self._listed.pop(name)
                self._kinds[number, share] -= 1
                self._whole -= whole
                if not self._kinds[number, share]:
                    del self._kinds[number, share]
            arrival = self._counted(name)
            if arrival is not None:
                number, whole = self._state.round - arrival.staleness, 0
                if self._schedule.mixing == "unbiased":
                    whole = self._schedule.windows(arrival) * (1 if self._uniform else max(1, arrival.samples))
                self._listed[name] = (number, arrival.share, whole)
                self._kinds[number, arrival.share] += 1
                self._whole += whole

    def _counted(self, name: str) -> Arrival | None:
        """A device's update that enters the sums if all that may come does, or else its last one, where it is kept."""
        task = self._state.tasks.get(name)
        if task is not None:
            return None if task.progress is Progress.REFUSED else self._arrival(task)
        buffer = self._state.devices[name].buffer if self._schedule.keep and name in self._state.devices else None
        return None if buffer is None else self._kept(buffer)

    def _arrival(self, task: Task) -> Arrival:
        staleness, samples = self._state.round - self._state.round_of(task), min(task.samples, self._limit)
        return Arrival(staleness, samples, task.seconds or 0.0)

    def _kept(self, buffer: dict[str, Any]) -> Arrival:
        staleness = self._state.round - int(buffer["round"])
        return Arrival(staleness, min(buffer["samples"], self._limit), buffer["seconds"] or 0.0, buffer["share"])


def plain(value: do.Basis | do.Contribution) -> dict[str, Any]:
    """As JSON, with lists for tuples."""
    body: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return body
