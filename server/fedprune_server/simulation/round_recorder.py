"""Notes of each simulated round: costs of devices, coverage of channels, and measurements of the global model.

The coordinator never sees them, so a test set used here can't leak into allocators, schedules or early stopping.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core import tensorfile
from fedprune.core.rng import keyed_generator
from fedprune.jobs.job import Job
from fedprune.model.element_mask import mask_from_bits
from fedprune.model.nested_widths import TensorAxes, axes_json
from fedprune.model.recipe import Recipe
from fedprune.planning.costs import active_macs_share, costs_at
from fedprune_export.pruning.model import Model
from fedprune_server.executor.archive import Archive
from fedprune_server.monitoring.round_rows import RoundNotes
from fedprune_server.simulation.measure import MeasuredRound, MeasurementHook

_MAX_MAPS = 100  # approximate number of rounds whose channel coverage is recorded


class RoundRecorder:
    """Records a round's notes while its blobs exist."""

    def __init__(self, job: Job, model: Model, store: BlobStore, measure: MeasurementHook | None) -> None:
        self._job = job
        self._model = model
        self._store = store
        self._archive = Archive(model.architecture, store)
        self._measure = measure
        self._macs: dict[tuple[int, ...], int] = {}
        self._shares: dict[tuple[str, tuple[int, ...]], float] = {}

    def record_round(
        self, notes: RoundNotes, command: do.Close, event: on.Closed, basis: do.Basis, clock: float, before: float
    ) -> None:
        """Record a closed round.

        Raises `FedpruneError` if the measurement fails.

        Args:
            basis: Source of the last submodels, for a round without updates.
            before: The clock at the previous round's end; 0 in the first round.
        """
        contributions = [c for c in command.contributions if c.part.device not in event.rejected]
        notes.updates, notes.limited = len(contributions), event.reduced
        number, rounds = command.round, self._job.rounds
        if contributions and (number % max(1, rounds // _MAX_MAPS) == 0 or number in (1, rounds)):
            notes.coverage = self._coverage(contributions)
        # Before the first ranking there is nothing that a submodel could be cut by.
        if self._measure is None or not (contributions or basis.ranking):
            return
        moment = MeasuredRound(
            self._job,
            self._model,
            command.round,
            clock,
            before,
            tuple(c.part for c in contributions),
            max((c.basis for c in contributions), key=lambda b: b.round, default=basis),
            event.model,
            self._archive,
        )
        measurements = {str(k): float(v) for k, v in self._measure(moment).items()}
        # Any function may measure, and what isn't finite can't be written as JSON.
        notes.measured = {k: v for k, v in measurements.items() if math.isfinite(v)}

    def macs(self, device: str, number: int, offer: Mapping[str, Any], steps: int, samples: int) -> int:
        """MACs of a training, forward and backward, with each step at its own widths."""
        widths, recipe = tuple(offer["widths"]), Recipe.from_dict(offer["recipe"])
        # Rounded up: the last batch of an epoch may be smaller.
        per_epoch = -(-samples // recipe.batch_size)
        if not recipe.ordered_dropout:
            epochs, remaining_steps = divmod(steps, per_epoch)
            trained_samples = epochs * samples + min(remaining_steps * recipe.batch_size, samples)
            return self._macs_per_sample(widths) * trained_samples
        plans = self._axes.step_widths(widths, recipe.ordered_dropout)
        total = 0
        for step in range(1, steps + 1):
            # The board's own draw of a step's width, by the same keys (`fedprune_device.training`).
            plan_index = int(keyed_generator(offer["seed"], number, device, "widths", step).integers(len(plans)))
            first_sample = (step - 1) % per_epoch * recipe.batch_size
            total += self._macs_per_sample(plans[plan_index]) * min(recipe.batch_size, samples - first_sample)
        return total

    def active_share(self, offer: Mapping[str, Any]) -> float:
        """Share of a training's MACs whose weight is active in the offer's mask; 1 without one."""
        if not offer.get("mask"):
            return 1.0
        widths, architecture = tuple(offer["widths"]), self._model.architecture
        key = offer["mask"]["sha256"], widths
        if key not in self._shares:
            mask = mask_from_bits(tensorfile.decode(self._store.read(key[0])), architecture.shapes(widths))
            self._shares = {key: active_macs_share(architecture, widths, mask)}  # a round's masks are mostly alike
        return self._shares[key]

    def _macs_per_sample(self, widths: tuple[int, ...]) -> int:
        if widths not in self._macs:
            self._macs[widths] = costs_at(self._model.architecture, widths).training_macs
        return self._macs[widths]

    @cached_property
    def _axes(self) -> TensorAxes:
        return TensorAxes.from_json(axes_json(self._model.architecture))

    def _coverage(self, contributions: Sequence[do.Contribution]) -> list[list[int]]:
        """Number of updates that held each channel, per group."""
        counts = [np.zeros(size, np.int64) for size in self._model.architecture.sizes]
        for contribution in contributions:
            selection = self._archive.selection(
                contribution.ranking or contribution.basis.ranking, contribution.widths or contribution.part.widths
            )
            for count, rank, width in zip(counts, selection.ranks, selection.widths, strict=True):
                count[rank[:width]] += 1
        return [[int(c) for c in count] for count in counts]
