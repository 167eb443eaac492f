"""Convolution as matrix products with columns, the windows of the whole batch.

Where whole groups of a convolution are cut the number of groups varies, which an operator's attribute can't: then every
group multiplies a matrix of its own. On small maps a plain convolution is faster that way, too, because onnxruntime's
operator takes one product per sample. Where the same positions of every group are cut, the number of groups is fixed,
and on large maps the operators serve for all but the gradient of the kernel.
"""

from __future__ import annotations

import math

import numpy as np

from fedprune_export.autodiff.conv_geometry import (
    Indices,
    Window,
    add_bias,
    all_reads,
    answers,
    leftovers,
    operator_attrs,
)
from fedprune_export.autodiff.tape import Dim, Shape, Tape

SMALL_MAP = 16
"""Up to so many positions of the window columns are faster than operators.

Measured with layers of ResNets and RegNets on x86 (`benchmarks/layers.py`).
"""


class Columns:
    """A convolution in one group, or in groups of any length (see `convolutions.Convolution`).

    Whatever is gathered has the batch last, so that it is copied in runs.
    """

    def __init__(
        self, tape: Tape, w: Window, kernel: str, shape: Shape, number: Dim, lengths: tuple[Dim, Dim], batch: Dim
    ) -> None:
        self.tape, self.g, self.w, self.kernel, self.shape = tape, tape.graph, w, kernel, shape
        self.number, self.batch = number, batch
        large = math.prod(w.output) > SMALL_MAP
        self.operator = number if large and isinstance(number, int) else 0
        self.taken, self.made = lengths
        self.inputs, self.outputs = tape.product([number, self.taken]), tape.product([number, self.made])
        self.rank = len(w.sizes)
        self.area, self.positions, self.taps = map(math.prod, (w.sizes, w.output, w.kernel))
        self.read = all_reads(w)
        self._columns: dict[str, str] = {}

    def apply(self, x: str, bias: list[str]) -> str:
        """The convolution of x."""
        g, w = self.g, self.w
        if self.operator:
            return g.emit("Conv", x, self.kernel, *bias, attrs=operator_attrs(w, self.operator))
        y = self.from_columns(g.emit("MatMul", self.matrix(), self.columns(x)), self.outputs, self.made, w.output)
        return add_bias(g, y, bias, self.rank)

    def back(self, dy: str, bias: list[str]) -> str:
        """What the transposed convolution makes of dy."""
        g, w = self.g, self.w
        if self.operator:
            attrs = {**operator_attrs(w, self.operator), "output_padding": leftovers(w)}
            return g.emit("ConvTranspose", dy, self.kernel, *bias, attrs=attrs)
        flat = self.batch_last(dy, self.positions)
        x = self.back_by_gathering(flat) if all(s == 1 for s in w.strides) else self.back_by_summing(flat)
        return add_bias(g, x, bias, self.rank)

    def kernel_gradient(self, x: str, dy: str) -> str:
        """One product per group over all windows; of its factors the smaller one is turned."""
        g, tape = self.g, self.tape
        rows, width = tape.product([self.taken, self.taps]), tape.product([self.positions, self.batch])
        flat = self.batch_last(dy, self.positions)
        if self.number == 1:
            side = tape.reshape(flat, (self.outputs, self.positions, self.batch), (self.outputs, width))
            held = tape.reshape(self.columns(x), (1, rows, width), (rows, width))
            product = g.emit("Gemm", side, held, attrs={"transB": 1})
            return tape.reshape(product, (self.outputs, rows), self.shape)
        side = tape.reshape(flat, (self.outputs, self.positions, self.batch), (self.number, self.made, width))
        product = g.emit("MatMul", self.columns(x), g.emit("Transpose", side, attrs={"perm": [0, 2, 1]}))
        product = g.emit("Transpose", product, attrs={"perm": [0, 2, 1]})
        return tape.reshape(product, (self.number, self.made, rows), self.shape)

    def back_by_gathering(self, dy: str) -> str:
        """Columns of dy times the kernel with inputs and outputs swapped: for stride 1."""
        g, tape = self.g, self.tape
        columns = self.gathered(dy, self.outputs, self.made, answers(self.read, self.area), self.positions)
        shape = (self.number, self.made, self.taken, self.taps)
        kernel = tape.reshape(self.kernel, self.shape, shape)
        kernel = g.emit("Transpose", kernel, attrs={"perm": [0, 2, 1, 3]})
        shape = (self.number, self.taken, self.made, self.taps)
        kernel = tape.reshape(kernel, shape, (*shape[:2], tape.product(shape[2:])))
        return self.from_columns(g.emit("MatMul", kernel, columns), self.inputs, self.taken, self.w.sizes)

    def back_by_summing(self, dy: str) -> str:
        """The gradient of the columns; each place of the input then adds up the few that it was in."""
        g, tape = self.g, self.tape
        width, rows = tape.product([self.positions, self.batch]), tape.product([self.taken, self.taps])
        side = tape.reshape(dy, (self.outputs, self.positions, self.batch), (self.number, self.made, width))
        product = g.emit("MatMul", g.emit("Transpose", self.matrix(), attrs={"perm": [0, 2, 1]}), side)
        spread = tape.reshape(
            product, (self.number, rows, width), (self.inputs, self.taps * self.positions, self.batch)
        )
        places = [np.flatnonzero(row >= 0) * self.positions + row[row >= 0] for row in answers(self.read, self.area)]
        most = max(map(len, places))
        chosen = np.stack([np.pad(p, (0, most - len(p)), constant_values=-1) for p in places], axis=1)
        total = g.emit("ReduceSum", self.picked(spread, chosen), g.ints(1), attrs={"keepdims": 0})
        total = tape.reshape(total, (self.inputs, self.area, self.batch), (self.inputs, *self.w.sizes, self.batch))
        return self.batch_first(total)

    # -- layouts ----------------------------------------------------------------------------------------------------

    def matrix(self) -> str:
        """The kernel: [groups, outputs of a group, inputs of a group · taps]."""
        rows = self.tape.product([self.taken, self.taps])
        return self.tape.reshape(self.kernel, self.shape, (self.number, self.made, rows))

    def columns(self, x: str) -> str:
        """All windows of the batch, made once: [groups, inputs of a group · taps, positions · N]."""
        if x not in self._columns:
            flat = self.batch_last(x, self.area)
            self._columns[x] = self.gathered(flat, self.inputs, self.taken, self.read, self.area)
        return self._columns[x]

    def gathered(self, flat: str, channels: Dim, inside: Dim, read: Indices, area: int) -> str:
        """What is read of [C, area, N]: [groups, channels of a group · taps, readers · N]."""
        readers, taps = read.shape
        shape: Shape = (channels, taps, readers, self.batch)
        if taps == 1 and np.array_equal(read[:, 0], np.arange(area)):
            shape = (channels, area, self.batch)
        else:
            flat = self.picked(flat, read.T)
        target = (self.number, self.tape.product([inside, taps]), self.tape.product([readers, self.batch]))
        return self.tape.reshape(flat, shape, target)

    def from_columns(self, product: str, channels: Dim, inside: Dim, sizes: tuple[int, ...]) -> str:
        """[groups, channels of a group, positions · N] as [N, C, ...]."""
        shape = (self.number, inside, self.tape.product([*sizes, self.batch]))
        return self.batch_first(self.tape.reshape(product, shape, (channels, *sizes, self.batch)))

    def picked(self, flat: str, read: Indices) -> str:
        """Places of [C, area, N]; -1 reads zeros."""
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
