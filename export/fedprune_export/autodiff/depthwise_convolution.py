"""Depthwise convolution for any number of channels, as products with banded matrices.

The operator's group count would have to be a number. Instead every channel multiplies a matrix of its own: lines of the
map are stacked ([channels, lines, elements of a line]), and the kernel is a banded matrix that maps the input lines it
reads to one line of the output. These are several times more MACs than needed, but as matrix products over the whole
batch, and far less memory moves than with one pass per tap (one element of the kernel).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from fedprune_export.autodiff.column_convolution import add_bias
from fedprune_export.autodiff.sliding_window import Indices, Window, inverse_reads, product_indices, read_indices
from fedprune_export.ir.graph import Graph

Band = npt.NDArray[np.float32]

# Measured with MobileNetV2's layers on x86: longer lines waste more MACs on a band's zeros, shorter ones make more
# products that are too small to be fast.
# A map up to this area is one line.
_MAX_TINY_MAP_AREA = 16
# Lines up to this length stay whole.
_MAX_WHOLE_LINE_LENGTH = 64
# Longer lines are cut into blocks of this length.
_BLOCK_LENGTH = 16


@dataclass(frozen=True)
class LineLayout:
    """The division of the convolution's input or output into lines.

    `count`: lines of one channel's map; `pads`: zeros before and after its last axis, to make it whole blocks.
    """

    sizes: tuple[int, ...]
    count: int
    length: int
    pads: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class BandedProducts:
    """A depthwise convolution as products of lines with banded matrices.

    Attributes:
        reads: Which lines of the input each line of the output reads; -1 for zeros: [lines, lines read].
        band: Where a tap leads from an input to an output, as 1:
            [taps inside a line, blocks of a line, elements of an input's line, elements of an output's].
    """

    reads: Indices
    band: Band
    input_lines: LineLayout
    output_lines: LineLayout


def divide_into_lines(w: Window) -> BandedProducts:
    """Divide a window's maps into lines: a tiny map is one, long lines of large maps are cut into blocks."""
    last_axis = len(w.sizes) - 1
    # The axes from the first one on make up a line.
    first = 0 if math.prod(w.sizes) <= _MAX_TINY_MAP_AREA else last_axis
    is_long = first == last_axis and w.sizes[last_axis] > _MAX_WHOLE_LINE_LENGTH
    line = _row_in_blocks(w) if is_long else _whole_line(w, first)
    reads = np.zeros((1, 1), np.int64)
    for axis in range(first):
        reads = product_indices(reads, read_indices(w, axis), w.sizes[axis])
    return BandedProducts(
        product_indices(reads, line.reads, line.input_lines.count),
        line.band,
        replace(line.input_lines, count=math.prod(w.sizes[:first]) * line.input_lines.count),
        replace(line.output_lines, count=math.prod(w.output[:first]) * line.output_lines.count),
    )


def _whole_line(w: Window, first: int) -> BandedProducts:
    """The axes from the first one on as one line."""
    # The band of several axes is the Kronecker product of the bands of each.
    bands = [_band(read_indices(w, axis), w.sizes[axis]) for axis in range(first, len(w.sizes))]
    band = bands[0]
    for axis_band in bands[1:]:
        product = np.einsum("kio,lpq->klipoq", band, axis_band)
        band = product.reshape([a * b for a, b in zip(band.shape, axis_band.shape, strict=True)])
    sides = [LineLayout(sizes, 1, math.prod(sizes[first:])) for sizes in (w.sizes, w.output)]
    return BandedProducts(np.zeros((1, 1), np.int64), band[:, None], *sides)


def _row_in_blocks(w: Window) -> BandedProducts:
    """A row of a map along its last axis, cut into blocks."""
    size, output, kernel = w.sizes[-1], w.output[-1], w.kernel[-1]
    stride, dilation, pad_before = w.strides[-1], w.dilations[-1], w.pads[-1][0]
    # A block of outputs reads as many inputs times the stride, and those of later blocks that the kernel reaches.
    block_outputs = max(_BLOCK_LENGTH // stride, 1)
    block_inputs = block_outputs * stride
    blocks = ((block_outputs - 1) * stride + dilation * (kernel - 1)) // block_inputs + 1
    band = np.zeros((kernel, blocks * block_inputs, block_outputs), np.float32)
    for tap, element in itertools.product(range(kernel), range(block_outputs)):
        band[tap, element * stride + tap * dilation, element] = 1
    input_blocks, output_blocks = -(-(size + pad_before) // block_inputs), -(-output // block_outputs)
    reads = np.arange(output_blocks)[:, None] + np.arange(blocks)
    pads = (pad_before, input_blocks * block_inputs - size - pad_before)
    return BandedProducts(
        # The last blocks of the output reach beyond the last block of the input: there are zeros.
        np.where(reads < input_blocks, reads, -1),
        band.reshape(kernel, blocks, block_inputs, block_outputs),
        LineLayout(w.sizes, input_blocks, block_inputs, pads),
        LineLayout(w.output, output_blocks, block_outputs, (0, output_blocks * block_outputs - output)),
    )


def _band(read: Indices, size: int) -> Band:
    """1 where a tap leads from an input to an output: [taps, inputs, outputs]."""
    band: Band = (read[None] == np.arange(size)[:, None, None]).transpose(2, 0, 1).astype(np.float32)
    return band


class DepthwiseConvolution:
    """A convolution with one input and one output channel per group (see `Convolution` in `operators.convolution`)."""

    def __init__(self, g: Graph, w: Window, kernel: str) -> None:
        self.g, self.window, self.products = g, w, divide_into_lines(w)
        self.taps_in_line, blocks = self.products.band.shape[:2]
        self.taps_across_lines = math.prod(w.kernel) // self.taps_in_line
        self.lines_read = self.taps_across_lines * blocks  # lines of the input per line of the output
        self.kernel = self.g.emit("Reshape", kernel, self.g.ints(0, self.taps_across_lines, self.taps_in_line))
        self._lines: dict[str, str] = {}
        self._gathered_lines: dict[str, str] = {}

    def apply(self, x: str, bias: list[str]) -> str:
        y = self.g.emit("MatMul", self.gather_lines(x), self.banded_kernel(self.products.band))
        return add_bias(self.g, _from_lines(self.g, y, self.products.output_lines), bias, len(self.window.sizes))

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        g, parts = self.g, self.products
        lines, reads = (
            self.split_into_lines(dy, parts.output_lines),
            inverse_reads(parts.reads, parts.input_lines.count),
        )
        spread = _gather_lines(g, lines, reads, parts.output_lines)
        x = g.emit("MatMul", spread, self.banded_kernel(parts.band.transpose(0, 1, 3, 2)))
        return add_bias(g, _from_lines(g, x, parts.input_lines), bias, len(self.window.sizes))

    def kernel_gradient(self, x: str, dy: str) -> str:
        """The gradients of the bands, whose elements are summed."""
        g, out = self.g, self.products.output_lines
        # Of the two factors the smaller is transposed.
        side = g.emit("Reshape", self.split_into_lines(dy, out), g.ints(0, -1, out.length))
        side = g.emit("Transpose", side, attrs={"perm": [0, 2, 1]})
        products = g.emit(
            "Reshape", g.emit("MatMul", side, self.gather_lines(x)), g.ints(0, out.length, self.taps_across_lines, -1)
        )
        products = g.emit("Transpose", products, attrs={"perm": [0, 2, 3, 1]})
        products = g.emit("Reshape", products, g.ints(0, self.taps_across_lines, -1))
        sums = g.emit("MatMul", products, g.constant(self.products.band.reshape(self.taps_in_line, -1).T, np.float32))
        return g.emit("Reshape", sums, g.ints(0, 1, *self.window.kernel))

    def banded_kernel(self, band: Band) -> str:
        g = self.g
        matrix = g.emit("MatMul", self.kernel, g.constant(band.reshape(self.taps_in_line, -1), np.float32))
        return g.emit("Reshape", matrix, g.ints(0, self.lines_read * band.shape[2], band.shape[3]))

    def split_into_lines(self, value: str, side: LineLayout) -> str:
        """[N, C, ...] as [C, N, lines, elements]; forward and gradients share the node."""
        if value not in self._lines:
            g, rank = self.g, len(side.sizes)
            moved = g.emit("Transpose", value, attrs={"perm": [1, 0, *range(2, rank + 2)]})
            if any(side.pads):
                before, after = ([0] * (rank + 1) + [p] for p in side.pads)
                moved = g.emit("Pad", moved, g.ints(*before, *after))
            self._lines[value] = g.emit("Reshape", moved, g.ints(0, 0, side.count, side.length))
        return self._lines[value]

    def gather_lines(self, x: str) -> str:
        """The lines that each line of the output reads: [C, N · lines, lines read · elements].

        Forward and weight gradient share the node.
        """
        if x not in self._gathered_lines:
            into = self.products.input_lines
            self._gathered_lines[x] = _gather_lines(self.g, self.split_into_lines(x, into), self.products.reads, into)
        return self._gathered_lines[x]


def _from_lines(g: Graph, value: str, side: LineLayout) -> str:
    """[C, N · lines, elements] as [N, C, ...]."""
    before, after = side.pads
    sizes = [*side.sizes[:-1], side.sizes[-1] + before + after]
    value = g.emit("Reshape", value, g.ints(0, -1, *sizes))
    if before or after:
        value = g.emit("Slice", value, g.ints(before), g.ints(before + side.sizes[-1]), g.ints(len(sizes) + 1))
    return g.emit("Transpose", value, attrs={"perm": [1, 0, *range(2, len(sizes) + 2)]})


def _gather_lines(g: Graph, value: str, read: Indices, side: LineLayout) -> str:
    """The lines that are read, side by side: [C, N, lines, elements] as [C, N · readers, lines read · elements]."""
    if read.shape[1] > 1 or not np.array_equal(read[:, 0], np.arange(side.count)):
        if (read < 0).any():
            value = g.emit("Pad", value, g.ints(0, 0, 0, 0, 0, 0, 1, 0))
        # Gather counts negative indices from the end: -1 is the line of zeros that was added.
        value = g.emit("Gather", value, g.constant(read, np.int64), attrs={"axis": 2})
    return g.emit("Reshape", value, g.ints(0, -1, read.shape[1] * side.length))
