"""Applies a job's limits to the updates of a round, before they are summed.

`coordination.limits` computes how far an update may move the model, `coordination.weight_limits` what it may count for.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from fedprune.coordination.limits import REFERENCES_MEMORY, limit_round
from fedprune.coordination.update_lengths import ALL_TRAINED, UpdateLengths, measure_update
from fedprune.coordination.weight_limits import MIN_MAJORITY_UPDATES, weight_limit
from fedprune.core.errors import StorageError
from fedprune.jobs.job import Job
from fedprune.model.selection import Tensors
from fedprune.strategies.values import NewMemory, Scene, Submodel, UpdateReport

_LOG = logging.getLogger(__name__)


def shorten_update(report: UpdateReport, shares: Mapping[str, float]) -> UpdateReport:
    """The update with only a share of each tensor's change; tensors without a share stay bit for bit the same."""
    tensors = dict(report.trained.tensors)
    for name in shares.keys() & tensors.keys():
        before = report.sent.tensors[name].astype(np.float64)
        tensors[name] = (before + shares[name] * (tensors[name] - before)).astype(np.float32)
    return replace(report, trained=Submodel(report.trained.selection, tensors, report.trained.mask))


@dataclass(frozen=True)
class RoundUpdate:
    """One update of a round, and how it is read.

    Attributes:
        key: Identifies the content: updates of equal keys are equal bit for bit.
        read: Reads and decodes it; all is checked that doesn't depend on the round's sums.
        shares: By tensor the share of its change that counts, where that is less than all of it.
        is_checked: Whether it is in memory and has passed `Round.check`, so that it isn't checked again.
    """

    device: str
    key: Hashable
    weight: int
    samples: int
    read: Callable[[], UpdateReport] = field(compare=False)
    shares: Mapping[str, float] = field(default_factory=dict)
    is_checked: bool = field(default=False, compare=False)

    def report(self) -> UpdateReport:
        """Read the update, with the share of its change that counts."""
        report = replace(self.read(), weight=self.weight)
        return shorten_update(report, self.shares) if self.shares else report


# A device is named that reports more samples than this multiple of its limit: honest boards have a few times the
# median.
_REPORTED_SAMPLES_FACTOR = 8

# An update beyond the limit counts with this power of limit / distance: a reversed one is hardly twice as far from the
# mean as honest ones, so that a first power leaves most of it. Chosen on the digits of `benchmarks.robustness`.
_DISTANCE_POWER = 4


def _measured(update: RoundUpdate, mean_change: Tensors | None = None) -> UpdateLengths:
    """How far an update moves or, with the mean change of all, how far what counts of it is from that; nothing if it
    can't be read."""
    try:
        if mean_change is None:
            return measure_update(update.read())
        report = update.report()
        mean = report.trained.selection.gather(mean_change)
        moved = replace(report.sent, tensors={name: value + mean[name] for name, value in report.sent.tensors.items()})
        return measure_update(replace(report, read_sent=lambda: moved))
    except (StorageError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 - it fails again where it is read to be added, with its reason
        _LOG.debug("length of the update of %s", update.device, exc_info=True)
        return {}


@dataclass(frozen=True)
class LimitedUpdates:
    """A round's updates under its limits.

    Attributes:
        updates: Those that count, with the shares of their change that do.
        rejected: By device, why its update doesn't count.
        reasons: By device, why much less of its update counts than it sent.
        memories: The references that the job keeps for the next round.
        reduced: Devices whose update counts for less than it is, by however little, or whose samples count for much
            less.
    """

    updates: tuple[RoundUpdate, ...]
    rejected: Mapping[str, str]
    reasons: Mapping[str, str]
    memories: NewMemory
    reduced: frozenset[str] = frozenset()


class UpdateLimits:
    """Limits a round's updates, and remembers how far each has moved, so that no update is read twice.

    `uniform` says that devices count alike, whatever their samples.
    """

    def __init__(self, job: Job, *, uniform: bool) -> None:
        self._job = job
        self._uniform = uniform
        # The noise that boards share out is accounted for sums in which updates don't depend on one another.
        self._move_limit = 0.0 if job.privacy.is_on and not job.privacy.is_local else job.move_limit
        self._lengths: dict[Hashable, UpdateLengths] = {}

    def note_lengths(self, update: RoundUpdate, measured: UpdateReport | UpdateLengths) -> None:
        """Note how far an update moved, from its checked report or from its lengths."""
        if self._move_limit and update.key not in self._lengths:
            self._lengths[update.key] = measure_update(measured) if isinstance(measured, UpdateReport) else measured

    def limit_updates(self, scene: Scene, updates: Sequence[RoundUpdate]) -> LimitedUpdates:
        """Apply the limits to all updates of a round; those that can't be read are left as they are."""
        heavy_devices, reasons = self._overweight_devices(updates)
        if not self._move_limit or not updates:
            return LimitedUpdates(tuple(updates), {}, reasons, {}, heavy_devices)
        for update in updates:
            if update.key not in self._lengths and (lengths := _measured(update)):
                self.note_lengths(update, lengths)
        # Lengths of updates that are not in this round any more would pile up over a job.
        self._lengths = {u.key: self._lengths[u.key] for u in updates if u.key in self._lengths}
        measured = [u for u in updates if u.key in self._lengths]
        limits = limit_round(
            {u.device: self._lengths[u.key] for u in measured},
            scene.memory.get(REFERENCES_MEMORY, {}),
            scene.architecture,
            scene.model,
            self._move_limit,
        )
        accepted = [u for u in updates if u.device not in limits.rejected]
        limited = tuple(replace(u, shares=limits.shares.get(u.device, {})) for u in accepted)
        reduced = heavy_devices.union(u.device for u in limited if u.shares) - limits.rejected.keys()
        reasons = {**reasons, **limits.reasons}
        return LimitedUpdates(limited, limits.rejected, reasons, {REFERENCES_MEMORY: limits.references}, reduced)

    def limit_distances(self, scene: Scene, limited: LimitedUpdates, mean: Callable[[], Tensors]) -> LimitedUpdates:
        """Shorten the limited updates that are far from their mean, as a step towards their geometric median does
        (Pillutla et al. 2022): a reversed update can be as long as an honest one, but not as near to the others."""
        # Updates without any change are at equal distances, by which no other one is to be judged.
        moving = [u for u in limited.updates if self._lengths.get(u.key, {}).get(ALL_TRAINED)]
        if not self._move_limit or len(moving) < MIN_MAJORITY_UPDATES:
            return limited
        mean_change = {name: value - scene.model[name] for name, value in mean().items()}
        distances = {u.device: _measured(u, mean_change).get(ALL_TRAINED, 0.0) for u in moving}
        # An honest board whose data are new to the model may be as far away as others were when they were new.
        reference = float(limited.memories[REFERENCES_MEMORY][ALL_TRAINED][0])
        limit = max(reference, statistics.median_low(distances.values()))
        far = {d: (limit / distance) ** _DISTANCE_POWER for d, distance in distances.items() if distance > limit}
        trained = [t.name for t in scene.architecture.trainable]
        updates = []
        for update in limited.updates:
            shares = {n: far[update.device] * update.shares.get(n, 1.0) for n in trained if update.device in far}
            updates.append(replace(update, shares={**update.shares, **shares}))
        return replace(limited, updates=tuple(updates), reduced=limited.reduced | far.keys())

    def _overweight_devices(self, updates: Sequence[RoundUpdate]) -> tuple[frozenset[str], dict[str, str]]:
        """Devices that count for much less than the samples that they report, and why."""
        if self._uniform:
            return frozenset(), {}
        samples = {u.device: u.samples for u in updates}
        limit = weight_limit(samples.values(), self._job.weight_limit, self._job.most_samples)
        reasons = {
            device: f"it reports {count} samples and counts for {limit}, the most that one device may"
            for device, count in samples.items()
            if count > math.ceil(_REPORTED_SAMPLES_FACTOR * limit)
        }
        return frozenset(reasons), reasons
