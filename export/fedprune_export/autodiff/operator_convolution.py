"""Convolution by Conv and ConvTranspose, and its gradients by whichever algorithm is fastest for the layer's shape.

The algorithms give the same numbers; `choose_algorithms` picks them. A *tap* is one element of the kernel, and the
numbers of the input that it is multiplied by.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Literal

from fedprune.planning.probe_report import CUDA
from fedprune_export.autodiff.column_convolution import ChannelGroups, ColumnConvolution
from fedprune_export.autodiff.sliding_window import Window
from fedprune_export.autodiff.tape import Tape
from fedprune_export.ir.graph import Graph


@dataclass(frozen=True)
class Algorithms:
    """The algorithms of a convolution's gradients. In several groups only transposed convolutions and columns serve.

    Attributes:
        input_gradient: A convolution with the flipped kernel, or a transposed convolution.
        weight_gradient: A product per tap and sample, one product with columns (all windows of the whole batch), or a
            convolution with dy as its kernel.
    """

    input_gradient: Literal["flipped", "transposed"]
    weight_gradient: Literal["taps", "columns", "convolution"]


# Where one algorithm overtakes another: measured with LeNet, VGG11 and ResNet20 on x86 (`benchmarks/step.py`).
# The area of the output from which a product per tap is faster than columns.
_MIN_TAPS_AREA = 64
# Up to this area columns are faster than operators, too: onnxruntime's Conv computes a product per sample. Measured
# with layers of ResNets and RegNets on x86.
_MAX_COLUMNS_AREA = 16
# The elements of a kernel from which products per tap are too many.
_MIN_LARGE_KERNEL_ELEMENTS = 25
# A first layer has at most so many input channels: with a large kernel, its weight gradient is a convolution. Columns
# would be faster than taps of a small kernel, but keep all taps of a whole image at once, which no width makes smaller.
_MAX_IMAGE_CHANNELS = 3


def choose_algorithms(tape: Tape, w: Window, groups: ChannelGroups) -> Algorithms | None:
    """The fastest algorithms for a layer with this window; None where columns serve for all of it."""
    area, elements = math.prod(w.output), math.prod(w.kernel)
    if groups.number == 1 and tape.graph.unit == CUDA:
        # On a GPU each launch costs more than its arithmetic: the algorithms with the fewest operators.
        return Algorithms("transposed", "convolution")
    # The number of groups of an operator is fixed.
    if area <= _MAX_COLUMNS_AREA or isinstance(groups.number, str):
        return None
    if groups.number > 1:
        return Algorithms("transposed", "columns")
    is_large = elements >= _MIN_LARGE_KERNEL_ELEMENTS
    input_gradient: Literal["flipped", "transposed"] = (
        "flipped" if w.has_flipped_gradient and not is_large else "transposed"
    )
    if is_large and tape.extent(groups.inputs) <= _MAX_IMAGE_CHANNELS:
        return Algorithms(input_gradient, "convolution")
    return Algorithms(input_gradient, "taps" if area >= _MIN_TAPS_AREA else "columns")


class OperatorConvolution:
    """A convolution by operators (see `Convolution` in `operators.convolution`). `columns`: the same one by columns."""

    def __init__(self, columns: ColumnConvolution, algorithms: Algorithms) -> None:
        self.tape, self.g, self.columns, self.algorithms = columns.tape, columns.g, columns, algorithms
        self.window, self.kernel, self.batch, self.rank = columns.window, columns.kernel, columns.batch, columns.rank
        self.groups = self.tape.extent(columns.groups)

    def apply(self, x: str, bias: list[str]) -> str:
        return self.g.emit("Conv", x, self.kernel, *bias, attrs=self.window.conv_attrs(self.groups))

    def apply_transposed(self, dy: str, bias: list[str]) -> str:
        if self.algorithms.input_gradient == "flipped":
            return self.g.emit("Conv", dy, self.flipped_kernel(), *bias, attrs=self.transposed_window().conv_attrs())
        attrs = self.window.transposed_attrs(self.groups)
        return self.g.emit("ConvTranspose", dy, self.kernel, *bias, attrs=attrs)

    def kernel_gradient(self, x: str, dy: str) -> str:
        if self.algorithms.weight_gradient == "taps":
            return self.kernel_by_taps(x, dy)
        if self.algorithms.weight_gradient == "columns":
            return self.columns.kernel_gradient(x, dy)
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
        rows, positions = self.flat_map(dy), g.ints(0, math.prod(w.output), -1)
        if w.is_pointwise:
            taps = [g.emit("Transpose", self.flat_map(x), attrs={"perm": [0, 2, 1]})]
        else:
            # Channels last: a tap is then a copy of long runs, and the product needs no further transpose.
            x = g.emit("Transpose", x, attrs={"perm": [0, *range(2, self.rank + 2), 1]})
            taps = [g.emit("Reshape", t, positions) if self.rank > 1 else t for t in tap_slices(g, x, w)]
        products = [self.tape.sum_leading(g.emit("MatMul", rows, tap), (self.batch,)) for tap in taps]
        # A row of outputs · inputs per kernel element.
        gradient = products[0]
        if len(products) > 1:
            gradient = g.emit("Transpose", g.emit("Concat", *products, attrs={"axis": 0}), attrs={"perm": [1, 0]})
        return g.emit("Reshape", gradient, self.tape.shape_of(self.kernel))

    def flat_map(self, value: str) -> str:
        """[N, C, ...] as [N, C, positions]."""
        return self.g.emit("Reshape", value, self.g.ints(0, 0, -1)) if self.rank > 1 else value

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
        steps = [g.ints(*w.strides)] if any(t != 1 for t in w.strides) else []
        slices.append(g.emit("Slice", x, g.ints(*starts), g.ints(*ends), g.ints(*axes), *steps))
    return slices


def _channels_first(g: Graph, value: str, rank: int) -> str:
    return g.emit("Transpose", value, attrs={"perm": [1, 0, *range(2, rank + 2)]})
