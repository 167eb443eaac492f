"""How much of each update counts, decided when a round closes: `fedprune.coordination.influence`, on stored updates."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fedprune.coordination import commands as do
from fedprune.coordination.influence import MEMORY, Bounds, Lengths, bounds, lengths, reaches, weight_limit
from fedprune.core.errors import StorageError
from fedprune.jobs.job import Job
from fedprune.strategies.roles import Memories, Report
from fedprune_server.executor.reports import Reports

log = logging.getLogger("fedprune.server")

_Key = tuple[str, str, str | None]

_NOTED = 2
"""Times its limit that a device's samples are when that is reported."""


@dataclass(frozen=True)
class Limited:
    """A round's updates under its limits.

    Attributes:
        contributions: The updates, each with the shares of its change that count.
        rejected: By device, why none of its update counts.
        reasons: By device, why much less counts than it sent.
        memories: What the job remembers of it.
    """

    contributions: tuple[do.Contribution, ...]
    rejected: dict[str, str]
    reasons: dict[str, str]
    memories: Memories


class Limits:
    """A job's limits on single updates.

    Args:
        job: The job's settings.
        reports: Reads updates.
        uniform: Whether devices count alike, whatever their samples.
    """

    def __init__(self, job: Job, reports: Reports, *, uniform: bool) -> None:
        self._job = job
        self._reports = reports
        self._uniform = uniform
        # The noise that boards share out is accounted for sums in which updates don't depend on one another.
        self._times = 0.0 if job.privacy.on and not job.privacy.local else job.move_limit
        self._lengths: dict[_Key, Lengths] = {}

    def learn(self, found: do.Contribution, known: Report | Lengths) -> None:
        """Note how far an update has moved, while it is in memory or as a helper has found it.

        Args:
            found: The update.
            known: Its checked report, or its lengths.
        """
        if self._times:
            self._lengths[_key(found)] = lengths(known) if isinstance(known, Report) else known

    def of(self, command: do.Close, counted: Sequence[do.Contribution]) -> Limited:
        """Apply the limits to updates that a round is about to close with.

        Args:
            command: The round's.
            counted: The updates.
        """
        reasons = self._heavy(counted)
        if not self._times or not counted:
            return Limited(tuple(counted), {}, reasons, {})
        for found in counted:
            if _key(found) not in self._lengths:
                try:
                    self.learn(found, self._reports.report(replace(found, shares={})))
                except (StorageError, MemoryError):
                    raise
                except Exception:
                    log.debug("length of the update of %s", found.part.device, exc_info=True)
        known = {_key(c) for c in counted} & self._lengths.keys()
        self._lengths = {key: self._lengths[key] for key in known}
        scene = self._reports.scene(command.round, command.model, command.memory)
        found_bounds: Bounds = bounds(
            {c.part.device: self._lengths[_key(c)] for c in counted if _key(c) in known},
            reaches({c.part.device: c.steps for c in counted if _key(c) in known}, self._job.weight_limit),
            scene.memory.get(MEMORY, {}),
            scene.architecture,
            scene.model,
            self._times,
        )
        left = [c for c in counted if c.part.device not in found_bounds.rejected]
        limited = tuple(replace(c, shares=found_bounds.shares.get(c.part.device, {})) for c in left)
        reasons |= found_bounds.reasons
        return Limited(limited, dict(found_bounds.rejected), reasons, {MEMORY: found_bounds.reference})

    def _heavy(self, counted: Sequence[do.Contribution]) -> dict[str, str]:
        """Devices that count for much less than the samples that they report."""
        if self._uniform:
            return {}
        samples = {c.part.device: c.part.samples for c in counted}
        limit = weight_limit(samples.values(), self._job.weight_limit, self._job.most_samples)
        return {
            device: f"it reports {count} samples and counts for {limit}, the most that one device may"
            for device, count in samples.items()
            if count > math.ceil(_NOTED * limit)
        }


def _key(found: do.Contribution) -> _Key:
    return found.weights, found.sent, found.mask
