"""Secure aggregation in the worker: describes the masked vectors for offers, and closes rounds with their sums.

A *grid* says how the numbers of an update become whole numbers that can be masked: the range and step of each tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedprune.aggregation.fixed_point import Range
from fedprune.aggregation.update_sums import PartialSums
from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import commands as do
from fedprune.coordination.round import Round, RoundOutcome
from fedprune.core.errors import BundleError, ProtocolError
from fedprune.core.text import one_line
from fedprune.jobs.failure_kind import Failure, FailureKind
from fedprune.jobs.job import Job
from fedprune.model.selection import Selection
from fedprune.secure_aggregation.grid import CohortGrid, step_exponent
from fedprune.secure_aggregation.masks import Vector
from fedprune.secure_aggregation.vector_form import SECURE_FIELD, MaskedForm, TensorGrid
from fedprune_server.executor.round_closer import RoundCloser
from fedprune_server.executor.stored_updates import StoredUpdates

# Memory of how far the model moved in the last round: by tensor, the largest change of an element.
_LARGEST_DELTAS = "masked_deltas"

# How many times further than the model a single board's update can move an element in one round; the rest is kept for
# its next update. Larger steps would round more.
_MAX_DELTA_RATIO = 4.0


class MaskedSums(RoundCloser):
    """Describes the vectors of a round, and closes it with their sums."""

    def __init__(
        self, job: Job, updates: StoredUpdates, store: BlobStore, round_of: Callable[[do.Close | do.Basis], Round]
    ) -> None:
        super().__init__(updates, round_of)
        self._is_int8, self._store = job.compression == "int8", store

    def offer_fields(self, basis: do.Basis, device_part: do.DevicePart, selection: Selection) -> dict[str, Any]:
        """The description of the vector to mask."""
        grid = self._grid(self._round_of(basis), basis, device_part, selection)
        return {SECURE_FIELD: MaskedForm(grid.form, grid.narrow, grid.wide).to_json()}

    def close(self, command: do.Close) -> RoundOutcome:
        """Close a round. If a cohort's sum is impossible for boards that follow the protocol, none of its updates
        counts: a sum doesn't show which board is at fault."""
        contributions = {c.part.device: c for c in command.contributions}
        round_ = self._round_of(command)
        sums, rejected = list[PartialSums](), dict[str, Failure]()
        for cohort_sum in command.sums:
            try:
                members = [contributions[device] for device in cohort_sum.devices]
                sums.append(self._cohort_sums(round_, cohort_sum, members))
            except (ProtocolError, BundleError) as error:  # noqa: PERF203 - a false sum must not cost the others
                failure = Failure(FailureKind.FALSE_SUM, one_line(f"the sum of masked updates is false: {error}"))
                rejected |= dict.fromkeys(cohort_sum.devices, failure)
        if rejected and not sums:
            return RoundOutcome(rejected=rejected)
        try:
            counted = tuple(self._updates.round_update(c) for name, c in contributions.items() if name not in rejected)
            result = replace(round_.close_sums(sums, command.participants), updates=counted, rejected=rejected)
        except (ProtocolError, BundleError) as error:
            failure = Failure(FailureKind.OTHER, one_line(f"the sums of masked updates don't fit the round: {error}"))
            return RoundOutcome(rejected=dict.fromkeys(contributions, failure) | rejected)
        # Only int8's steps depend on how far the model moved.
        if not self._is_int8 or result.model is None:
            return result
        # By tensor, the largest change of an element.
        model_before = round_.scene.model
        deltas = {
            name: np.array(
                [np.max(np.abs(result.model[name].astype(np.float64) - model_before[name]), initial=0.0)], np.float32
            )
            for name in model_before
        }
        return replace(result, memories={**result.memories, _LARGEST_DELTAS: deltas})

    def _cohort_sums(self, round_: Round, cohort_sum: do.CohortSum, cohort: Sequence[do.Contribution]) -> PartialSums:
        """The sum of a cohort, whose devices were all sent the same."""
        archive, first = self._updates.archive, cohort[0]
        selection = archive.selection(first.ranking or first.basis.ranking, first.widths or first.part.widths)
        grid = self._grid(round_, first.basis, first.part, selection, len(cohort_sum.devices))
        raw = self._store.read(cohort_sum.total)
        wide_offset = 4 * cohort_sum.narrow
        # The sizes come from outside: numbers that are read at other places would make a false model.
        if cohort_sum.narrow != grid.narrow or len(raw) != wide_offset + 8 * grid.wide:
            raise ProtocolError("bytes of a cohort's sum", expected=4 * grid.narrow + 8 * grid.wide, got=len(raw))
        total = Vector(np.frombuffer(raw[:wide_offset], "<u4"), np.frombuffer(raw[wide_offset:], "<u8"))
        sent = selection.gather(round_.scene.model) | dict(archive.sent_weights(first.sent))
        return grid.partial_sums(total, len(cohort_sum.devices), sent)

    def _grid(
        self, round_: Round, basis: do.Basis, device_part: do.DevicePart, selection: Selection, boards: int = 1
    ) -> CohortGrid:
        fold, withheld = round_.fold, self._updates.withheld_names(basis, device_part)
        deltas = round_.scene.memory.get(_LARGEST_DELTAS, {}) if self._is_int8 else {}
        tensors, withheld_ranges = dict[str, TensorGrid](), dict[str, Range]()
        for spec in fold.shared:
            value_range = fold.sum_range(spec.name)
            if spec.name in withheld:
                withheld_ranges[spec.name] = value_range
            else:
                step = _tensor_step(value_range, deltas, spec.name) if spec.kind.is_trainable else None
                tensors[spec.name] = TensorGrid(value_range, step)
        return CohortGrid(selection, tensors, boards, withheld_ranges)


def _tensor_step(span: Range, deltas: Mapping[str, Any], name: str) -> int | None:
    """The exponent of a tensor's step; None as long as no change is known, when its numbers travel as they are."""
    if name not in deltas or not float(deltas[name][0]) > 0:
        return None
    low, high = TensorGrid.step_range(span)
    return min(max(step_exponent(_MAX_DELTA_RATIO * float(deltas[name][0])), low), high)
