"""Convolution as matrix products with columns (im2col), for small maps and for groups of any number and length.

A column has the numbers of the input under one position of the window. The product of the kernel with the columns of a
whole batch is the convolution.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from fedprune_export.autodiff.batch_statistics import column
from fedprune_export.autodiff.sliding_window import Indices, Window, flat_read_indices, inverse_reads
from fedprune_export.autodiff.tape import Dim, Shape, Tape
from fedprune_export.ir.graph import Graph


class ChannelGroups(NamedTuple):
    """The groups of a convolution: how many there are, and how many channels each reads and writes."""

    number: Dim
    inputs: Dim
    outputs: Dim


class ColumnConvolution:
    """A convolution in groups of any number and length (see `Convolution` in `operators.convolution`).

    Values are gathered with the batch as their last axis, so that each index copies a run of memory. Matrices have an
    axis of groups before their rows and columns, where there are several.
    """

    def __init__(self, tape: Tape, w: Window, kernel: str, shape: Shape, groups: ChannelGroups, batch: Dim) -> None:
        self.tape, self.g, self.window, self.kernel, self.shape = tape, tape.graph, w, kernel, shape
        self.groups, self.group_inputs, self.group_outputs = groups
        self.lead: Shape = () if self.groups == 1 else (self.groups,)
        self.transposition = [*range(len(self.lead)), len(self.lead) + 1, len(self.lead)]
        self.inputs, self.outputs = (tape.product([groups.number, length]) for length in groups[1:])
        self.batch, self.rank = batch, len(w.sizes)
        self.positions, self.taps = math.prod(w.output), math.prod(w.kernel)
        self.rows = tape.product([self.group_inputs, self.taps])
        self._columns: dict[str, str] = {}

    def apply(self, x: str, bias: list[str]) -> str:
        product = self.g.emit("MatMul", self.matrix(), self.columns(x))
        y = self.from_columns(product, self.outputs, self.group_outputs, self.window.output)
        return add_bias(self.g, y, bias, self.rank)

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        has_steps = any(s > 1 for s in self.window.strides)
        x = self.transposed_by_summing(dy) if has_steps else self.transposed_by_gathering(dy)
        return add_bias(self.g, x, bias, self.rank)

    def kernel_gradient(self, x: str, dy: str) -> str:
        """One product per group over all windows. Of its two factors the smaller is transposed."""
        g, dy_matrix = self.g, self.output_matrix(dy)
        # Gemm transposes its second factor by itself, which MatMul doesn't.
        if not self.lead:
            product = g.emit("Gemm", dy_matrix, self.columns(x), attrs={"transB": 1})
        else:
            product = g.emit("MatMul", self.columns(x), self.transpose(dy_matrix))
            product = self.transpose(product)
        return self.tape.reshape(product, (*self.lead, self.group_outputs, self.rows), self.shape)

    def transposed_by_gathering(self, dy: str) -> str:
        """Columns of dy times the kernel with inputs and outputs swapped: for stride 1."""
        g, tape = self.g, self.tape
        reads = inverse_reads(flat_read_indices(self.window), math.prod(self.window.sizes))
        columns = self.gather_patches(dy, self.outputs, self.group_outputs, self.window.output, reads)
        shape = (*self.lead, self.group_outputs, self.group_inputs, self.taps)
        kernel = tape.reshape(self.kernel, self.shape, shape)
        kernel = g.emit("Transpose", kernel, attrs={"perm": [*self.transposition, len(self.lead) + 2]})
        shape = (*self.lead, self.group_inputs, self.group_outputs, self.taps)
        kernel = tape.reshape(kernel, shape, (*shape[:-2], tape.product(shape[-2:])))
        return self.from_columns(g.emit("MatMul", kernel, columns), self.inputs, self.group_inputs, self.window.sizes)

    def transposed_by_summing(self, dy: str) -> str:
        """The gradient of the columns. Each position of the input then sums the gradients of the columns it is in."""
        g, tape, sizes = self.g, self.tape, self.window.sizes
        product = g.emit("MatMul", self.transpose(self.matrix()), self.output_matrix(dy))
        width = tape.product([self.positions, self.batch])
        gradients = tape.reshape(
            product, (*self.lead, self.rows, width), (self.inputs, self.taps * self.positions, self.batch)
        )
        reads = inverse_reads(flat_read_indices(self.window), math.prod(sizes))
        readers = [np.flatnonzero(row >= 0) * self.positions + row[row >= 0] for row in reads]
        # Positions at the border are in fewer windows: an index of -1 adds a zero, so that one Gather serves all.
        max_readers = max(map(len, readers))
        padded_readers = np.stack([np.pad(p, (0, max_readers - len(p)), constant_values=-1) for p in readers], axis=1)
        total = g.emit("ReduceSum", self.gather_positions(gradients, padded_readers), g.ints(1), attrs={"keepdims": 0})
        total = tape.reshape(total, (self.inputs, math.prod(sizes), self.batch), (self.inputs, *sizes, self.batch))
        return self.batch_first(total)

    # -- layouts ----------------------------------------------------------------------------------------------------

    def transpose(self, matrix: str) -> str:
        return self.g.emit("Transpose", matrix, attrs={"perm": self.transposition})

    def matrix(self) -> str:
        """The kernel: [groups, outputs of a group, inputs of a group · taps]."""
        return self.tape.reshape(self.kernel, self.shape, (*self.lead, self.group_outputs, self.rows))

    def output_matrix(self, dy: str) -> str:
        """An output or its gradient: [groups, outputs of a group, positions · N]."""
        target = (*self.lead, self.group_outputs, self.tape.product([self.positions, self.batch]))
        return self.batch_last(dy, self.outputs, self.window.output, target)

    def columns(self, x: str) -> str:
        """All windows of the batch: [groups, inputs of a group · taps, positions · N].

        Forward and weight gradient share them.
        """
        if x not in self._columns:
            reads = flat_read_indices(self.window)
            self._columns[x] = self.gather_patches(x, self.inputs, self.group_inputs, self.window.sizes, reads)
        return self._columns[x]

    def gather_patches(
        self, value: str, channels: Dim, group_channels: Dim, sizes: tuple[int, ...], read: Indices
    ) -> str:
        """The patches read from [N, C, ...]: [groups, channels of a group · taps, readers · N]."""
        (readers, taps), area = read.shape, math.prod(sizes)
        target = (*self.lead, self.tape.product([group_channels, taps]), self.tape.product([readers, self.batch]))
        # A 1x1 kernel with stride 1 reads every position once, in order: nothing has to be gathered.
        if taps == 1 and np.array_equal(read[:, 0], np.arange(area)):
            return self.batch_last(value, channels, sizes, target)
        flat = self.batch_last(value, channels, sizes, (channels, area, self.batch))
        gathered = self.gather_positions(flat, read.T)
        return self.tape.reshape(gathered, (channels, taps, readers, self.batch), target)

    def from_columns(self, product: str, channels: Dim, group_channels: Dim, sizes: tuple[int, ...]) -> str:
        """[groups, channels of a group, positions · N] as [N, C, ...]."""
        shape = (*self.lead, group_channels, self.tape.product([*sizes, self.batch]))
        return self.batch_first(self.tape.reshape(product, shape, (channels, *sizes, self.batch)))

    def gather_positions(self, flat: str, read: Indices) -> str:
        """Positions of [C, area, N]; -1 reads zeros."""
        # One more position of zeros at the end: Gather counts negative indices from the end, so that -1 reads it.
        if (read < 0).any():
            flat = self.g.emit("Pad", flat, self.g.ints(0, 0, 0, 0, 1, 0))
        return self.g.emit("Gather", flat, self.g.constant(read, np.int64), attrs={"axis": 1})

    def batch_last(self, value: str, channels: Dim, sizes: tuple[int, ...], target: Shape) -> str:
        """[N, C, ...] as [C, ..., N], with the axes of `target`."""
        value = self.g.emit("Transpose", value, attrs={"perm": [*range(1, self.rank + 2), 0]})
        return self.tape.reshape(value, (channels, *sizes, self.batch), target)

    def batch_first(self, value: str) -> str:
        """[C, ..., N] as [N, C, ...]."""
        return self.g.emit("Transpose", value, attrs={"perm": [self.rank + 1, *range(self.rank + 1)]})


def add_bias(g: Graph, y: str, bias: list[str], rank: int) -> str:
    """A vector added to the channels of [N, C, ...], if there is one."""
    return g.emit("Add", y, column(g, bias[0], rank + 2)) if bias else y
