"""The core: the width that most boards of a fleet train together, and when wider boards train more than that."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import dataclass

from fedprune.core.settings import bounded, check_fields


@dataclass(frozen=True)
class SharedCore:
    """When boards train the core, and how wide it is: wider boards train it, too, until most of the job is over.

    It is the mixture of widths that costs accuracy, not narrow models: wide boards' gradients change channels with
    which narrow boards predict, and the other way round. So most of a job goes into one width. Models that were trained
    before have no core: what their other channels know would be lost.

    Attributes:
        board_share: The share of boards that can hold the core; the others train what they can hold.
        min_median_share: The share of the median board's density that the core has at least: a minority of boards that
            can hold little, or say so, doesn't narrow the model for all.
        until_share: The share of the job, by its rounds and its totals, after which each board trains all that it can
            hold.
        max_work: How many times boards repeat the recipe's epochs at most: narrow models have time for more of them.
    """

    board_share: float = bounded(0.75, 0, 1, above=True)
    min_median_share: float = bounded(0.5, 0, 1)
    until_share: float = bounded(0.8, 0, 1, above=True)
    max_work: int = bounded(4, 1, 100)

    def __post_init__(self) -> None:
        check_fields(self, ("core",))

    def is_shared_in(self, number: int, rounds: int, spent: float) -> bool:
        """Whether boards train the core in a round of this number, from 1; never in a job's last. `spent` is the share
        of the job's totals that will be spent after it, if it takes as much as those before it."""
        # The tolerance lets 0.8 of ten rounds be eight, whatever the product rounds to.
        return spent <= self.until_share + 1e-9 and number <= min(
            math.ceil(self.until_share * rounds - 1e-9), rounds - 1
        )

    def choose_core(self, counts: Counter[tuple[float, tuple[int, ...]]]) -> tuple[float, tuple[int, ...]]:
        """The core, as its share of the model and its widths. `counts` says how many boards can hold each share and
        widths."""
        min_density, needed_boards, boards = self.min_density(counts), self.board_share * counts.total() - 1e-9, 0
        # Widest first: the core is the largest submodel that enough boards can hold.
        for core in sorted((key for key in counts if key[0] >= min_density), reverse=True):
            boards += counts[core]
            if boards >= needed_boards:
                break
        return core

    def min_density(self, counts: Counter[tuple[float, tuple[int, ...]]]) -> float:
        """The least share of the model that the core may be: none where it is asked that all boards can hold it."""
        median_density = statistics.median_low(density for density, _ in counts.elements())
        return self.min_median_share * median_density if self.board_share < 1 else 0.0
