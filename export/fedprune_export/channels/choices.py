"""Choices: operators whose channels can be cut in more than one way, of which only one fits a rectangular tensor.

An axis of heads × dims loses whole heads, or the same dims of every head; a grouped convolution whole groups, or the
same position in every group. Each such node offers its options, coarsest first. The channel rules run over the whole
graph with one option per node; a node whose option left fewer than two channels to choose from is advanced to its next
option, and the rules run again. Every run is right in itself: another option only makes more channels prunable.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, TypeVar

import numpy as np

from fedprune_export.channels.atoms import AtomRow

# Which option comes first: whole heads and groups, or positions within all of them.
Prefer = Literal["coarse", "fine"]

Option = TypeVar("Option", bound=Hashable)

# The channels that a grouped operator can lose: whole groups, or the same positions of every group.
GROUPS, POSITIONS = "groups", "positions"

# How often a node may go through its options: the first time it may have failed for another node's choice.
_MAX_PASSES = 2


class Choices:
    """The options that were tried, per node, over all runs.

    `prefer`: whether the coarsest option is tried first, or the finest.
    """

    def __init__(self, prefer: Prefer = "coarse") -> None:
        self._reverse = prefer == "fine"
        self._tried: dict[str, set[Hashable]] = {}
        self._offered: dict[str, int] = {}
        self._passes_left: dict[str, int] = {}
        self._watched: dict[str, tuple[Hashable, list[AtomRow]]] = {}
        self._exhausted: set[str] = set()

    def begin(self) -> None:
        """Begin a new run: forget the rows that were watched in the last one."""
        self._watched, self._exhausted = {}, set()

    def next_option(self, key: str, options: Sequence[Option], *, ranked: bool = False) -> Option | None:
        """The first option of a node that hasn't failed yet; None if all have failed: then its channels stay.

        `options`: all options of the node, coarsest first; `ranked`: whether the first one is the best whatever is
        preferred.
        """
        tried = self._tried.setdefault(key, set())
        self._offered[key] = len(options)
        for option in reversed(options) if self._reverse and not ranked else options:
            if option not in tried:
                return option
        self._exhausted.add(key)
        return None

    def watch(self, key: str, option: Hashable, rows: Sequence[AtomRow]) -> None:
        """Register the rows in which the node's present option must leave channels to choose from."""
        self._watched[key] = (option, list(rows))

    def advance(self, unit: AtomRow, footprint: AtomRow) -> bool:
        """Advance the nodes none of whose rows has two units that could be a group; returns whether to run again.

        Of several only those with the most options left are advanced: queries that can lose heads or dimensions wait
        until keys and values in one tensor no longer choose between keys and values. A node that has run out of options
        gets one more pass, since it may have failed for another one's choice.
        `unit`: the unit of every atom after this run; `footprint`: per unit a number that is the same for units on the
        same axes of tensors.
        """
        failed = [
            (key, option)
            for key, (option, rows) in self._watched.items()
            if not any(_could_be_group(unit[row], footprint) for row in rows)
        ]
        options_left = {key: self._offered[key] - len(self._tried[key]) for key, _ in failed}
        for key, option in failed:
            if options_left[key] == max(options_left.values()):
                self._tried[key].add(option)
        runs_again = bool(failed)
        if not runs_again:
            for key in self._exhausted:
                passes = self._passes_left.setdefault(key, _MAX_PASSES - 1)
                if passes:
                    self._passes_left[key] = passes - 1
                    self._tried[key] = set()
                    runs_again = True
        return runs_again


def _could_be_group(row: AtomRow, footprint: AtomRow) -> bool:
    """Whether two units of a row could be channels of one group."""
    units = np.unique(row[row > 0])
    return bool(np.unique(footprint[units]).size < units.size)
