"""Gradients of kernels: matrix products, or a convolution over the batch with channels in blocks.

In blocks the samples of the batch play the channels, blocks of inputs play the samples, and dy is the kernel: what
onnxruntime computes fastest, computes dw. The input gets its padded columns first: those take a slow path there.

Kernels of one place, whose input or output is in blocks, are products over batch and places. One of the two must have
its channels last, [N, places, C], as a block does: the operator that leaves blocks copies runs there. For maps of many
places the other one is [N, C, places], and there is a product for every sample, which multiplies faster; for few, both
have their channels last, and one product is over all samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.autodiff.intents import KERNEL_GRADIENT
from fedprune_export.autodiff.rules.dense import Dense, Formulation
from fedprune_export.autodiff.rules.depthwise import Depthwise
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED, Layouts
from fedprune_export.ir.graph import Node

_MANY = 256
"""Places of a map from which on a product for every sample is faster, measured on x86 with MobileNetV2's layers."""


def serves_pointwise(layouts: Layouts, w: Window, x: str, dy: str) -> bool:
    """Whether a layer is one of these."""
    strided = any(s != 1 for s in w.strides)
    inside = layouts.in_blocks(x), layouts.in_blocks(dy)
    return w.kernel == (1, 1) and not any(w.flat_pads) and (inside[0] if strided else any(inside))


def pointwise_kernel_gradient(layouts: Layouts, w: Window, x: str, dy: str) -> str:
    """The gradient [O, I, 1, 1] of a layer's kernel, without the deferred scale of dy."""
    g = layouts.graph
    places = w.output[0] * w.output[1]
    value = layouts.blocked(x) if layouts.in_blocks(x) else layouts.plain(x)
    image = _Side(layouts, layouts.sizes(x)[0], places, value, layouts.in_blocks(x))
    if any(s != 1 for s in w.strides):
        image = image.strided(w)
    value = layouts.without_scale(dy, blocked=layouts.in_blocks(dy))
    slope = _Side(layouts, layouts.sizes(dy)[0], places, value, layouts.in_blocks(dy))
    outputs, inputs = slope.channels, image.channels
    if places < _MANY or (slope.as_it_is and image.as_it_is):
        rows = [g.emit("Reshape", side.last(), g.ints(-1, side.channels)) for side in (slope, image)]
        product = g.emit("Gemm", *rows, attrs={"transA": 1})
    else:
        wide, narrow = (image, slope) if inputs > outputs else (slope, image)
        each = g.emit("MatMul", wide.first(), narrow.last())
        product = g.emit("ReduceSum", each, g.ints(0), attrs={"keepdims": 0})
        if wide is image:
            product = g.emit("Transpose", product, attrs={"perm": [1, 0]})
    return g.emit("Reshape", product, g.ints(outputs, inputs, 1, 1))


@dataclass(frozen=True)
class _Side:
    """One of the two values.

    Attributes:
        layouts: The values of the graph around it.
        channels: Its channels.
        places: Places of its maps.
        value: Where it is.
        blocked: Whether that is in blocks.
    """

    layouts: Layouts
    channels: int
    places: int
    value: str
    blocked: bool

    @property
    def as_it_is(self) -> bool:
        """Whether its channels are last already: it is one whole block."""
        return self.blocked and self.channels == self.layouts.block

    def last(self) -> str:
        """It as [N, places, C]."""
        g, shape = self.layouts.graph, self.layouts.graph.ints(-1, self.places, self.channels)
        if self.as_it_is:
            return g.emit("Reshape", self.value, shape)
        if self.blocked:
            attrs = {"channels": self.channels, "channels_last": 1}
            return g.emit("Reshape", g.emit("ReorderOutput", self.value, attrs=attrs, domain=BLOCKED), shape)
        return g.emit("Transpose", self.first(), attrs={"perm": [0, 2, 1]})

    def first(self) -> str:
        """It as [N, C, places]."""
        g, value = self.layouts.graph, self.value
        if self.blocked:
            attrs = {"channels": self.channels, "channels_last": 0}
            value = g.emit("ReorderOutput", value, attrs=attrs, domain=BLOCKED)
        return g.emit("Reshape", value, g.ints(-1, self.channels, self.places))

    def strided(self, w: Window) -> _Side:
        """What of a value in blocks a layer with strides reads."""
        g, b = self.layouts.graph, self.layouts.block
        maps = g.emit("Reshape", self.value, g.ints(-1, *w.sizes, b))
        ends = [(n - 1) * s + 1 for n, s in zip(w.output, w.strides, strict=True)]
        maps = g.emit("Slice", maps, g.ints(0, 0), g.ints(*ends), g.ints(1, 2), g.ints(*w.strides))
        filled = self.layouts.filled(self.channels)
        value = g.emit("Reshape", maps, g.ints(-1, filled, *w.output))
        return _Side(self.layouts, self.channels, self.places, value, True)


_FILTERS = 64
"""Outputs that onnxruntime's convolution in blocks computes at once, if blocks have 16 channels."""

_CACHED = 2**13
"""Numbers of dy per sample that, for a batch of 32, stay in a cache of 1 MiB."""


@rule(KERNEL_GRADIENT)
def kernel_gradient(to: Formulator, node: Node) -> bool:
    """The gradient of a kernel in the form that is chosen; the deferred scale of dy is applied to the result."""
    x, dy, kernel = node.inputs
    w: Window = node.attrs["window"]
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    deferred = layouts.deferred(dy)
    if node.attrs["group"] > 1 and to.forms.in_blocks(w, 1, layouts.sizes(x)[0], depthwise=True):
        result = _of_depthwise(to, w, x, dy)
    elif node.attrs["group"] > 1:
        deep = Depthwise(g, w, layouts.plain(kernel))
        result = deep.kernel_gradient(layouts.plain(x), layouts.without_scale(dy, blocked=False))
    elif serves_pointwise(layouts, w, x, dy):
        result = pointwise_kernel_gradient(layouts, w, x, dy)
    elif (form := to.forms.kernel_gradient(w, layouts.sizes(x)[0], layouts.sizes(dy)[0])) == "blocked":
        result = _in_blocks(to, w, x, dy)
    else:
        dense = Dense(g, w, "", Formulation("flipped", form))
        result = dense.kernel_gradient(layouts.plain(x), layouts.without_scale(dy, blocked=False))
    if deferred is not None:
        result = g.emit("Mul", result, g.emit("Unsqueeze", deferred, g.ints(1, 2, 3)))
    to.name(result, out)
    return True


def _in_blocks(to: Formulator, w: Window, x: str, dy: str) -> str:
    """As a convolution over the batch; samples are filled up to whole blocks."""
    layouts = to.layouts
    blocked = layouts.in_blocks(x)
    image = layouts.blocked(x) if blocked else layouts.plain(x)
    layer = _OverBatch(layouts, w, layouts.sizes(x)[0], layouts.sizes(dy)[0], image, blocked)
    return layer.write(layouts.without_scale(dy, blocked=True))


def _of_depthwise(to: Formulator, w: Window, x: str, dy: str) -> str:
    """As a depthwise convolution of all samples' channels with dy, in which nothing has to move."""
    layouts, g, b = to.layouts, to.graph, to.layouts.block
    channels, filled = layouts.sizes(x)[0], layouts.filled(layouts.sizes(x)[0])
    found = _found(w)
    each = layouts.correlated(layouts.blocked(x), layouts.without_scale(dy, blocked=True), w, filled)
    total = g.emit("ReduceSum", g.emit("Reshape", each, g.ints(layouts.batch, -1)), g.ints(0), attrs={"keepdims": 0})
    apart = g.emit("Reshape", total, g.ints(filled // b, math.prod(found), b))
    kernel = g.emit("Reshape", g.emit("Transpose", apart, attrs={"perm": [0, 2, 1]}), g.ints(filled, 1, *found))
    if (filled, *found) == (channels, *w.kernel):
        return kernel
    return g.emit("Slice", kernel, g.ints(0, 0, 0), g.ints(channels, *w.kernel), g.ints(0, 2, 3))


@dataclass(frozen=True)
class _OverBatch:
    """The convolution of a layer's input with dy.

    Input channels are side by side in the width, so that a convolution makes a tap's outputs for many of them at
    once, and reads dy once for all of them.

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
        w, (top, bottom) = self.w, self.w.pads[0]
        attrs = {
            "kernel_shape": [self._rows, w.output[1]],
            "strides": [w.dilations[0], 1],
            "dilations": [w.strides[0], w.strides[1] * self._beside],
            # Padded rows are left out by the operator, padded columns are slow.
            "pads": [top, 0, bottom, 0] if self._bands == 1 else [0, 0, 0, 0],
            "group": 1,
        }
        image, kernel = self._image(), self._kernel(dy)
        return self._sorted(self.layouts.graph.emit("Conv", image, kernel, attrs=attrs, domain=BLOCKED))

    @property
    def _beside(self) -> int:
        """Channels side by side: those of a block, or all of them."""
        return self.layouts.block if self.blocked else self.inputs

    @property
    def _blocks(self) -> int:
        """How many times as many channels there are."""
        return self.layouts.filled(self.inputs) // self.layouts.block if self.blocked else 1

    @property
    def _missing(self) -> int:
        """How many samples are filled up."""
        return self.layouts.filled(self.layouts.batch) - self.layouts.batch

    @property
    def _bands(self) -> int:
        """Into how many bands of rows the maps are cut, so that a band of dy stays in a processor's cache."""
        numbers = math.prod(self.w.output) * min(self.layouts.filled(self.outputs), _FILTERS)
        return math.gcd(self.w.output[0], 2 ** max(0, math.ceil(math.log2(numbers / _CACHED))))

    @property
    def _rows(self) -> int:
        """Rows of dy in a band."""
        return self.w.output[0] // self._bands

    def _image(self) -> str:
        """The input in blocks of samples, [blocks, N · bands, H', W' · channels]; bands play channels, too."""
        g, w, beside, blocks = self.layouts.graph, self.w, self._beside, self._blocks
        samples = self.layouts.batch + self._missing
        value, (height, width) = self.x, w.sizes
        if not self.blocked and self.inputs > 1:
            value = g.emit("Reshape", value, g.ints(-1, self.inputs, height * width))
            value = g.emit("Transpose", value, attrs={"perm": [0, 2, 1]})
        value = g.emit("Reshape", value, g.ints(-1, blocks, height, width * beside))
        (top, bottom), (left, right) = ((0, 0), w.pads[1]) if self._bands == 1 else w.pads
        if self._missing or any((top, bottom, left, right)):
            ends = (0, 0, top, left * beside, self._missing, 0, bottom, right * beside)
            value = g.emit("Pad", value, g.ints(*ends))
        height, wide = height + top + bottom, _padded(w)[1] * beside
        taken = height
        if self._bands > 1:
            taken = (self._rows - 1) * w.strides[0] + w.dilations[0] * (_found(w)[0] - 1) + 1
            starts = [band * self._rows * w.strides[0] for band in range(self._bands)]
            lines = [k * height + start + i for k in range(blocks) for start in starts for i in range(taken)]
            value = g.emit("Reshape", value, g.ints(samples, blocks * height, wide))
            value = g.emit("Gather", value, g.ints(*lines), attrs={"axis": 1})
        tall = taken * self._bands
        if blocks > 1:
            value = g.emit("Reshape", value, g.ints(samples, blocks, tall * wide))
            value = g.emit("Transpose", value, attrs={"perm": [1, 0, 2]})
        value = g.emit("Reshape", value, g.ints(blocks, samples, tall, wide))
        value = g.emit("ReorderInput", value, attrs={"channels_last": 0}, domain=BLOCKED)
        return g.emit("Reshape", value, g.ints(blocks, samples * self._bands, taken, wide))

    def _kernel(self, dy: str) -> str:
        """Dy as a kernel over samples and bands: [O/b, N/b, H, W, b of N, b of O]."""
        g, b, (height, width) = self.layouts.graph, self.layouts.block, self.w.output
        out = self.layouts.filled(self.outputs)
        if self._missing:
            dy = g.emit("Pad", dy, g.ints(0, 0, 0, 0, self._missing, 0, 0, 0))
        if out == b:  # then there is an operator that sorts it
            dy = g.emit("Reshape", dy, g.ints(-1, b * b, height, width))
            kernel = g.emit("ReorderOutput", dy, attrs={"channels": b * b, "channels_last": 1}, domain=BLOCKED)
        else:
            apart = g.emit("Reshape", dy, g.ints(-1, b, out // b, height * width, b))
            kernel = g.emit("Transpose", apart, attrs={"perm": [2, 0, 3, 1, 4]})
        return g.emit("Reshape", kernel, g.ints(out, -1, self._rows, width))

    def _sorted(self, y: str) -> str:
        """What comes out, [blocks of I, O/b, H', W', I, b], as a kernel [O, I, kh, kw]."""
        g, w, b, beside = self.layouts.graph, self.w, self.layouts.block, self._beside
        out, inputs, (height, width) = self.layouts.filled(self.outputs), self._blocks * beside, w.kernel
        found, span = _found(w)[0], _padded(w)[1] - w.strides[1] * (w.output[1] - 1)
        if (found, span) != w.kernel:  # the last rows and columns are of no tap, nor is what dilation leaves out
            y = g.emit("Reshape", y, g.ints(-1, found, span, beside * b))
            ends, steps = g.ints(height, w.dilations[1] * (width - 1) + 1), g.ints(1, w.dilations[1])
            y = g.emit("Slice", y, g.ints(0, 0), ends, g.ints(1, 2), steps)
        y = g.emit("Reshape", y, g.ints(self._blocks, out // b, height * width, beside, b))
        y = g.emit("Transpose", y, attrs={"perm": [1, 0, 3, 2, 4]})  # runs of b move, which is fast
        y = g.emit("Reshape", y, g.ints(out // b, b, inputs, height * width))
        y = g.emit("ReorderOutput", y, attrs={"channels": b, "channels_last": 0}, domain=BLOCKED)
        y = g.emit("Reshape", y, g.ints(out, inputs, height, width))
        if (out, inputs) == (self.outputs, self.inputs):
            return y
        return g.emit("Slice", y, g.ints(0, 0), g.ints(self.outputs, self.inputs), g.ints(0, 1))


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
