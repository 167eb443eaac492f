"""What a simulation notes of every round, beside what the coordinator keeps: costs, channels, measurements."""

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
from fedprune.planning.costs import costs_at
from fedprune.training.recipe import Recipe
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive
from fedprune_server.simulation.measure import Hook, Moment

_MAPS = 100
"""In about so many of a run's rounds it is noted which channels were trained."""


@dataclass
class Notes:
    """What the simulation keeps of a finished round.

    Attributes:
        down: Bytes sent to devices since the run began.
        up: Bytes sent by devices since the run began.
        devices: Of each device, since the round before ended: bytes sent to it, bytes that it sent, MACs of
            its training.
        measured: What was measured of the global model, in the simulation alone.
        updates: How many updates the round's model is made of.
        coverage: How many of them held each channel, per group; empty in rounds that were left out.
    """

    down: int = 0
    up: int = 0
    devices: dict[str, list[int]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)
    updates: int = 0
    coverage: list[list[int]] = field(default_factory=list)


class RoundRecorder:
    """Fills in notes while a round's blobs are there.

    Args:
        job: The job's settings.
        model: The imported model.
        store: Where the blobs lie.
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
        """Note a round that has just closed.

        Args:
            notes: Where.
            command: What closed it.
            event: What came of that.
            basis: What submodels were cut from last; for a round that no update entered.
            clock: Virtual seconds since the beginning.
            before: The clock when the round before ended; 0 in the first.

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
        """Whether channels are noted in a round."""
        return number % max(1, self._job.rounds // _MAPS) == 0 or number in (1, self._job.rounds)

    def macs(self, device: str, number: int, offer: Mapping[str, Any], steps: int, samples: int) -> int:
        """MACs of a training, forward and backward, each step at the widths that it trained at.

        Args:
            device: The device's name.
            number: The round.
            offer: What it was offered.
            steps: Steps that it took.
            samples: Its training samples.
        """
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
        """How many updates held each channel, per group."""
        counts = [np.zeros(size, np.int64) for size in self._model.architecture.sizes]
        for found in parts:
            selection = self._archive.selection(found.ranking or found.basis.ranking, found.widths or found.part.widths)
            for count, rank, width in zip(counts, selection.ranks, selection.widths, strict=True):
                count[rank[:width]] += 1
        return [[int(c) for c in count] for count in counts]
