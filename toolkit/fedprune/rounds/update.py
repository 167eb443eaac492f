"""One client's update of a round, before and after it is read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace

from fedprune.rounds.influence import shortened
from fedprune.strategies.roles import Report


@dataclass(frozen=True)
class RoundUpdate:
    """One update of a round, and how it is read.

    Attributes:
        device: The client's name.
        key: Identifies the content: updates of equal keys are equal bit for bit.
        weight: What it counts for.
        steps: Optimiser steps behind it.
        samples: Training samples that the client reports.
        read: Reads and decodes it; all is checked that doesn't depend on the round's sums.
        shares: By tensor the share of its change that counts, where that is less than all of it.
        checked: It is in memory and has passed `Round.check`; it isn't checked again.
    """

    device: str
    key: Hashable
    weight: int
    steps: int
    samples: int
    read: Callable[[], Report] = field(compare=False)
    shares: Mapping[str, float] = field(default_factory=dict)
    checked: bool = field(default=False, compare=False)

    def report(self) -> Report:
        """Read it, as far as it counts."""
        report = replace(self.read(), weight=self.weight)
        return shortened(report, self.shares) if self.shares else report
