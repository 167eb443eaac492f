"""Axes of tensors and values, as runs of channels: what a width changes about a shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

FIXED = -1
"""The group number of indices that belong to no channel group."""

MAX_SIZE = 2**31 - 1
"""No count and no length is larger."""


@dataclass(frozen=True)
class Segment:
    """A run of `count` channels of `group` from channel `start` on, each `inner` indices long."""

    group: int
    start: int
    count: int
    inner: int = 1

    @property
    def length(self) -> int:
        """Indices that the segment covers at full width."""
        return self.count * self.inner


@dataclass(frozen=True)
class Axis:
    """One axis of a tensor or value, as segments from index 0 on."""

    segments: tuple[Segment, ...]

    @classmethod
    def fixed(cls, size: int) -> Axis:
        """An axis that no cut touches."""
        return cls((Segment(FIXED, 0, size),))

    @cached_property
    def length(self) -> int:
        """Indices at full width."""
        return sum(s.length for s in self.segments)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        """The channel groups on this axis, ascending."""
        return tuple(sorted({s.group for s in self.segments if s.group != FIXED}))

    def to_rows(self) -> list[list[int]]:
        """As plain JSON types: group, start, count and inner of every segment."""
        return [[s.group, s.start, s.count, s.inner] for s in self.segments]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Any]]) -> Axis:
        """Read what `to_rows` gives; whether it makes sense is the architecture's to say. Raises `ValueError`,
        `TypeError` if it is something else."""
        return cls(tuple(Segment(whole(g), whole(s), whole(c), whole(i)) for g, s, c, i in rows))

    def size(self, widths: Sequence[int], sizes: Sequence[int]) -> int:
        """Indices that are left at these widths, of groups of these sizes."""
        total = 0
        per_group: dict[int, int] = {}
        for s in self.segments:
            if s.group == FIXED:
                total += s.length
            else:
                per_group[s.group] = per_group.get(s.group, 0) + s.length
        return total + sum(n * widths[g] // sizes[g] for g, n in per_group.items())


@dataclass(frozen=True)
class Volume:
    """What a value holds for one sample: its channel axes, and `positions` elements per index of these."""

    axes: tuple[Axis, ...] = ()
    positions: int = 0

    def size(self, widths: Sequence[int], sizes: Sequence[int]) -> int:
        """Elements of one sample that are left at these widths, of groups of these sizes."""
        total = self.positions
        for axis in self.axes:
            total *= axis.size(widths, sizes)
        return total


NOTHING = Volume()
"""What a row reads or makes that moves nothing."""

NO_AXIS = Axis(())
"""The axis of a row that has none."""


def whole(value: object) -> int:
    """A JSON number that is whole and of a size that anything here can have. Raises `ValueError` if it is something
    else."""
    if type(value) is not int or abs(value) > MAX_SIZE:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number up to {MAX_SIZE}")
    return value
