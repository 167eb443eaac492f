"""Sliding windows of convolutions and poolings, and convolution as matrix products with columns (im2col).

Where whole groups of a convolution are cut the number of groups varies, which an operator's attribute can't: then every
group multiplies a matrix of its own. On small maps a plain convolution is faster that way, too, because onnxruntime's
operator computes one product per sample. Where the same positions of every group are cut, the number of groups is
fixed, and on large maps the operators serve for all but the gradient of the kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Dim, Shape, Tape, describe
from fedprune_export.ir.graph import Graph, Node

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial axes of a value.

    `pads`: padding before and after, per axis; `output`: how many positions the window has per axis; `overhang`: per
    axis, how much of the padding after it only serves a last window that reaches beyond the input.
    """

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    output: tuple[int, ...]
    overhang: tuple[int, ...] = ()

    @property
    def flat_pads(self) -> list[int]:
        """Padding in ONNX order: all begins, then all ends."""
        return [p[0] for p in self.pads] + [p[1] for p in self.pads]

    @property
    def is_tiling(self) -> bool:
        """Whether windows are adjacent and cover the input exactly."""
        return (
            self.kernel == self.strides
            and all(d == 1 for d in self.dilations)
            and all(p == (0, 0) for p in self.pads)
            and all(s % k == 0 for s, k in zip(self.sizes, self.kernel, strict=True))
        )

    @property
    def has_flipped_gradient(self) -> bool:
        """Whether a convolution with the flipped kernel makes the gradient of the input."""
        fits = all(
            p <= d * (k - 1) for pad, d, k in zip(self.pads, self.dilations, self.kernel, strict=True) for p in pad
        )
        return fits and all(s == 1 for s in self.strides)


def window(tape: Tape, node: Node, kernel: tuple[int, ...]) -> Window:
    """The window that a node's attributes describe.

    Raises `ModelError` if the input's spatial sizes vary, or nothing is left of them.
    """
    shape = tape.shape(node.inputs[0])
    sizes = tape.static(node, shape[2:])
    rank = len(sizes)
    if len(kernel) != rank:
        raise ModelError(f"{describe(node)}: axes of the kernel", expected=rank, got=len(kernel))
    strides = tuple(int(s) for s in node.attrs.get("strides", [1] * rank))
    dilations = tuple(int(d) for d in node.attrs.get("dilations", [1] * rank))
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    mode = str(node.attrs.get("auto_pad", "NOTSET"))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, stride, span in zip(sizes, strides, spans, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
            # ONNX: SAME_UPPER puts the odd element of padding at the end, SAME_LOWER at the beginning.
            small, large = total // 2, total - total // 2
            pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    else:
        flat = [int(p) for p in node.attrs.get("pads", [0] * (2 * rank))] if mode == "NOTSET" else [0] * (2 * rank)
        pads = list(zip(flat[:rank], flat[rank:], strict=True))
    output, overhang = [], [0] * rank
    for i, (size, stride, span) in enumerate(zip(sizes, strides, spans, strict=True)):
        slack = size + sum(pads[i]) - span
        count = slack // stride + 1
        # Rounding up: a window more, if it starts inside the input or the padding before it; its overhang is padding.
        rounds_up = bool(int(node.attrs.get("ceil_mode", 0)) and slack % stride)
        if rounds_up and count * stride < size + pads[i][0]:
            overhang[i] = stride - slack % stride
            pads[i] = (pads[i][0], pads[i][1] + overhang[i])
            count += 1
        output.append(count)
    if min(output) < 1:
        raise ModelError(f"{describe(node)}: the kernel is larger than its input", got=list(sizes))
    return Window(
        sizes=sizes,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        pads=tuple(pads),
        output=tuple(output),
        overhang=tuple(overhang),
    )


def leftover_rows(w: Window) -> list[int]:
    """Per axis, how many input rows at the end no window reaches: a transposed convolution must add them."""
    return [
        size + sum(pad) - (stride * (out - 1) + dilation * (k - 1) + 1)
        for size, pad, stride, out, dilation, k in zip(
            w.sizes, w.pads, w.strides, w.output, w.dilations, w.kernel, strict=True
        )
    ]


def read_indices(w: Window, axis: int) -> Indices:
    """The index of one axis that each output reads at each kernel element, -1 for padding: [outputs, elements]."""
    starts = np.arange(w.output[axis])[:, None] * w.strides[axis] - w.pads[axis][0]
    indices = starts + np.arange(w.kernel[axis]) * w.dilations[axis]
    return np.where((indices >= 0) & (indices < w.sizes[axis]), indices, -1).astype(np.int64)


def product_indices(a: Indices, b: Indices, size: int) -> Indices:
    """Flat indices over two axes from the indices over each: [outputs, elements]. `size`: of the second axis."""
    first, second = a[:, None, :, None], b[None, :, None, :]
    flat = np.where((first < 0) | (second < 0), -1, first * size + second)
    return flat.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def flat_read_indices(w: Window) -> Indices:
    """The index of the flat map that each output reads at each kernel element, -1 for padding: [outputs, elements]."""
    indices = np.zeros((1, 1), np.int64)
    for axis, size in enumerate(w.sizes):
        indices = product_indices(indices, read_indices(w, axis), size)
    return indices


def inverse_reads(read: Indices, positions: int) -> Indices:
    """Invert reads: which output each position goes to by each kernel element, [positions, elements], -1 for none.

    One kernel element brings a position to one output at most.

    Args:
        read: What each output reads: [outputs, elements].
    """
    outputs_of = np.full((positions, read.shape[1]), -1, np.int64)
    output, element = np.nonzero(read >= 0)
    outputs_of[read[output, element], element] = output
    return outputs_of


def operator_attrs(w: Window, group: int = 1) -> dict[str, Any]:
    """The attributes of onnxruntime's convolutions."""
    return {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "dilations": list(w.dilations),
        "pads": w.flat_pads,
        "group": group,
    }


def add_bias(g: Graph, y: str, bias: list[str], rank: int) -> str:
    """A vector added to the channels of [N, C, ...], if there is one."""
    return g.emit("Add", y, g.emit("Unsqueeze", bias[0], g.ints(*range(1, rank + 1)))) if bias else y


# Up to so many positions of the window columns are faster than operators, which compute one product per sample.
# Measured with layers of ResNets and RegNets on x86.
MAX_COLUMNS_AREA = 16


class ColumnConvolution:
    """A convolution in one group, or in groups of any length (see `fedprune_export.operators.convolution.Convolution`).

    Values are gathered with the batch as their last axis, so that each index copies a run of memory.
    """

    def __init__(
        self, tape: Tape, w: Window, kernel: str, shape: Shape, number: Dim, lengths: tuple[Dim, Dim], batch: Dim
    ) -> None:
        self.tape, self.g, self.window, self.kernel, self.shape = tape, tape.graph, w, kernel, shape
        self.groups, self.batch = number, batch
        large = math.prod(w.output) > MAX_COLUMNS_AREA
        self.operator_groups = number if large and isinstance(number, int) else 0
        self.group_inputs, self.group_outputs = lengths
        self.inputs, self.outputs = (tape.product([number, length]) for length in lengths)
        self.rank = len(w.sizes)
        self.area, self.positions, self.taps = map(math.prod, (w.sizes, w.output, w.kernel))
        self.read_positions = flat_read_indices(w)
        self._columns: dict[str, str] = {}

    def apply(self, x: str, bias: list[str]) -> str:
        g, w = self.g, self.window
        if self.operator_groups:
            return g.emit("Conv", x, self.kernel, *bias, attrs=operator_attrs(w, self.operator_groups))
        y = self.from_columns(
            g.emit("MatMul", self.matrix(), self.columns(x)), self.outputs, self.group_outputs, w.output
        )
        return add_bias(g, y, bias, self.rank)

    def back(self, dy: str, bias: list[str]) -> str:
        """The transposed convolution of dy."""
        g, w = self.g, self.window
        if self.operator_groups:
            attrs = {**operator_attrs(w, self.operator_groups), "output_padding": leftover_rows(w)}
            return g.emit("ConvTranspose", dy, self.kernel, *bias, attrs=attrs)
        flat = self.batch_last(dy, self.positions)
        x = self.back_by_gathering(flat) if all(s == 1 for s in w.strides) else self.back_by_summing(flat)
        return add_bias(g, x, bias, self.rank)

    def kernel_gradient(self, x: str, dy: str) -> str:
        """One product per group over all windows; of its factors the smaller one is transposed."""
        g, tape = self.g, self.tape
        rows, width = tape.product([self.group_inputs, self.taps]), tape.product([self.positions, self.batch])
        flat = self.batch_last(dy, self.positions)
        # Gemm transposes its second factor by itself, which MatMul doesn't; with one group two axes suffice.
        if self.groups == 1:
            side = tape.reshape(flat, (self.outputs, self.positions, self.batch), (self.outputs, width))
            patches = tape.reshape(self.columns(x), (1, rows, width), (rows, width))
            product = g.emit("Gemm", side, patches, attrs={"transB": 1})
            return tape.reshape(product, (self.outputs, rows), self.shape)
        side = tape.reshape(flat, (self.outputs, self.positions, self.batch), (self.groups, self.group_outputs, width))
        product = g.emit("MatMul", self.columns(x), g.emit("Transpose", side, attrs={"perm": [0, 2, 1]}))
        product = g.emit("Transpose", product, attrs={"perm": [0, 2, 1]})
        return tape.reshape(product, (self.groups, self.group_outputs, rows), self.shape)

    def back_by_gathering(self, dy: str) -> str:
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

    def back_by_summing(self, dy: str) -> str:
        """The gradient of the columns; each position of the input then sums those of the columns that hold it."""
        g, tape = self.g, self.tape
        width, rows = tape.product([self.positions, self.batch]), tape.product([self.group_inputs, self.taps])
        side = tape.reshape(dy, (self.outputs, self.positions, self.batch), (self.groups, self.group_outputs, width))
        product = g.emit("MatMul", g.emit("Transpose", self.matrix(), attrs={"perm": [0, 2, 1]}), side)
        spread = tape.reshape(
            product, (self.groups, rows, width), (self.inputs, self.taps * self.positions, self.batch)
        )
        reads = inverse_reads(self.read_positions, self.area)
        readers = [np.flatnonzero(row >= 0) * self.positions + row[row >= 0] for row in reads]
        # Positions at the border are in fewer windows: an index of -1 adds a zero, so that one Gather serves all.
        max_readers = max(map(len, readers))
        padded_readers = np.stack([np.pad(p, (0, max_readers - len(p)), constant_values=-1) for p in readers], axis=1)
        total = g.emit("ReduceSum", self.gather_positions(spread, padded_readers), g.ints(1), attrs={"keepdims": 0})
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
