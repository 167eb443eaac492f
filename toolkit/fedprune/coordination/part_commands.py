"""The commands about devices' parts of a round, as the job's state says them."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import convert

from fedprune.coordination import commands as do
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, State
from fedprune.strategies.strategy import Strategy


class PartCommands:
    """Makes commands, and changes nothing: a *part* is a device's participation in a round."""

    def __init__(self, job: Job, strategy: Strategy, state: State) -> None:
        self._job, self._strategy, self._state = job, strategy, state

    def current_basis(self) -> do.Basis:
        """The model and rankings from which the parts of the current round are cut."""
        state = self._state
        return do.Basis(state.round, state.model, state.ranking or "", state.order, dict(state.memory))

    def extract_commands(self, names: Iterable[str]) -> list[do.Command]:
        """Have the submodels of these devices cut, and encoded as the devices can decode them."""
        devices = self._state.devices.values()
        levels = self._strategy.levels(d.density for d in devices if d.widths and not d.excluded)
        return [self._extract_command(name, self._state.tasks[name], levels) for name in names]

    def _extract_command(self, name: str, task: DeviceTask, levels: tuple[float, ...]) -> do.Extract:
        device = self._state.devices[name]
        received = convert(device.held, do.ReceivedWeights | None)
        coding = do.Coding(*self._strategy.codecs(self._job, device.profile.get("name"), device.codecs), received)
        part = _device_part(name, task)
        unit = (device.probe or {}).get("unit", "")
        return do.Extract(self.basis_of(task), part, coding, task.accumulate, unit, levels)

    def basis_of(self, task: DeviceTask) -> do.Basis:
        """What a part was cut from: in an asynchronous job an earlier round's, which the part itself remembers."""
        return self.current_basis() if task.basis is None else convert(task.basis, do.Basis)

    def contribution(self, name: str, task: DeviceTask, weight: int) -> do.Contribution:
        """A device's update that is stored, with what it was offered; `weight` is what it counts for in the sums."""
        offer = task.offer or {}
        mask = offer.get("mask")
        return do.Contribution(
            basis=self.basis_of(task),
            part=_device_part(name, task),
            sent=offer["weights"]["sha256"],
            mask=mask["sha256"] if mask else None,
            weights=task.weights,
            weight=weight,
            steps=task.steps,
            widths=tuple(offer["widths"]),
            ranking=offer.get("ranking"),
            codec=offer.get("codec"),
        )

    def fold_command(self, name: str, task: DeviceTask, weight: int) -> do.FoldUpdate:
        """Add a device's stored update to the sums of the current round."""
        state = self._state
        return do.FoldUpdate(state.round, state.model, dict(state.memory), self.contribution(name, task, weight))


def _device_part(name: str, task: DeviceTask) -> do.DevicePart:
    """A device's part as the server's worker needs to know it."""
    return do.DevicePart(
        device=name,
        attempt=task.attempt,
        widths=task.widths,
        density=task.density,
        samples=task.samples,
        past=convert(task.past, do.LastCountedUpdate | None),
        last_counted_round=task.last_counted_round,
        work=task.work,
    )
