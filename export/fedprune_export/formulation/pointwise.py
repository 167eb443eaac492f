"""Gradients of kernels of one place, whose input or output is in blocks: products over batch and places.

One of the two has to lie with its channels last, [N, places, C], as a block does: the operator that leaves blocks
copies runs there. For maps of many places the other one is [N, C, places], and there is a product for every sample,
which multiplies faster; for few, both have their channels last, and one product is over all samples.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.formulation.layouts import BLOCKED, Layouts

_MANY = 256
"""Places of a map from which on a product for every sample is faster, measured on x86 with MobileNetV2's layers."""


def serves(layouts: Layouts, w: Window, x: str, dy: str) -> bool:
    """Whether a layer is one of these."""
    strided = any(s != 1 for s in w.strides)
    inside = layouts.in_blocks(x), layouts.in_blocks(dy)
    return w.kernel == (1, 1) and not any(w.flat_pads) and (inside[0] if strided else any(inside))


def kernel_gradient(layouts: Layouts, w: Window, x: str, dy: str) -> str:
    """The gradient [O, I, 1, 1] of a layer's kernel, without what dy owes.

    Args:
        layouts: The values of the graph.
        w: The layer's window.
        x: Its input.
        dy: The gradient of its output.
    """
    g = layouts.graph
    places = w.output[0] * w.output[1]
    value = layouts.blocked(x) if layouts.in_blocks(x) else layouts.plain(x)
    image = _Side(layouts, layouts.sizes(x)[0], places, value, layouts.in_blocks(x))
    if any(s != 1 for s in w.strides):
        image = image.strided(w)
    value = layouts.unpaid(dy, blocked=layouts.in_blocks(dy))
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
        """Whether its channels lie last already: it is one whole block."""
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
