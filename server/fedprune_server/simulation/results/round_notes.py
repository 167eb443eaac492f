"""A simulation's notes of every round, besides the coordinator's: costs, channels, measurements."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.rng import keyed
from fedprune.jobs.job import Job
from fedprune.model.nested_widths import TensorAxes, axes_json
from fedprune.model.recipe import Recipe
from fedprune.planning.costs import costs_at
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive
from fedprune_server.simulation.measure import Hook, Moment

_MAPS = 100
"""Approximate number of rounds whose channel coverage is recorded."""


@dataclass
class Notes:
    """Notes of a round.

    Attributes:
        down: Bytes sent to devices since the start.
        up: Bytes sent by devices since the start.
        devices: Bytes down, bytes up and training MACs of each device since the previous round.
        measured: Measurements of the global model.
        updates: Number of aggregated updates.
        coverage: Number of updates that held each channel, per group; empty if not recorded.
    """

    down: int = 0
    up: int = 0
    devices: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    coverage: list[list[int]] = field(default_factory=list)


class RoundRecorder:
    """Records a round's notes while its blobs exist.

    Args:
        job: The job's settings.
        model: The imported model.
        store: Blob store of the simulation.
        measure: Measures the global model, or None.
    """

    def __init__(self, job: Job, model: Model, store: BlobStore, measure: Hook | None) -> None:
        self._job = job
        self._model = model
        self._archive = Archive(model.architecture, store)
        self._measure = measure
        self._macs: dict[tuple[int, ...], int] = {}

    def close(
        self, notes: Notes, command: do.Close, event: on.Closed, basis: do.Basis, clock: float, before: float
    ) -> None:
        """Record a closed round.

        Args:
            notes: Notes to fill in.
            command: The command that closed it.
            event: Its result.
            basis: Source of the last submodels, for a round without updates.
            clock: Virtual seconds since the start.
            before: The clock at the previous round's end; 0 in the first round.

        Raises:
            FedpruneError: The measurement fails.
        """
        parts = [c for c in command.contributions if c.part.device not in event.rejected]
        notes.updates = len(parts)
        if parts and self._mapped(command.round):
            notes.coverage = self._coverage(parts)
        if self._measure is None or not (parts or basis.ranking):
            return
        moment = Moment(
            self._job,
            self._model,
            command.round,
            clock,
            before,
            tuple(c.part for c in parts),
            max((c.basis for c in parts), key=lambda b: b.round, default=basis),
            event.model,
            self._archive,
        )
        found = {str(k): float(v) for k, v in self._measure(moment).items()}
        # Any function may measure, and what isn't finite can't be written as JSON.
        notes.measured = {k: v for k, v in found.items() if math.isfinite(v)}

    def _mapped(self, number: int) -> bool:
        """Whether a round's channels are recorded."""
        return number % max(1, self._job.rounds // _MAPS) == 0 or number in (1, self._job.rounds)

    def macs(self, device: str, number: int, offer: Mapping[str, Any], steps: int, samples: int) -> int:
        """MACs of a training, forward and backward, with each step at its own widths."""
        widths, recipe = tuple(offer["widths"]), Recipe.from_dict(offer["recipe"])
        per_epoch = -(-samples // recipe.batch_size)
        if not recipe.ordered_dropout:
            epochs, rest = divmod(steps, per_epoch)
            return self._per_sample(widths) * (epochs * samples + min(rest * recipe.batch_size, samples))
        plans = self._axes.plans(widths, recipe.ordered_dropout)
        total = 0
        for step in range(1, steps + 1):
            chosen = int(keyed(offer["seed"], number, device, "widths", step).integers(len(plans)))
            begun = (step - 1) % per_epoch * recipe.batch_size
            total += self._per_sample(plans[chosen]) * min(recipe.batch_size, samples - begun)
        return total

    def _per_sample(self, widths: tuple[int, ...]) -> int:
        if widths not in self._macs:
            self._macs[widths] = costs_at(self._model.architecture, widths).training_macs
        return self._macs[widths]

    @cached_property
    def _axes(self) -> TensorAxes:
        return TensorAxes.from_json(axes_json(self._model.architecture))

    def _coverage(self, parts: Sequence[do.Contribution]) -> list[list[int]]:
        """Number of updates that held each channel, per group."""
        counts = [np.zeros(size, np.int64) for size in self._model.architecture.sizes]
        for found in parts:
            selection = self._archive.selection(found.ranking or found.basis.ranking, found.widths or found.part.widths)
            for count, rank, width in zip(counts, selection.ranks, selection.widths, strict=True):
                count[rank[:width]] += 1
        return [[int(c) for c in count] for count in counts]
