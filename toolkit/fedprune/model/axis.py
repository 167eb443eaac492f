"""Axes of tensors and values as runs of channels, and the rows of an architecture's cost table."""

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


@dataclass(frozen=True)
class Volume:
    """The size of a value for one sample: `positions` elements for each combination of indices of its channel axes."""

    axes: tuple[Axis, ...] = ()
    positions: int = 0

    def size(self, widths: Sequence[int], sizes: Sequence[int]) -> int:
        """Its elements for one sample at these widths; `sizes` are the groups' full widths."""
        total = self.positions
        for axis in self.axes:
            total *= axis.size(widths, sizes)
        return total


# Of a row of the cost table that reads or writes no data.
NO_VOLUME = Volume()

# Of a row of the cost table without an inner axis.
NO_AXIS = Axis(())


def json_int(value: object) -> int:
    """A whole JSON number of at most `MAX_SIZE`. Raises `ValueError` if it is something else."""
    if type(value) is not int or abs(value) > MAX_SIZE:
        raise ValueError(f"{str(value)[:40]!r} is not a whole number up to {MAX_SIZE}")
    return value


@dataclass(frozen=True)
class LayerRow:
    """A row of the cost table: a node that computes, and what its cost depends on.

    Attributes:
        name: The node's name.
        op: Its ONNX operator.
        weight: Name of its weight tensor; empty where it multiplies by none.
        positions: How often each weight is used per sample (output height × width for a convolution).
        output_axis: The weight's axis that makes output channels; a channel's score is taken over it.
        input_volume: The input that it reads for one sample, without weights.
        output_volume: The output that it writes for one sample.
        kernel: Elements of its window.
        stride: Product of its strides.
        groups: Groups of a convolution at full width.
        inner: The axis over which a product of two values sums; none for other rows.
    """

    name: str
    op: str
    weight: str
    positions: int
    output_axis: int = 0
    input_volume: Volume = NO_VOLUME
    output_volume: Volume = NO_VOLUME
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    inner: Axis = NO_AXIS

    def to_row(self) -> list[Any]:
        row: list[Any] = [self.name, self.op, self.weight, self.positions, self.output_axis]
        for volume in (self.input_volume, self.output_volume):
            row += [[a.to_rows() for a in volume.axes], volume.positions]
        return [*row, self.kernel, self.stride, self.groups, self.inner.to_rows()]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> LayerRow:
        """Read what `to_row` gave. Raises `ValueError, TypeError` if it is something else."""
        name, op, weight, positions, axis, read_axes, read_positions, made_axes, made_positions, *numbers, inner = row
        kernel, stride, groups = numbers
        return cls(
            str(name),
            str(op),
            str(weight),
            json_int(positions),
            json_int(axis),
            Volume(tuple(map(Axis.from_rows, read_axes)), json_int(read_positions)),
            Volume(tuple(map(Axis.from_rows, made_axes)), json_int(made_positions)),
            json_int(kernel),
            json_int(stride),
            json_int(groups),
            Axis.from_rows(inner),
        )


@dataclass(frozen=True)
class Activation:
    """A value that lives between layers: its channels and what one channel holds for one sample.

    Attributes:
        name: The value's name.
        channels: The channel axis.
        positions: Elements per channel and sample.
        is_kept: Whether the backward pass reads it, so that it lives through the whole step.
    """

    name: str
    channels: Axis
    positions: int
    is_kept: bool

    def to_row(self) -> list[Any]:
        return [self.name, self.channels.to_rows(), self.positions, int(self.is_kept)]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Activation:
        """Read what `to_row` gave. Raises `ValueError, TypeError` if it is something else."""
        name, channels, positions, is_kept = row
        return cls(str(name), Axis.from_rows(channels), json_int(positions), bool(json_int(is_kept)))
