"""A job's limits on single updates (`fedprune.rounds.influence`), applied to the updates of a round."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedprune.core.errors import StorageError
from fedprune.jobs.job import Job
from fedprune.rounds.influence import MEMORY, Lengths, bounds, lengths, reaches, weight_limit
from fedprune.rounds.update import RoundUpdate
from fedprune.strategies.roles import Memories, Report, Scene

_LOG = logging.getLogger(__name__)

_REPORTED = 2
"""A device is named that reports more samples than this multiple of its limit."""


@dataclass(frozen=True)
class LimitedUpdates:
    """A round's updates with the shares of their change that count, reasons of what doesn't, and what the job remembers
    of it."""

    updates: tuple[RoundUpdate, ...]
    rejected: Mapping[str, str]
    reasons: Mapping[str, str]
    memories: Memories


class UpdateLimits:
    """Keeps how far updates moved, so that none is read twice for its limits; `uniform` where devices count alike."""

    def __init__(self, job: Job, *, uniform: bool) -> None:
        self._job = job
        self._uniform = uniform
        # The noise that boards share out is accounted for sums in which updates don't depend on one another.
        self._times = 0.0 if job.privacy.on and not job.privacy.local else job.move_limit
        self._lengths: dict[Hashable, Lengths] = {}

    def learn(self, update: RoundUpdate, known: Report | Lengths) -> None:
        """Note how far an update moved, from its checked report or from its lengths."""
        if self._times and update.key not in self._lengths:
            self._lengths[update.key] = lengths(known) if isinstance(known, Report) else known

    def apply(self, scene: Scene, updates: Sequence[RoundUpdate]) -> LimitedUpdates:
        """Apply the limits to all updates of a round; those that can't be read are left as they are."""
        reasons = self._heavy(updates)
        if not self._times or not updates:
            return LimitedUpdates(tuple(updates), {}, reasons, {})
        for update in updates:
            if update.key not in self._lengths:
                try:
                    self.learn(update, update.read())
                except (StorageError, MemoryError):
                    raise
                except Exception:  # noqa: BLE001 - it fails again where it is read to be added, with its reason
                    _LOG.debug("length of the update of %s", update.device, exc_info=True)
        known = [u for u in updates if u.key in self._lengths]
        self._lengths = {u.key: self._lengths[u.key] for u in known}
        found = bounds(
            {u.device: self._lengths[u.key] for u in known},
            reaches({u.device: u.steps for u in known}, self._job.weight_limit),
            scene.memory.get(MEMORY, {}),
            scene.architecture,
            scene.model,
            self._times,
        )
        left = [u for u in updates if u.device not in found.rejected]
        limited = tuple(replace(u, shares=found.shares.get(u.device, {})) for u in left)
        return LimitedUpdates(limited, found.rejected, {**reasons, **found.reasons}, {MEMORY: found.reference})

    def _heavy(self, updates: Sequence[RoundUpdate]) -> dict[str, str]:
        """Devices that count for much less than the samples that they report."""
        if self._uniform:
            return {}
        samples = {u.device: u.samples for u in updates}
        limit = weight_limit(samples.values(), self._job.weight_limit, self._job.most_samples)
        return {
            device: f"it reports {count} samples and counts for {limit}, the most that one device may"
            for device, count in samples.items()
            if count > math.ceil(_REPORTED * limit)
        }
