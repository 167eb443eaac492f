"""Convolution in one group, by whichever of several algorithms is fastest for the layer's shape.

The gradients of a layer can be computed by several algorithms that give the same numbers; `choose_algorithms` picks
them. A *tap* is one element of the kernel, and the numbers of the input that it is multiplied by.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from fedprune_export.autodiff.sliding_window import Window
from fedprune_export.autodiff.tape import Dim, Tape
from fedprune_export.ir.graph import Graph

WeightGradient = Literal["taps", "columns", "convolution"]


@dataclass(frozen=True)
class Algorithms:
    """The algorithms of a convolution's gradients.

    Attributes:
        input_gradient: A convolution with the flipped kernel, or a transposed convolution.
        weight_gradient: A product per tap and sample, one product with columns (all windows of the whole batch), or a
            convolution with dy as its kernel.
    """

    input_gradient: Literal["flipped", "transposed"]
    weight_gradient: WeightGradient


# Where one algorithm overtakes another: measured with LeNet, VGG11 and ResNet20 on x86 (`benchmarks/step.py`).
# The area of the output from which a product per tap is faster than columns.
_MIN_TAPS_AREA = 64
# The elements of a kernel from which products per tap are too many.
_MIN_LARGE_KERNEL_ELEMENTS = 25
# A first layer has at most so many input channels: with a large kernel, its weight gradient is a convolution. Columns
# would be faster than taps of a small kernel, but keep all taps of a whole image at once, which no width makes smaller.
_MAX_IMAGE_CHANNELS = 3

# On a GPU each launch costs more than its arithmetic: the algorithms with the fewest operators.
CUDA_ALGORITHMS = Algorithms("transposed", "convolution")


def choose_algorithms(w: Window, channels: int) -> Algorithms:
    """Choose the fastest algorithms for a layer with this window and number of input channels."""
    area, elements = math.prod(w.output), math.prod(w.kernel)
    large = elements >= _MIN_LARGE_KERNEL_ELEMENTS
    if large and channels <= _MAX_IMAGE_CHANNELS:
        weight: WeightGradient = "convolution"
    else:
        weight = "taps" if area >= _MIN_TAPS_AREA else "columns"
    return Algorithms("flipped" if w.has_flipped_gradient and not large else "transposed", weight)


class DenseConvolution:
    """A convolution in one group (see `convolutions.Convolution`)."""

    def __init__(self, tape: Tape, w: Window, kernel: str, algorithms: Algorithms, batch: Dim) -> None:
        self.tape, self.g, self.window, self.kernel, self.algorithms = tape, tape.graph, w, kernel, algorithms
        self.batch, self.rank = batch, len(w.sizes)

    def apply(self, x: str, bias: list[str]) -> str:
        return self.g.emit("Conv", x, self.kernel, *bias, attrs=self.window.conv_attrs())

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        if self.algorithms.input_gradient == "transposed":
            return self.g.emit("ConvTranspose", dy, self.kernel, *bias, attrs=self.window.transposed_attrs())
        return self.g.emit("Conv", dy, self.flipped_kernel(), *bias, attrs=self.transposed_window().conv_attrs())

    def kernel_gradient(self, x: str, dy: str) -> str:
        if self.algorithms.weight_gradient == "taps":
            return self.kernel_by_taps(x, dy)
        if self.algorithms.weight_gradient == "columns":
            return self.kernel_by_columns(x, dy)
        return self.kernel_by_convolution(x, dy)

    # -- input gradient ---------------------------------------------------------------------------------------------

    def flipped_kernel(self) -> str:
        """The kernel with its channels swapped, and its taps in reverse order."""
        g, axes = self.g, range(2, self.rank + 2)
        kernel = g.emit("Transpose", self.kernel, attrs={"perm": [1, 0, *axes]})
        flip = [a for a in axes if self.window.kernel[a - 2] > 1]
        if not flip:
            return kernel
        # A slice with step -1 reverses an axis. Its end must lie before index 0: ONNX clamps the smallest int32 so.
        ones = [-1] * len(flip)
        return g.emit("Slice", kernel, g.ints(*ones), g.ints(*[-(2**31)] * len(flip)), g.ints(*flip), g.ints(*ones))

    def transposed_window(self) -> Window:
        """The window of the convolution with the flipped kernel, which gives the input's gradient (stride 1)."""
        w = self.window
        pads = tuple(
            (d * (k - 1) - before, d * (k - 1) - after)
            for (before, after), d, k in zip(w.pads, w.dilations, w.kernel, strict=True)
        )
        return Window(w.output, w.kernel, w.strides, w.dilations, pads, output=w.sizes)

    # -- weight gradient --------------------------------------------------------------------------------------------

    def kernel_by_taps(self, x: str, dy: str) -> str:
        """One batched matrix product per kernel element, summed over the batch."""
        g, w = self.g, self.window
        rows = g.emit("Reshape", dy, g.ints(0, 0, -1))
        # Channels last: a tap is then a copy of long runs, and the product needs no further transpose.
        x = g.emit("Transpose", x, attrs={"perm": [0, *range(2, self.rank + 2), 1]})
        products = []
        for tap in tap_slices(g, x, w):
            flat = g.emit("Reshape", tap, g.ints(0, math.prod(w.output), -1)) if self.rank > 1 else tap
            products.append(self.tape.sum_leading(g.emit("MatMul", rows, flat), (self.batch,)))
        # A row of outputs · inputs per kernel element.
        gradient = products[0]
        if len(products) > 1:
            gradient = g.emit("Transpose", g.emit("Concat", *products, attrs={"axis": 0}), attrs={"perm": [1, 0]})
        return g.emit("Reshape", gradient, self.tape.shape_of(self.kernel))

    def kernel_by_columns(self, x: str, dy: str) -> str:
        """One matrix product over all windows of the batch."""
        g = self.g
        rows = g.emit("Flatten", _batch_last(g, dy, self.rank), attrs={"axis": 1})
        flat = g.emit("Gemm", rows, window_columns(g, x, self.window), attrs={"transB": 1})
        return g.emit("Reshape", flat, g.ints(0, -1, *self.window.kernel))

    def kernel_by_convolution(self, x: str, dy: str) -> str:
        """A convolution over the batch, with dy as the kernel."""
        g, w = self.g, self.window
        attrs: dict[str, Any] = {
            "kernel_shape": list(w.output),
            "strides": list(w.dilations),
            "dilations": list(w.strides),
            "pads": w.flat_pads,
        }
        # Batch and channels swap roles: the sum over the batch is the convolution's sum over its input channels.
        swapped = g.emit("Conv", _channels_first(g, x, self.rank), _channels_first(g, dy, self.rank), attrs=attrs)
        # Input rows that no window reaches let the convolution slide further: it gives elements beyond the kernel's.
        if any(rest >= d for rest, d in zip(w.leftover_rows, w.dilations, strict=True)):
            axes = range(2, self.rank + 2)
            swapped = g.emit("Slice", swapped, g.ints(*[0] * self.rank), g.ints(*w.kernel), g.ints(*axes))
        return _channels_first(g, swapped, self.rank)


class PointwiseConvolution:
    """A convolution in one group with a kernel of 1 on maps whose size varies, such as a layer along the tokens of an
    MLP. `rank`: the number of spatial axes.
    """

    def __init__(self, tape: Tape, kernel: str, batch: Dim, rank: int) -> None:
        self.tape, self.g, self.kernel, self.batch, self.rank = tape, tape.graph, kernel, batch, rank

    def apply(self, x: str, bias: list[str]) -> str:
        return self.g.emit("Conv", x, self.kernel, *bias)

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        order = [1, 0, *range(2, self.rank + 2)]
        return self.g.emit("Conv", dy, self.g.emit("Transpose", self.kernel, attrs={"perm": order}), *bias)

    def kernel_gradient(self, x: str, dy: str) -> str:
        g = self.g
        # 0 copies the batch and the channels.
        rows_x, rows_dy = (g.emit("Reshape", value, g.ints(0, 0, -1)) for value in (x, dy))
        products = g.emit("MatMul", rows_dy, g.emit("Transpose", rows_x, attrs={"perm": [0, 2, 1]}))
        total = self.tape.sum_leading(products, (self.batch,))
        return g.emit("Reshape", total, self.tape.shape_of(self.kernel))


def window_columns(g: Graph, x: str, w: Window) -> str:
    """All windows of a whole batch: [C · taps, positions · N]. With the batch last, a tap is a copy of long runs."""
    slices = [g.emit("Unsqueeze", t, g.ints(1)) for t in tap_slices(g, _batch_last(g, x, len(w.sizes)), w)]
    stacked = g.emit("Concat", *slices, attrs={"axis": 1}) if len(slices) > 1 else slices[0]
    return g.emit("Flatten", stacked, attrs={"axis": 2})


def tap_slices(g: Graph, x: str, w: Window) -> list[str]:
    """The slice under each tap of an input whose spatial axes are all but the first and the last."""
    if any(w.flat_pads):
        # ONNX order: all begins, then all ends.
        begins, ends = ([0, *(p[k] for p in w.pads), 0] for k in (0, 1))
        x = g.emit("Pad", x, g.ints(*begins, *ends))
    axes = range(1, 1 + len(w.sizes))
    slices = []
    for position in itertools.product(*map(range, w.kernel)):
        starts = [p * d for p, d in zip(position, w.dilations, strict=True)]
        ends = [s + (n - 1) * t + 1 for s, n, t in zip(starts, w.output, w.strides, strict=True)]
        # A 1x1 kernel with stride 1 on an unpadded map: the slice would copy all of it.
        is_everything = all(
            s == 0 and t == 1 and e == size + sum(pad)
            for s, e, t, size, pad in zip(starts, ends, w.strides, w.sizes, w.pads, strict=True)
        )
        if is_everything:
            slices.append(x)
            continue
        steps = [g.ints(*w.strides)] if any(t != 1 for t in w.strides) else []
        slices.append(g.emit("Slice", x, g.ints(*starts), g.ints(*ends), g.ints(*axes), *steps))
    return slices


def _channels_first(g: Graph, value: str, rank: int) -> str:
    return g.emit("Transpose", value, attrs={"perm": [1, 0, *range(2, rank + 2)]})


def _batch_last(g: Graph, value: str, rank: int) -> str:
    return g.emit("Transpose", value, attrs={"perm": [*range(1, rank + 2), 0]})
