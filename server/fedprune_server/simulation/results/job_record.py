"""Makes the record of a job from the coordinator's state, for reports of simulations and of real fleets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedprune import __version__
from fedprune.coordination import State
from fedprune.coordination.job_end import early_end_reason
from fedprune.jobs.job import Job
from fedprune.jobs.state import Progress
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Selection
from fedprune.planning.costs import costs_at
from fedprune_server.devices.plan_vs_actual import compare_device, predicted_figures, training_processor
from fedprune_server.monitoring.round_rows import RoundNotes, make_round_row
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.results.record import DeviceRow, Record


def job_record(
    title: str,
    job: Job,
    architecture: Architecture,
    state: State,
    *,
    notes: Mapping[int, RoundNotes] | None = None,
    ranking: str | bytes | None = None,
    measured: str = "",
    started_at: float = 0.0,
    partition: FleetData | None = None,
    uncalibrated: bool = False,
) -> Record:
    """The record of a job.

    Args:
        architecture: Its model's architecture.
        notes: Bytes of each round by its number, and the other notes of a simulation.
        ranking: The last round's selection as JSON, for the channel map.
        measured: Where bytes were counted.
        started_at: The run's start, on the clock of the state's history.
        partition: The fleet's data, if known.
        uncalibrated: Whether batch-norm statistics of the global model are averages of the boards'.
    """
    round_notes = notes or {}
    rounds = (
        make_round_row(e, round_notes.get(e["round"], RoundNotes()), started_at, job.recipe.judged_by)
        for e in state.history
    )
    refusals: dict[str, list[tuple[str, str]]] = {}  # reasons and kinds, one for each finished round that had one
    for round_row in state.history:
        for name, row in round_row["devices"].items():
            if row["progress"] == Progress.REFUSED.value:
                refusals.setdefault(name, []).append((str(row.get("reason", "")), str(row.get("kind", ""))))
    selection = None if ranking is None else Selection.from_json(ranking, architecture)
    devices = tuple(_device_row(n, job, architecture, state, refusals.get(n, [])) for n in sorted(state.devices))
    return Record(
        title=title,
        job=job.to_dict(),
        groups=tuple((_label(architecture, i), g.size) for i, g in enumerate(architecture.groups)),
        devices=devices,
        rounds=tuple(rounds),
        channels={
            d.name: tuple(tuple(map(int, rank[:width])) for rank, width in zip(selection.ranks, d.widths, strict=True))
            for d in devices
            if selection is not None and d.widths
        },
        measured=measured,
        partition=partition or FleetData(),
        version=__version__,
        uncalibrated=uncalibrated,
        ended_early=early_end_reason(job, state),
    )


def _device_row(
    name: str, job: Job, architecture: Architecture, state: State, refusals: Sequence[tuple[str, str]]
) -> DeviceRow:
    device = state.devices[name]
    prediction = predicted_figures(name, device, job, architecture)
    reason, kind = refusals[-1] if refusals else ("", "")
    return DeviceRow(
        name=name,
        profile=str(device.profile.get("name", "")),
        samples=device.samples,
        widths=tuple(device.widths),
        # Planned, not trained: while a fleet shares a core, boards train less than their plans say.
        density=device.plan["density"] if device.plan else device.density,
        bound=device.plan["bound"] if device.plan else "",
        parameters=costs_at(architecture, device.widths).parameters if device.widths else 0,
        excluded=device.excluded,
        compared=compare_device(name, state, prediction),
        missed=len(refusals),
        why=reason,
        kind=kind,
        unit=training_processor(device),
        train_j=(prediction or {}).get("train_j"),
        warning=device.plan["warning"] if device.plan else "",
        asked=device.plan["asked"]["density"] if device.plan and device.plan["asked"] else 0.0,
    )


def _label(architecture: Architecture, group: int) -> str:
    """The name of the layer that produces a group's channels."""
    members = architecture.members(group)
    return members[0].partition("[")[0].rpartition(".")[0] or members[0] if members else architecture.groups[group].name
