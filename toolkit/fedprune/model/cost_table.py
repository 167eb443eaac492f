"""Rows of an architecture's cost table: what each operator reads, computes and writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.model.axis import Axis, json_int


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


@dataclass(frozen=True)
class LayerRow:
    """A row of the cost table: an operator that computes, and what its cost depends on.

    Attributes:
        op: The ONNX operator.
        weight: Name of its weight tensor; empty where it multiplies by none.
        positions: How often each weight is used per sample (output height × width for a convolution).
        output_axis: The weight's axis that makes output channels; a channel's score is taken over it.
        input_volume: The input that it reads for one sample, without weights; `output_volume` what it writes.
        kernel: Elements of its window.
        stride: Product of its strides.
        groups: Groups of a convolution at full width.
        inner: The axis over which a product of two values sums; empty for other rows.
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
    """A value that lives between layers: its channels, and the elements per channel and sample (`positions`). If the
    backward pass reads it, it is kept through the whole step."""

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
