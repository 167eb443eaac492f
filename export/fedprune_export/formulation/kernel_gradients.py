"""Gradients of kernels: matrix products, or a convolution over the batch with channels in blocks.

In blocks the samples of the batch play the channels, the inputs play the samples, and dy is the kernel: what
onnxruntime computes fastest, computes dw. The input gets its padding first: padded places take a slow path there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED, Layouts
from fedprune_export.gradients.dense import Dense, Formulation
from fedprune_export.gradients.depthwise import Depthwise
from fedprune_export.gradients.intents import KERNEL_GRADIENT
from fedprune_export.gradients.windows import Window
from fedprune_export.graph import Node

_FILTERS = 64
"""Outputs that onnxruntime's convolution in blocks computes at once, if blocks have 16 channels."""

_CACHED = 2**13
"""Numbers of dy per sample that, for a batch of 32, stay in a cache of 1 MiB."""


@rule(KERNEL_GRADIENT)
def kernel_gradient(to: Formulator, node: Node) -> bool:
    """The gradient of a kernel in the form that is chosen; what dy owes is paid on the result."""
    x, dy, kernel = node.inputs
    w: Window = node.attrs["window"]
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    form = to.forms.kernel_gradient(w, layouts.sizes(x)[0], layouts.sizes(dy)[0])
    owed = layouts.owed(dy)
    if node.attrs["group"] > 1 and to.forms.in_blocks(w, 1, layouts.sizes(x)[0], depthwise=True):
        result = _of_depthwise(to, w, x, dy)
    elif node.attrs["group"] > 1:
        deep = Depthwise(g, w, layouts.plain(kernel))
        result = deep.kernel_gradient(layouts.plain(x), layouts.unpaid(dy, blocked=False))
    elif form == "blocked":
        result = _in_blocks(to, w, x, dy)
    else:
        dense = Dense(g, w, "", Formulation("flipped", form))
        result = dense.kernel_gradient(layouts.plain(x), layouts.unpaid(dy, blocked=False))
    if owed is not None:
        result = g.emit("Mul", result, g.emit("Unsqueeze", owed, g.ints(1, 2, 3)))
    to.name(result, out)
    return True


def _in_blocks(to: Formulator, w: Window, x: str, dy: str) -> str:
    """As a convolution over the batch; samples are filled up to whole blocks."""
    layouts = to.layouts
    blocked = layouts.in_blocks(x)
    image = layouts.blocked(x) if blocked else layouts.plain(x)
    layer = _OverBatch(layouts, w, layouts.sizes(x)[0], layouts.sizes(dy)[0], image, blocked)
    return layer.write(layouts.unpaid(dy, blocked=True))


def _of_depthwise(to: Formulator, w: Window, x: str, dy: str) -> str:
    """As a depthwise convolution of all samples' channels with dy, in which nothing has to move."""
    layouts, g, b = to.layouts, to.graph, to.layouts.block
    channels, filled = layouts.sizes(x)[0], layouts.filled(layouts.sizes(x)[0])
    found = _found(w)
    each = layouts.correlated(layouts.blocked(x), layouts.unpaid(dy, blocked=True), w, filled)
    total = g.emit("ReduceSum", g.emit("Reshape", each, g.ints(layouts.batch, -1)), g.ints(0), attrs={"keepdims": 0})
    apart = g.emit("Reshape", total, g.ints(filled // b, math.prod(found), b))
    kernel = g.emit("Reshape", g.emit("Transpose", apart, attrs={"perm": [0, 2, 1]}), g.ints(filled, 1, *found))
    if (filled, *found) == (channels, *w.kernel):
        return kernel
    return g.emit("Slice", kernel, g.ints(0, 0, 0), g.ints(channels, *w.kernel), g.ints(0, 2, 3))


@dataclass(frozen=True)
class _OverBatch:
    """The convolution of a layer's input with dy.

    Attributes:
        layouts: The values of the graph around it.
        w: The layer's window.
        inputs: Its input channels.
        outputs: Its output channels.
        x: Its input.
        blocked: Whether that is in blocks.
    """

    layouts: Layouts
    w: Window
    inputs: int
    outputs: int
    x: str
    blocked: bool

    def write(self, dy: str) -> str:
        """Write it, given the gradient in blocks."""
        g, w = self.layouts.graph, self.w
        b, out = self.layouts.block, self.layouts.filled(self.outputs)
        if self._missing:
            dy = g.emit("Pad", dy, g.ints(0, 0, 0, 0, self._missing, 0, 0, 0))
        image = self._image_of_blocks() if self.blocked else self._image()
        rows = w.output[0] // self._bands
        attrs = {
            "kernel_shape": [rows, w.output[1]],
            "strides": list(w.dilations),
            "dilations": list(w.strides),
            "pads": [0, 0, 0, 0],
            "group": 1,
        }
        y = ""
        for band in range(self._bands):
            first = band * rows
            apart = g.emit("Reshape", dy, g.ints(-1, b, out // b, math.prod(w.output), b))
            if self._bands > 1:
                places = first * w.output[1], (first + rows) * w.output[1]
                apart = g.emit("Slice", apart, g.ints(places[0]), g.ints(places[1]), g.ints(3))
            kernel = g.emit("Transpose", apart, attrs={"perm": [2, 0, 3, 1, 4]})
            kernel = g.emit("Reshape", kernel, g.ints(out, -1, rows, w.output[1]))
            inputs = [self._rows_of(image, first, rows), kernel] + (["", y] if y else [])  # it adds up by itself
            y = g.emit("Conv", *inputs, attrs=attrs, domain=BLOCKED)
        y = g.emit("ReorderOutput", y, attrs={"channels": self.outputs, "channels_last": 0}, domain=BLOCKED)
        if _found(w) != w.kernel:  # the last rows and columns are of no tap
            y = g.emit("Slice", y, g.ints(0, 0), g.ints(*w.kernel), g.ints(2, 3))
        return g.emit("Transpose", y, attrs={"perm": [1, 0, 2, 3]})

    @property
    def _missing(self) -> int:
        """How many samples are filled up."""
        return self.layouts.filled(self.layouts.batch) - self.layouts.batch

    @property
    def _bands(self) -> int:
        """Into how many bands of rows the maps are cut, so that a band of dy stays in a processor's cache."""
        numbers = math.prod(self.w.output) * min(self.layouts.filled(self.outputs), _FILTERS)
        return math.gcd(self.w.output[0], 2 ** max(0, math.ceil(math.log2(numbers / _CACHED))))

    def _rows_of(self, image: str, first: int, rows: int) -> str:
        """What of the image a band of dy's rows meets."""
        if self._bands == 1:
            return image
        g, w = self.layouts.graph, self.w
        tall, wide = _padded(w)
        start = first * w.strides[0]
        end = start + (rows - 1) * w.strides[0] + w.dilations[0] * (_found(w)[0] - 1) + 1
        lines = g.emit("Reshape", image, g.ints(self.inputs, -1, tall, wide * self.layouts.block))
        lines = g.emit("Slice", lines, g.ints(start), g.ints(end), g.ints(2))
        return g.emit("Reshape", lines, g.ints(self.inputs, -1, end - start, wide))

    def _image_of_blocks(self) -> str:
        """[N, I/b, H, W, b] with the samples last, padded, and in blocks of samples: [I, N/b, H', W', b]."""
        g, w = self.layouts.graph, self.w
        b, into = self.layouts.block, self.layouts.filled(self.inputs)
        flat = g.emit("Reshape", self.x, g.ints(-1, into * math.prod(w.sizes)))
        flat = g.emit("Transpose", flat, attrs={"perm": [1, 0]})
        if self._missing:
            flat = g.emit("Pad", flat, g.ints(0, 0, 0, self._missing))
        flat = g.emit("Reshape", flat, g.ints(into // b, *w.sizes, -1))  # the last axis has b channels of all samples
        if any(w.flat_pads):
            (top, bottom), (left, right) = w.pads
            flat = g.emit("Pad", flat, g.ints(0, top, left, 0, 0, bottom, right, 0))
        apart = g.emit("Reshape", flat, g.ints(into // b, math.prod(_padded(w)), b, -1, b))
        if into != self.inputs and into == b:
            apart = g.emit("Slice", apart, g.ints(0), g.ints(self.inputs), g.ints(2))
        image = g.emit("Transpose", apart, attrs={"perm": [0, 2, 3, 1, 4]})
        image = g.emit("Reshape", image, g.ints(self.inputs if into == b else into, -1, *_padded(w)))
        return image if into in (b, self.inputs) else g.emit("Slice", image, g.ints(0), g.ints(self.inputs), g.ints(0))

    def _image(self) -> str:
        """[N, I, H, W] in blocks of samples."""
        g = self.layouts.graph
        image = g.emit("Transpose", self.x, attrs={"perm": [1, 0, 2, 3]})
        (top, bottom), (left, right) = self.w.pads
        if self._missing or any(self.w.flat_pads):
            image = g.emit("Pad", image, g.ints(0, 0, top, left, 0, self._missing, bottom, right))
        return g.emit("ReorderInput", image, attrs={"channels_last": 0}, domain=BLOCKED)


def _padded(w: Window) -> tuple[int, int]:
    """Height and width of a window's input with its padding."""
    height, width = (size + sum(pad) for size, pad in zip(w.sizes, w.pads, strict=True))
    return height, width


def _found(w: Window) -> tuple[int, ...]:
    """Height and width of what comes out if the outputs' gradient is the kernel."""
    return tuple(
        (size - stride * (n - 1) - 1) // dilation + 1
        for size, stride, n, dilation in zip(_padded(w), w.strides, w.output, w.dilations, strict=True)
    )
