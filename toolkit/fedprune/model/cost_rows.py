"""Rows of an architecture's cost table: what computes, and what lives between, on axes that change with the widths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.model.axis import NO_AXIS, NOTHING, Axis, Volume, whole


@dataclass(frozen=True)
class Layer:
    """A row of the cost table: a node that computes, and what its cost depends on.

    Attributes:
        name: The node's name.
        op: Its ONNX operator.
        weight: Name of its weight tensor; empty where it multiplies by none.
        positions: How often each weight is used per sample (output height × width for a convolution).
        output_axis: The weight's axis that makes output channels; a channel's score is taken over it.
        reads: What it reads of one sample, without weights.
        makes: What it makes of one sample.
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
    reads: Volume = NOTHING
    makes: Volume = NOTHING
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    inner: Axis = NO_AXIS

    def to_row(self) -> list[Any]:
        """As JSON types."""
        row: list[Any] = [self.name, self.op, self.weight, self.positions, self.output_axis]
        for volume in (self.reads, self.makes):
            row += [[a.to_rows() for a in volume.axes], volume.positions]
        return [*row, self.kernel, self.stride, self.groups, self.inner.to_rows()]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Layer:
        """Read what `to_row` gave. Raises `ValueError, TypeError` if it is something else."""
        name, op, weight, positions, axis, read, reads, made, makes, kernel, stride, groups, inner = row
        return cls(
            str(name),
            str(op),
            str(weight),
            whole(positions),
            whole(axis),
            Volume(tuple(map(Axis.from_rows, read)), whole(reads)),
            Volume(tuple(map(Axis.from_rows, made)), whole(makes)),
            whole(kernel),
            whole(stride),
            whole(groups),
            Axis.from_rows(inner),
        )


@dataclass(frozen=True)
class Activation:
    """A value that lives between layers: its channels and what one channel holds for one sample.

    Attributes:
        name: The value's name.
        channels: The channel axis.
        positions: Elements per channel and sample.
        kept: Whether the backward pass reads it, so that it lives through the whole step.
    """

    name: str
    channels: Axis
    positions: int
    kept: bool

    def to_row(self) -> list[Any]:
        """As JSON types."""
        return [self.name, self.channels.to_rows(), self.positions, int(self.kept)]

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> Activation:
        """Read what `to_row` gave. Raises `ValueError, TypeError` if it is something else."""
        name, channels, positions, kept = row
        return cls(str(name), Axis.from_rows(channels), whole(positions), bool(whole(kept)))
