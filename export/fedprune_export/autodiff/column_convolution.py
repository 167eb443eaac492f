"""Convolution as matrix products with columns (im2col), for small maps and for groups of any number and length.

A column has the numbers of the input under one position of the window. The product of the kernel with the columns of a
whole batch is the convolution.

- The number of groups varies with the width (whole groups are cut): columns for everything, as Conv has a fixed number.
- The map is small: columns for everything, because they are faster. onnxruntime's Conv computes a product per sample.
- Otherwise: Conv and ConvTranspose, and columns for the gradient of the kernel alone.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedprune_export.autodiff.sliding_window import Indices, Window, flat_read_indices, inverse_reads
from fedprune_export.autodiff.tape import Dim, Shape, Tape
from fedprune_export.ir.graph import Graph

# Up to this many positions of the window columns are faster than operators. Measured with layers of ResNets and
# RegNets on x86.
MAX_COLUMNS_AREA = 16


class ChannelGroups(NamedTuple):
    """The groups of a convolution: how many there are, and how many channels each reads and writes."""

    number: Dim
    inputs: Dim
    outputs: Dim


class ColumnConvolution:
    """A convolution in groups of any number and length (see `Convolution` in `operators.convolution`).

    Values are gathered with the batch as their last axis, so that each index copies a run of memory. `area` is the
    number of positions of the input, `positions` that of the window, `taps` that of the kernel's elements in space.
    """

    def __init__(self, tape: Tape, w: Window, kernel: str, shape: Shape, groups: ChannelGroups, batch: Dim) -> None:
        self.tape, self.g, self.window, self.kernel, self.shape = tape, tape.graph, w, kernel, shape
        self.groups, self.group_inputs, self.group_outputs = groups
        self.batch = batch
        large = math.prod(w.output) > MAX_COLUMNS_AREA
        # The groups of Conv and ConvTranspose nodes; 0 where columns serve.
        self.operator_groups = groups.number if large and isinstance(groups.number, int) else 0
        self.inputs, self.outputs = (tape.product([groups.number, length]) for length in groups[1:])
        self.rank = len(w.sizes)
        self.area, self.positions, self.taps = map(math.prod, (w.sizes, w.output, w.kernel))
        self.read_positions = flat_read_indices(w)
        self._columns: dict[str, str] = {}

    def apply(self, x: str, bias: list[str]) -> str:
        g, w = self.g, self.window
        if self.operator_groups:
            return g.emit("Conv", x, self.kernel, *bias, attrs=w.conv_attrs(self.operator_groups))
        y = self.from_columns(
            g.emit("MatMul", self.matrix(), self.columns(x)), self.outputs, self.group_outputs, w.output
        )
        return add_bias(g, y, bias, self.rank)

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        g, w = self.g, self.window
        if self.operator_groups:
            return g.emit("ConvTranspose", dy, self.kernel, *bias, attrs=w.transposed_attrs(self.operator_groups))
        flat = self.batch_last(dy, self.positions)
        x = self.transposed_by_gathering(flat) if all(s == 1 for s in w.strides) else self.transposed_by_summing(flat)
        return add_bias(g, x, bias, self.rank)

    def kernel_gradient(self, x: str, dy: str) -> str:
        """One product per group over all windows. Of its two factors the smaller is transposed."""
        g, tape = self.g, self.tape
        rows, width = tape.product([self.group_inputs, self.taps]), tape.product([self.positions, self.batch])
        flat = self.batch_last(dy, self.positions)
        # Gemm transposes its second factor by itself, which MatMul doesn't; with one group two axes suffice.
        if self.groups == 1:
            dy_matrix = tape.reshape(flat, (self.outputs, self.positions, self.batch), (self.outputs, width))
            patches = tape.reshape(self.columns(x), (1, rows, width), (rows, width))
            product = g.emit("Gemm", dy_matrix, patches, attrs={"transB": 1})
            return tape.reshape(product, (self.outputs, rows), self.shape)
        dy_matrix = tape.reshape(
            flat, (self.outputs, self.positions, self.batch), (self.groups, self.group_outputs, width)
        )
        product = g.emit("MatMul", self.columns(x), g.emit("Transpose", dy_matrix, attrs={"perm": [0, 2, 1]}))
        product = g.emit("Transpose", product, attrs={"perm": [0, 2, 1]})
        return tape.reshape(product, (self.groups, self.group_outputs, rows), self.shape)

    def transposed_by_gathering(self, dy: str) -> str:
        """Columns of dy times the kernel with inputs and outputs swapped: for stride 1."""
        g, tape = self.g, self.tape
        reads = inverse_reads(self.read_positions, self.area)
        columns = self.gather_patches(dy, self.outputs, self.group_outputs, reads, self.positions)
        shape = (self.groups, self.group_outputs, self.group_inputs, self.taps)
        kernel = tape.reshape(self.kernel, self.shape, shape)
        kernel = g.emit("Transpose", kernel, attrs={"perm": [0, 2, 1, 3]})
        shape = (self.groups, self.group_inputs, self.group_outputs, self.taps)
        kernel = tape.reshape(kernel, shape, (*shape[:2], tape.product(shape[2:])))
        return self.from_columns(g.emit("MatMul", kernel, columns), self.inputs, self.group_inputs, self.window.sizes)

    def transposed_by_summing(self, dy: str) -> str:
        """The gradient of the columns. Each position of the input then sums the gradients of the columns it is in."""
        g, tape = self.g, self.tape
        width, rows = tape.product([self.positions, self.batch]), tape.product([self.group_inputs, self.taps])
        dy_matrix = tape.reshape(
            dy, (self.outputs, self.positions, self.batch), (self.groups, self.group_outputs, width)
        )
        product = g.emit("MatMul", g.emit("Transpose", self.matrix(), attrs={"perm": [0, 2, 1]}), dy_matrix)
        gradients = tape.reshape(
            product, (self.groups, rows, width), (self.inputs, self.taps * self.positions, self.batch)
        )
        reads = inverse_reads(self.read_positions, self.area)
        readers = [np.flatnonzero(row >= 0) * self.positions + row[row >= 0] for row in reads]
        # Positions at the border are in fewer windows: an index of -1 adds a zero, so that one Gather serves all.
        max_readers = max(map(len, readers))
        padded_readers = np.stack([np.pad(p, (0, max_readers - len(p)), constant_values=-1) for p in readers], axis=1)
        total = g.emit("ReduceSum", self.gather_positions(gradients, padded_readers), g.ints(1), attrs={"keepdims": 0})
        total = tape.reshape(total, (self.inputs, self.area, self.batch), (self.inputs, *self.window.sizes, self.batch))
        return self.batch_first(total)

    # -- layouts ----------------------------------------------------------------------------------------------------

    def matrix(self) -> str:
        """The kernel: [groups, outputs of a group, inputs of a group · taps]."""
        rows = self.tape.product([self.group_inputs, self.taps])
        return self.tape.reshape(self.kernel, self.shape, (self.groups, self.group_outputs, rows))

    def columns(self, x: str) -> str:
        """All windows of the batch: [groups, inputs of a group · taps, positions · N].

        Forward and weight gradient share them.
        """
        if x not in self._columns:
            flat = self.batch_last(x, self.area)
            self._columns[x] = self.gather_patches(flat, self.inputs, self.group_inputs, self.read_positions, self.area)
        return self._columns[x]

    def gather_patches(self, flat: str, channels: Dim, group_channels: Dim, read: Indices, area: int) -> str:
        """The patches read from [C, area, N]: [groups, channels of a group · taps, readers · N]."""
        readers, taps = read.shape
        shape: Shape = (channels, taps, readers, self.batch)
        # A 1x1 kernel with stride 1 reads every position once, in order: nothing has to be gathered.
        if taps == 1 and np.array_equal(read[:, 0], np.arange(area)):
            shape = (channels, area, self.batch)
        else:
            flat = self.gather_positions(flat, read.T)
        target = (self.groups, self.tape.product([group_channels, taps]), self.tape.product([readers, self.batch]))
        return self.tape.reshape(flat, shape, target)

    def from_columns(self, product: str, channels: Dim, group_channels: Dim, sizes: tuple[int, ...]) -> str:
        """[groups, channels of a group, positions · N] as [N, C, ...]."""
        shape = (self.groups, group_channels, self.tape.product([*sizes, self.batch]))
        return self.batch_first(self.tape.reshape(product, shape, (channels, *sizes, self.batch)))

    def gather_positions(self, flat: str, read: Indices) -> str:
        """Positions of [C, area, N]; -1 reads zeros."""
        # One more position of zeros at the end: Gather counts negative indices from the end, so that -1 reads it.
        if (read < 0).any():
            flat = self.g.emit("Pad", flat, self.g.ints(0, 0, 0, 0, 1, 0))
        return self.g.emit("Gather", flat, self.g.constant(read, np.int64), attrs={"axis": 1})

    def batch_last(self, value: str, area: int) -> str:
        """[N, C, ...] as [C, area, N]."""
        value = self.g.emit("Transpose", value, attrs={"perm": [*range(1, self.rank + 2), 0]})
        return self.g.emit("Reshape", value, self.g.ints(0, area, -1))

    def batch_first(self, value: str) -> str:
        """[C, ..., N] as [N, C, ...]."""
        return self.g.emit("Transpose", value, attrs={"perm": [self.rank + 1, *range(self.rank + 1)]})


def add_bias(g: Graph, y: str, bias: list[str], rank: int) -> str:
    """A vector added to the channels of [N, C, ...], if there is one."""
    return g.emit("Add", y, g.emit("Unsqueeze", bias[0], g.ints(*range(1, rank + 1)))) if bias else y
