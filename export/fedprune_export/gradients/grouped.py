"""Convolution in groups of channels.

Where the same positions of every group are cut, the number of groups is fixed and onnxruntime's operators serve. Where
whole groups are cut it varies, which an operator's attribute can't: then every group multiplies a matrix of its own,
with the windows of the whole batch as columns.
"""

from __future__ import annotations

import math

import numpy as np

from fedprune_export.gradients.depthwise import depthwise
from fedprune_export.gradients.tape import Dim, Pull, Shape, Tape
from fedprune_export.gradients.windows import Indices, Window, all_reads, answers, leftovers, window
from fedprune_export.graph import Node


def grouped(tape: Tape, node: Node) -> Pull:
    """A convolution in several groups.

    Raises:
        ModelError: The groups don't keep equally many channels, or the size of the map varies.
    """
    data, weight = node.inputs[:2]
    w = window(tape, node, tape.static(node, tape.shape(weight)[2:]))
    if tape.shape(weight)[1] == 1 and tape.shape(weight)[0] == tape.shape(data)[1]:
        return depthwise(tape, node, w)
    return _Grouped(tape, node, w).write()


class _Grouped:
    """One convolution in groups of several channels, or with several outputs per channel.

    Whatever is gathered has the batch last, so that it is copied in runs.
    """

    def __init__(self, tape: Tape, node: Node, w: Window) -> None:
        self.tape, self.node, self.g, self.w = tape, node, tape.graph, w
        self.data, self.weight = node.inputs[:2]
        self.bias = node.inputs[2] if len(node.inputs) > 2 else ""
        self.x, self.kernel = tape.value(self.data), tape.value(self.weight)
        groups = int(node.attrs["group"])
        self.number, self.taken = tape.blocks(node, self.data, 1, groups)
        _, self.made = tape.blocks(node, self.weight, 0, groups)
        self.batch, self.inputs = tape.shape(self.data)[:2]
        self.outputs = tape.shape(self.weight)[0]
        self.rank = len(w.sizes)
        self.area, self.positions, self.taps = map(math.prod, (w.sizes, w.output, w.kernel))
        self.read = all_reads(w)
        self.attrs = {
            "kernel_shape": list(w.kernel),
            "strides": list(w.strides),
            "dilations": list(w.dilations),
            "pads": w.flat_pads,
            "group": self.number,
        }

    def write(self) -> Pull:
        """Write the forward pass."""
        g, tape = self.g, self.tape
        bias = [tape.value(self.bias)] if self.bias else []
        columns = ""
        if isinstance(self.number, int):
            y = g.emit("Conv", self.x, self.kernel, *bias, attrs=self.attrs)
        else:
            columns = self.columns()
            y = self.from_columns(g.emit("MatMul", self.matrix(), columns), self.outputs, self.made, self.w.output)
            if bias:
                y = g.emit("Add", y, g.emit("Unsqueeze", bias[0], g.ints(*range(1, self.rank + 1))))
        tape.enter(self.node.outputs[0], y, (self.batch, self.outputs, *self.w.output))

        def pull(dy: str) -> None:
            if self.bias and tape.wants(self.bias):
                axes = g.ints(0, *range(2, self.rank + 2))
                tape.add(self.bias, g.emit("ReduceSum", dy, axes, attrs={"keepdims": 0}))
            flat = self.batch_last(dy, self.positions)
            if tape.wants(self.weight):
                tape.add(self.weight, self.weight_gradient(columns or self.columns(), flat))
            if not tape.wants(self.data):
                return
            if isinstance(self.number, int):
                attrs = {**self.attrs, "output_padding": leftovers(self.w)}
                tape.add(self.data, g.emit("ConvTranspose", dy, self.kernel, attrs=attrs))
            elif all(s == 1 for s in self.w.strides):
                tape.add(self.data, self.input_by_gathering(flat))
            else:
                tape.add(self.data, self.input_by_summing(flat))

        return pull

    # -- gradients --------------------------------------------------------------------------------------------------

    def weight_gradient(self, columns: str, dy: str) -> str:
        """One product per group over all windows; of its factors the smaller one is turned."""
        g, tape = self.g, self.tape
        rows, width = tape.product([self.taken, self.taps]), tape.product([self.positions, self.batch])
        side = tape.reshape(dy, (self.outputs, self.positions, self.batch), (self.number, self.made, width))
        product = g.emit("MatMul", columns, g.emit("Transpose", side, attrs={"perm": [0, 2, 1]}))
        product = g.emit("Transpose", product, attrs={"perm": [0, 2, 1]})
        return tape.reshape(product, (self.number, self.made, rows), tape.shape(self.weight))

    def input_by_gathering(self, dy: str) -> str:
        """Columns of dy times the kernel with inputs and outputs swapped: for stride 1."""
        g, tape = self.g, self.tape
        columns = self.gathered(dy, self.outputs, self.made, answers(self.read, self.area), self.positions)
        shape = (self.number, self.made, self.taken, self.taps)
        kernel = tape.reshape(self.kernel, tape.shape(self.weight), shape)
        kernel = g.emit("Transpose", kernel, attrs={"perm": [0, 2, 1, 3]})
        shape = (self.number, self.taken, self.made, self.taps)
        kernel = tape.reshape(kernel, shape, (*shape[:2], tape.product(shape[2:])))
        return self.from_columns(g.emit("MatMul", kernel, columns), self.inputs, self.taken, self.w.sizes)

    def input_by_summing(self, dy: str) -> str:
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
        return self.tape.reshape(self.kernel, self.tape.shape(self.weight), (self.number, self.made, rows))

    def columns(self) -> str:
        """All windows of the batch: [groups, inputs of a group · taps, positions · N]."""
        flat = self.batch_last(self.x, self.area)
        return self.gathered(flat, self.inputs, self.taken, self.read, self.area)

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
