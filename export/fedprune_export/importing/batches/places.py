"""Where a value of a graph has the batch, and where a reshape takes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """The axis of a value that holds the batch.

    Attributes:
        axis: The axis, of size `outer` · batch · `inner`.
        added: Whether the file's own value lacks this axis, which is the first: the file has removed its batch of 1.
    """

    axis: int
    outer: int = 1
    inner: int = 1
    added: bool = False

    @property
    def is_exact(self) -> bool:
        """Whether the axis holds nothing but the batch."""
        return self.outer == self.inner == 1

    def freed(self, shape: Sequence[int], batch: int) -> tuple[int, ...]:
        """The shape of a value with a batch of this size, from the shape in the file."""
        if self.added:
            return (batch, *shape)
        return (*shape[: self.axis], self.outer * batch * self.inner, *shape[self.axis + 1 :])


ADDED = Place(0, added=True)


def places_after_reshape(place: Place, before: Sequence[int], after: Sequence[int], batch: int) -> list[Place]:
    """All places that the batch can have after a reshape of a file's value; several if `batch` is 1."""
    # A reshape keeps the order of numbers, so samples lie as far apart after it as before.
    stride = math.prod(before) if place.added else place.inner * math.prod(before[place.axis + 1 :])
    places = []
    for axis, size in enumerate(after):
        right = math.prod(after[axis + 1 :])
        if not size or not right or stride % right:
            continue
        inner = stride // right
        if inner and size % (inner * batch) == 0:
            places.append(Place(axis, size // (inner * batch), inner))
    return places
