"""Choices: operators whose channels can be cut in more than one way, only one of which fits a rectangular tensor.

An axis of heads × dims loses whole heads, or the same dims of every head; a grouped convolution whole groups, or the
same position in every group. Each such node offers its options, coarsest first. The rules run over the whole graph with
the options at hand; what left fewer than two channels to choose from is advanced to its next option, and they run
again. Every run is right in itself: another option only makes more channels prunable.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, TypeVar

import numpy as np

from fedprune_export.channels.atoms import AtomRow

Prefer = Literal["coarse", "fine"]
"""Which option comes first: whole heads and groups, or positions within all of them."""

Option = TypeVar("Option", bound=Hashable)

_LIVES = 2


class Choices:
    """Which options were tried, per node; kept from run to run.

    Args:
        prefer: Whether the coarsest option is tried first, or the finest.
    """

    def __init__(self, prefer: Prefer = "coarse") -> None:
        self._reverse = prefer == "fine"
        self._tried: dict[str, set[Hashable]] = {}
        self._lives: dict[str, int] = {}
        self._watched: dict[str, tuple[Hashable, list[AtomRow]]] = {}
        self._spent: set[str] = set()

    def begin(self) -> None:
        """Forget what was watched: a new run begins."""
        self._watched, self._spent = {}, set()

    def pick(self, key: str, options: Sequence[Option], *, ranked: bool = False) -> Option | None:
        """The first option of a node that hasn't failed yet.

        Args:
            key: The node, by its first output.
            options: What it offers, coarsest first.
            ranked: Whether the first is the better one whatever is preferred.

        Returns:
            The option, or None if all have failed: then the channels stay.
        """
        tried = self._tried.setdefault(key, set())
        for option in reversed(options) if self._reverse and not ranked else options:
            if option not in tried:
                return option
        self._spent.add(key)
        return None

    def watch(self, key: str, option: Hashable, rows: Sequence[AtomRow]) -> None:
        """Say in which rows the option picked last must leave channels to choose from."""
        self._watched[key] = (option, list(rows))

    def advance(self, unit: AtomRow, footprint: AtomRow) -> bool:
        """Advance what left no row with two units that could be a group; say whether another run is worth it.

        A node that has run out of options gets one more round, since it may have failed for another one's choice.

        Args:
            unit: The unit of every atom after this run.
            footprint: Per unit a number that is the same for units on the same axes of tensors.
        """
        failed = [
            (key, option)
            for key, (option, rows) in self._watched.items()
            if not any(_alike(unit[row], footprint) for row in rows)
        ]
        for key, option in failed:
            self._tried[key].add(option)
        again = bool(failed)
        if not again:
            for key in self._spent:
                lives = self._lives.setdefault(key, _LIVES - 1)
                if lives:
                    self._lives[key] = lives - 1
                    self._tried[key] = set()
                    again = True
        return again


def _alike(row: AtomRow, footprint: AtomRow) -> bool:
    """Whether two units of a row could be channels of one group."""
    units = np.unique(row[row > 0])
    return bool(np.unique(footprint[units]).size < units.size)
