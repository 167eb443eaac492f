"""Tries, for each operator whose channels can be cut in more than one way, one way after the other until one works.

An axis of heads × dims loses whole heads, or the same dims of every head; a grouped convolution whole groups, or the
same position in every group. Each such node offers its options, coarsest first. The channel rules run over the whole
graph with one option per node; an option that left fewer than two channels to choose from is rejected, and the rules
run again with the node's next one. Every run is right in itself: another option only makes more channels prunable.

Indices of an axis that can only be cut together are a *unit* (`atoms`); units on the same axes of tensors have the same
*footprint*, and may be channels of one group.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

import numpy as np

from fedprune_export.channels.atoms import AtomRow
from fedprune_export.model_options import Prefer

Option = TypeVar("Option", bound=Hashable)

# The channels that a grouped operator can lose: whole groups, or the same positions of every group.
GROUPS, POSITIONS = "groups", "positions"


class Choices:
    """The options that have failed, per node, over all runs.

    `prefer`: whether the coarsest option is tried first, or the finest.
    """

    def __init__(self, prefer: Prefer = "coarse") -> None:
        self._reverse = prefer == "fine"
        self._failed: dict[str, set[Hashable]] = {}
        # Of the present run: each node's number of options that are left, and the option with the rows that show
        # whether it works.
        self._left: dict[str, int] = {}
        self._watched: dict[str, tuple[Hashable, list[AtomRow]]] = {}

    def begin(self) -> None:
        """Begin a new run: forget the rows that were watched in the last one."""
        self._left, self._watched = {}, {}

    def next_option(self, key: str, options: Sequence[Option], *, ranked: bool = False) -> Option | None:
        """The first option of a node that hasn't failed yet; None if all have failed: then its channels stay.

        `options`: all options of the node, coarsest first; `ranked`: whether the first one is the best whatever is
        preferred.
        """
        failed = self._failed.setdefault(key, set())
        self._left[key] = len(options) - len(failed)
        return next(
            (o for o in (reversed(options) if self._reverse and not ranked else options) if o not in failed), None
        )

    def expect_choice(self, key: str, option: Hashable, rows: Sequence[AtomRow]) -> None:
        """Register the rows in which the node's present option must leave channels to choose from."""
        self._watched[key] = (option, list(rows))

    def reject_failed_options(self, unit: AtomRow, footprint: AtomRow) -> bool:
        """Reject each option that left no choice: none of its watched rows has two units that could be one group.

        Returns whether the rules must run again. If several fail, only those of the nodes with the most options left
        are rejected. In attention, for example, keys and values in one tensor have more options than queries: queries
        wait until theirs are settled. `unit`: the unit of every index (atom) after this run; `footprint`: per unit a
        number for its footprint.
        """
        failed = []
        for key, (option, rows) in self._watched.items():
            units = [np.unique(unit[row][unit[row] > 0]) for row in rows]
            if not any(np.unique(footprint[u]).size < u.size for u in units):
                failed.append((key, option))
        most_left = max((self._left[key] for key, _ in failed), default=0)
        for key, option in failed:
            if self._left[key] == most_left:
                self._failed[key].add(option)
        return bool(failed)
