"""Axes of tensors and values, as runs of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# The group number of indices that belong to no channel group.
FIXED = -1

# The largest count or length: more than any model has, and products of two still fit into 64 bits.
MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class Segment:
    """A run of `count` channels of `group` from channel `start` on, each `inner` indices long."""

    group: int
    start: int
    count: int
    inner: int = 1

    @property
    def length(self) -> int:
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
        return sum(s.length for s in self.segments)

    @cached_property
    def groups(self) -> tuple[int, ...]:
        return tuple(sorted({s.group for s in self.segments if s.group != FIXED}))

    def to_rows(self) -> list[list[int]]:
        """As plain JSON types: group, start, count and inner of every segment."""
        return [[s.group, s.start, s.count, s.inner] for s in self.segments]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[Any]]) -> Axis:
        """Read what `to_rows` gave; `Architecture.validate` checks its meaning. Raises `ValueError` or `TypeError` if
        it has another form."""
        return cls(tuple(Segment(json_int(g), json_int(s), json_int(c), json_int(i)) for g, s, c, i in rows))

    def size(self, widths: Sequence[int], sizes: Sequence[int]) -> int:
        """Its length at these widths; `sizes` are the groups' full widths."""
        total = 0
        lengths: dict[int, int] = {}
        for segment in self.segments:
            if segment.group == FIXED:
                total += segment.length
            else:
                lengths[segment.group] = lengths.get(segment.group, 0) + segment.length
        return total + sum(length * widths[group] // sizes[group] for group, length in lengths.items())


def json_int(value: object) -> int:
    """A whole JSON number of at most `MAX_SIZE`. Raises `ValueError` if it is something else."""
    if type(value) is not int or abs(value) > MAX_SIZE:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number up to {MAX_SIZE}")
    return value
