"""Sums of some of a model's tensors over some of a round's updates, on their way to the fold that closes the round.

Whole numbers add up exactly in any grouping. So a fold's work can be split by tensors, by updates, or by both, over as
many processes and machines as there are, and what comes together has the bits of one fold that did it all.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import Selection

Whole = npt.NDArray[np.int64]

Key = tuple[str, str, int]
"""Which sums: their kind, the tensor, the limb."""


@dataclass(frozen=True, eq=False)
class PartialSums:
    """What one fold has summed, in its layout, of the tensors that it was made of; `shares` is the weight of all
    updates by selection."""

    names: frozenset[str]
    layout: Selection
    shares: tuple[tuple[Selection, int], ...]
    updates: int
    arrays: dict[Key, Whole]

    @property
    def weight(self) -> int:
        """The weight of all updates."""
        return sum(weight for _, weight in self.shares)

    def same_updates(self, other: PartialSums) -> bool:
        """Whether another one's updates weigh and cover the same, in the same layout."""
        return (
            self.updates == other.updates
            and self.layout.digest == other.layout.digest
            and _counted(self) == _counted(other)
        )


def check_parts(parts: Sequence[PartialSums], architecture: Architecture, expected: Iterable[str]) -> None:
    """Make sure that sums of the same updates make up a model's, each tensor once. Raises `BundleError` if they
    don't."""
    names = [name for part in parts for name in part.names]
    if sorted(names) != sorted(expected):
        raise BundleError("partial sums", expected="each tensor of the model once", got=f"{len(names)} tensors")
    for part in parts:
        if part.layout.architecture.digest != architecture.digest:
            raise BundleError("partial sums are of another architecture")
        if not part.same_updates(parts[0]):
            raise BundleError("partial sums are of different updates")


def blocks(specs: Sequence[TensorSpec], most: int, least: int) -> list[frozenset[str]]:
    """Tensors dealt into `most` blocks of about the same size; fewer where they would have less than `least` numbers.

    A tensor is never split. The largest go first, each to the block that is smallest so far.
    """
    sizes = {spec.name: math.prod(spec.shape) for spec in specs}
    count = max(1, min(most, sum(sizes.values()) // max(1, least), len(sizes)))
    dealt: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        at = filled.index(min(filled))
        dealt[at].append(name)
        filled[at] += sizes[name]
    return [frozenset(names) for names in dealt if names]


def _counted(part: PartialSums) -> dict[str, int]:
    return {selection.digest: weight for selection, weight in part.shares}
