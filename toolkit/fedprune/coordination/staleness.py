"""Weights of updates in an asynchronous job, computed from its state by the schedule."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from typing import Any

from fedprune.coordination import commands as do
from fedprune.coordination.weight_limits import weight_limit_of_counts
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Schedule
from fedprune.jobs.state import DeviceTask, Progress, State
from fedprune.jobs.update_weights import Arrival, staleness_share, step_size, update_weights, weights_fit, window_count


class UpdateWeights:
    """Weights of updates, by a schedule's formulas and a job's state.

    An event changes one device. Sums over the fleet are corrected by the devices that have changed, so that the work
    of an event doesn't grow with the fleet.
    """

    def __init__(self, state: State, schedule: Schedule, job: Job, *, uniform: bool) -> None:
        self._state = state
        self._schedule = schedule
        self._job = job
        self._uniform = uniform
        self._changed = (state.devices.watch(), state.tasks.watch())
        self._samples: dict[str, int] = {}
        self._sample_counts: Counter[int] = Counter()
        self._weight_limit, self._total_samples = 0, 0
        self._rows: dict[str, tuple[int, float, int]] = {}
        self._kind_counts: Counter[tuple[int, float]] = Counter()
        self._unbiased_weight = 0

    def weight(self, name: str) -> int:
        """The provisional weight of a device's update. If it differs at the round's close, the sums are made again."""
        self._refresh()
        state, schedule = self._state, self._schedule
        arrival = self._arrival_of_task(state.tasks[name])
        other_arrivals: list[Arrival]
        if schedule.mixing != "unbiased":
            # All that matters of others is whether any is stale: one update of each kind suffices.
            model_round, share, _ = self._rows[name]
            kinds = (k for k, count in self._kind_counts.items() if count > (k == (model_round, share)))
            other_arrivals = [Arrival(state.round - model_round, 1, 0.0, share) for model_round, share in kinds]
        # Below the limit of the sums no weight is scaled down, so that none depends on the others.
        elif weights_fit(self._unbiased_weight, len(self._rows), self._total_samples):
            other_arrivals = []
        else:
            other_arrivals = [a for n in self._rows if n != name and (a := self._expected_arrival(n)) is not None]
        return update_weights(schedule, [arrival, *other_arrivals], self._total_samples, uniform=self._uniform)[0]

    def closing_record(self, fresh: dict[str, DeviceTask]) -> dict[str, Any]:
        """The addends of the sums: these updates and, if the schedule keeps them, the other devices' last ones; as JSON
        for `State.closing`: `rate`, `fresh` (names) and `weights` by name."""
        self._refresh()
        state, schedule = self._state, self._schedule
        entering = {n: self._arrival_of_task(t) for n, t in fresh.items()}
        other_arrivals = []
        for name, device in sorted(state.devices.items()) if schedule.keep or schedule.step_needs_all_devices else ():
            kept_arrival = None if device.buffer is None else self._arrival_of_buffer(device.buffer)
            # An excluded device that has no kept update takes no part: its share must not shorten the step.
            if name in entering or (device.excluded and kept_arrival is None):
                continue
            if schedule.keep and kept_arrival is not None and schedule.accepts_staleness(kept_arrival.staleness):
                entering[name] = kept_arrival
            else:
                other_arrivals.append(kept_arrival or Arrival(0, min(device.samples, self._weight_limit)))
        names = sorted(entering)
        arrivals = [entering[n] for n in names]
        weights = update_weights(schedule, arrivals, self._total_samples, uniform=self._uniform)
        rate = step_size(schedule, arrivals, other_arrivals, uniform=self._uniform)
        return {"rate": rate, "fresh": sorted(fresh), "weights": dict(zip(names, weights, strict=True))}

    def buffer_record(self, task: DeviceTask, contribution: dict[str, Any]) -> dict[str, Any]:
        """The record of a device's counted update; `plain_json` makes `contribution`, which is dropped where the
        schedule doesn't keep updates."""
        self._refresh()
        return {
            "round": self._state.round_of(task),
            "samples": task.samples,
            "seconds": task.seconds,
            "share": staleness_share(self._schedule, self._arrival_of_task(task)),
            "contribution": contribution if self._schedule.keep else None,
        }

    def _refresh(self) -> None:
        """Bring sums and counts up to date with what has changed in the state."""
        devices, names = self._state.devices, set().union(*self._changed)
        for changed in self._changed:
            changed.clear()
        new_samples = {
            name: devices[name].samples
            for name in names
            if name in devices and self._samples.get(name) != devices[name].samples
        }
        if new_samples:
            self._sample_counts.subtract(self._samples[name] for name in new_samples if name in self._samples)
            self._sample_counts.update(new_samples.values())
            self._sample_counts += Counter()  # without the zeros
            self._samples |= new_samples
            limit = weight_limit_of_counts(self._sample_counts, self._job.weight_limit, self._job.most_samples)
            if limit != self._weight_limit:
                names |= self._rows.keys()  # it may change what they count for
            self._weight_limit = limit
            self._total_samples = sum(
                count * (1 if self._uniform else max(1, min(samples, limit)))
                for samples, count in self._sample_counts.items()
            )
        for name in names:
            if name in self._rows:
                model_round, share, unbiased_weight = self._rows.pop(name)
                self._kind_counts[model_round, share] -= 1
                self._unbiased_weight -= unbiased_weight
                if not self._kind_counts[model_round, share]:
                    del self._kind_counts[model_round, share]
            arrival = self._expected_arrival(name)
            if arrival is not None:
                model_round, unbiased_weight = self._state.round - arrival.staleness, 0
                if self._schedule.mixing == "unbiased":
                    unbiased_weight = window_count(self._schedule, arrival) * (
                        1 if self._uniform else max(1, arrival.samples)
                    )
                self._rows[name] = (model_round, arrival.share, unbiased_weight)
                self._kind_counts[model_round, arrival.share] += 1
                self._unbiased_weight += unbiased_weight

    def _expected_arrival(self, name: str) -> Arrival | None:
        """A device's update that may enter the next sums: that of its task, else the last one, where it is kept."""
        task = self._state.tasks.get(name)
        if task is not None:
            return None if task.progress is Progress.REFUSED else self._arrival_of_task(task)
        buffer = self._state.devices[name].buffer if self._schedule.keep and name in self._state.devices else None
        return None if buffer is None else self._arrival_of_buffer(buffer)

    def _arrival_of_task(self, task: DeviceTask) -> Arrival:
        staleness, samples = self._state.round - self._state.round_of(task), min(task.samples, self._weight_limit)
        return Arrival(staleness, samples, task.seconds or 0.0)

    def _arrival_of_buffer(self, buffer: dict[str, Any]) -> Arrival:
        staleness = self._state.round - int(buffer["round"])
        return Arrival(staleness, min(buffer["samples"], self._weight_limit), buffer["seconds"] or 0.0, buffer["share"])


def plain_json(value: do.Basis | do.Contribution) -> dict[str, Any]:
    """As JSON, with lists for tuples: a state that was saved and read again must be equal to the one in memory."""
    body: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return body
