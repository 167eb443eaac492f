"""Gradient rules of convolutions.

Each layer's forward, input gradient and weight gradient has several formulations that give the same numbers;
which one is fast depends on the layer's shape. `formulation` chooses.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from fedprune_export.gradients.grouped import grouped
from fedprune_export.gradients.tape import Pull, Shape, Tape, rule
from fedprune_export.gradients.windows import Window, leftovers, window
from fedprune_export.graph import Graph, Node


@dataclass(frozen=True)
class Formulation:
    """How one convolution is computed.

    Attributes:
        forward: The operator, or one matrix product over columns (all windows of the whole batch, channels first).
        input_gradient: A convolution with the flipped kernel, a transposed convolution, or a product over columns.
        weight_gradient: One product per kernel element, one over columns, or a convolution with dy as its kernel.
    """

    forward: Literal["operator", "columns"]
    input_gradient: Literal["flipped", "transposed", "columns"]
    weight_gradient: Literal["taps", "columns", "convolution"]


_TINY_MAP, _SMALL_MAP, _LARGE_KERNEL, _IMAGE_CHANNELS = 4, 64, 25, 3
"""Where one formulation overtakes another: measured with LeNet, VGG11 and ResNet20 on x86 (`benchmarks/step.py`)."""


def formulation(w: Window, channels: int) -> Formulation:
    """The formulation for a layer.

    Args:
        w: The layer's window.
        channels: Its input channels at full width.
    """
    area, elements = math.prod(w.output), math.prod(w.kernel)
    fits = all(p <= d * (k - 1) for pad, d, k in zip(w.pads, w.dilations, w.kernel, strict=True) for p in pad)
    plain = all(s == 1 for s in w.strides) and fits
    if plain and area <= _TINY_MAP and elements > 1:
        return Formulation("columns", "columns", "columns")
    large = elements >= _LARGE_KERNEL
    if large and channels <= _IMAGE_CHANNELS:
        weight: Literal["taps", "columns", "convolution"] = "convolution"
    else:
        weight = "taps" if area >= _SMALL_MAP else "columns"
    return Formulation("operator", "flipped" if plain and not large else "transposed", weight)


@rule("Conv")
def conv(tape: Tape, node: Node) -> Pull:
    """Y = x ∗ w + b in one or more dimensions."""
    if int(node.attrs.get("group", 1)) != 1:
        return grouped(tape, node)
    return _Convolution(tape, node).write()


class _Convolution:
    """One convolution with a single group on the tape."""

    def __init__(self, tape: Tape, node: Node) -> None:
        self.tape, self.node, self.g = tape, node, tape.graph
        self.data, self.weight = node.inputs[:2]
        self.bias = node.inputs[2] if len(node.inputs) > 2 else ""
        self.x, self.kernel = tape.value(self.data), tape.value(self.weight)
        shape, kernel = tape.shape(self.data), tape.shape(self.weight)
        self.rank = len(shape) - 2
        self.w = window(tape, node, tape.static(node, kernel[2:]))
        self.shape: Shape = (shape[0], kernel[0], *self.w.output)
        self.form = formulation(self.w, tape.extent(kernel[1]))
        self._columns: str | None = None

    def write(self) -> Pull:
        """Write the forward pass."""
        g, tape = self.g, self.tape
        if self.form.forward == "columns":
            flat = g.emit("MatMul", g.emit("Flatten", self.kernel, attrs={"axis": 1}), self.columns())
            y = self.from_batch_last(flat, self.w.output)
            if self.bias:
                y = g.emit("Add", y, _column(g, tape.value(self.bias), self.rank))
        else:
            inputs = [self.x, self.kernel] + ([tape.value(self.bias)] if self.bias else [])
            y = g.emit("Conv", *inputs, attrs=_attrs(self.w))
        tape.enter(self.node.outputs[0], y, self.shape)
        return self.pull

    def pull(self, dy: str) -> None:
        """Write the backward pass."""
        tape, g, form = self.tape, self.g, self.form
        if self.bias and tape.wants(self.bias):
            axes = g.ints(0, *range(2, self.rank + 2))
            tape.add(self.bias, g.emit("ReduceSum", dy, axes, attrs={"keepdims": 0}))
        if tape.wants(self.weight):
            tape.add(self.weight, getattr(self, f"weight_by_{form.weight_gradient}")(dy))
        if tape.wants(self.data):
            tape.add(self.data, getattr(self, f"input_by_{form.input_gradient}")(dy))

    # -- input gradient ---------------------------------------------------------------------------------------------

    def flipped_kernel(self) -> str:
        """The kernel with its channels swapped and its taps in reverse order."""
        g, axes = self.g, range(2, self.rank + 2)
        swapped = g.emit("Transpose", self.kernel, attrs={"perm": [1, 0, *axes]})
        flip = [a for a in axes if self.w.kernel[a - 2] > 1]
        if not flip:
            return swapped
        ones = [-1] * len(flip)
        return g.emit("Slice", swapped, g.ints(*ones), g.ints(*[-(2**31)] * len(flip)), g.ints(*flip), g.ints(*ones))

    def back_window(self) -> Window:
        """The window of the convolution that gives the input's gradient (stride 1)."""
        w = self.w
        pads = tuple(
            (d * (k - 1) - before, d * (k - 1) - after)
            for (before, after), d, k in zip(w.pads, w.dilations, w.kernel, strict=True)
        )
        return Window(w.output, w.kernel, w.strides, w.dilations, pads, w.sizes)

    def input_by_flipped(self, dy: str) -> str:
        """A convolution of dy with the flipped kernel."""
        return self.g.emit("Conv", dy, self.flipped_kernel(), attrs=_attrs(self.back_window()))

    def input_by_columns(self, dy: str) -> str:
        """The same as one matrix product."""
        g = self.g
        kernel = g.emit("Flatten", self.flipped_kernel(), attrs={"axis": 1})
        flat = g.emit("MatMul", kernel, columns(g, dy, self.back_window()))
        return self.from_batch_last(flat, self.w.sizes)

    def input_by_transposed(self, dy: str) -> str:
        """A transposed convolution, for strides."""
        attrs = {**_attrs(self.w), "output_padding": leftovers(self.w)}
        return self.g.emit("ConvTranspose", dy, self.kernel, attrs=attrs)

    # -- weight gradient --------------------------------------------------------------------------------------------

    def weight_by_taps(self, dy: str) -> str:
        """One batched matrix product per kernel element, summed over the batch."""
        g, w = self.g, self.w
        rows = g.emit("Reshape", dy, g.ints(0, 0, -1))
        # Channels last: a tap is then a copy of long runs, and the product needs no further transpose.
        x = g.emit("Transpose", self.x, attrs={"perm": [0, *range(2, self.rank + 2), 1]})
        products = []
        for tap in taps(g, _padded(g, x, w, first=1), w, first=1):
            flat = g.emit("Reshape", tap, g.ints(0, math.prod(w.output), -1)) if self.rank > 1 else tap
            product = g.emit("MatMul", rows, flat)
            products.append(g.emit("ReduceSum", product, g.ints(0), attrs={"keepdims": 0}))
        total = g.emit("Concat", *products, attrs={"axis": 1}) if len(products) > 1 else products[0]
        count = math.prod(w.kernel)
        if count == 1:
            return g.emit("Unsqueeze", total, g.ints(*range(2, self.rank + 2)))
        apart = g.emit("Reshape", total, g.ints(0, count, -1))
        return g.emit("Reshape", g.emit("Transpose", apart, attrs={"perm": [0, 2, 1]}), g.ints(0, 0, *w.kernel))

    def weight_by_columns(self, dy: str) -> str:
        """One matrix product over all windows of the batch."""
        g = self.g
        rows = g.emit("Flatten", _batch_last(g, dy, self.rank), attrs={"axis": 1})
        flat = g.emit("Gemm", rows, self.columns(), attrs={"transB": 1})
        return g.emit("Reshape", flat, g.ints(0, -1, *self.w.kernel))

    def weight_by_convolution(self, dy: str) -> str:
        """A convolution over the batch, with dy as the kernel."""
        g, w = self.g, self.w
        attrs: dict[str, Any] = {
            "kernel_shape": list(w.output),
            "strides": list(w.dilations),
            "dilations": list(w.strides),
            "pads": w.flat_pads,
        }
        swapped = g.emit("Conv", _channels_first(g, self.x, self.rank), _channels_first(g, dy, self.rank), attrs=attrs)
        if any(rest >= d for rest, d in zip(leftovers(w), w.dilations, strict=True)):
            axes = range(2, self.rank + 2)
            swapped = g.emit("Slice", swapped, g.ints(*[0] * self.rank), g.ints(*w.kernel), g.ints(*axes))
        return _channels_first(g, swapped, self.rank)

    # -- columns ----------------------------------------------------------------------------------------------------

    def columns(self) -> str:
        """The input's windows, made once for forward and weight gradient."""
        if self._columns is None:
            self._columns = columns(self.g, self.x, self.w)
        return self._columns

    def from_batch_last(self, flat: str, sizes: tuple[int, ...]) -> str:
        """[C, positions · N] as [N, C, ...]."""
        g = self.g
        apart = g.emit("Reshape", flat, g.ints(0, *sizes, -1))
        return g.emit("Transpose", apart, attrs={"perm": [self.rank + 1, *range(self.rank + 1)]})


def columns(g: Graph, x: str, w: Window) -> str:
    """All windows of a whole batch: [C · taps, positions · N]. With the batch last, a tap is a copy of long runs."""
    padded = _padded(g, _batch_last(g, x, len(w.sizes)), w, first=1)
    parts = [g.emit("Unsqueeze", t, g.ints(1)) for t in taps(g, padded, w, first=1)]
    stacked = g.emit("Concat", *parts, attrs={"axis": 1}) if len(parts) > 1 else parts[0]
    return g.emit("Flatten", stacked, attrs={"axis": 2})


def taps(g: Graph, padded: str, w: Window, first: int) -> list[str]:
    """What each kernel element sees of a padded input whose spatial axes start at `first`."""
    axes = range(first, first + len(w.sizes))
    out = []
    for position in itertools.product(*map(range, w.kernel)):
        starts = [p * d for p, d in zip(position, w.dilations, strict=True)]
        ends = [s + (n - 1) * t + 1 for s, n, t in zip(starts, w.output, w.strides, strict=True)]
        whole = all(
            s == 0 and t == 1 and e == size + sum(pad)
            for s, e, t, size, pad in zip(starts, ends, w.strides, w.sizes, w.pads, strict=True)
        )
        if whole:
            out.append(padded)
            continue
        steps = [g.ints(*w.strides)] if any(t != 1 for t in w.strides) else []
        out.append(g.emit("Slice", padded, g.ints(*starts), g.ints(*ends), g.ints(*axes), *steps))
    return out


def _padded(g: Graph, x: str, w: Window, first: int) -> str:
    """Zeros around the spatial axes, which start at `first`; two axes in all are not spatial."""
    if not any(w.flat_pads):
        return x
    begins, ends = ([0] * first + [p[k] for p in w.pads] + [0] * (2 - first) for k in (0, 1))
    return g.emit("Pad", x, g.ints(*begins, *ends))


def _channels_first(g: Graph, value: str, rank: int) -> str:
    return g.emit("Transpose", value, attrs={"perm": [1, 0, *range(2, rank + 2)]})


def _batch_last(g: Graph, value: str, rank: int) -> str:
    return g.emit("Transpose", value, attrs={"perm": [*range(1, rank + 2), 0]})


def _column(g: Graph, value: str, rank: int) -> str:
    return g.emit("Unsqueeze", value, g.ints(*range(1, rank + 1)))


def _attrs(w: Window) -> dict[str, Any]:
    return {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "dilations": list(w.dilations),
        "pads": w.flat_pads,
        "group": 1,
    }
