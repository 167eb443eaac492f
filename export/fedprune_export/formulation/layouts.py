"""Memory layouts of a graph's values: [N, C, H, W], or channels in blocks.

In blocks a value is [N, C/b, H, W, b]: b neighbouring channels of a place are neighbours in memory, so that one vector
instruction computes with all of them. Channels are filled up to whole blocks: with zeros, of which operators may make
other numbers (an exponential makes ones). No result depends on these as long as they are finite: kernels have zeros
there, and sums leave them out. onnxruntime's operators for this layout (domain `com.microsoft.nchwc`) say its shape as
[N, C, H, W] with the filled-up C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.ir.graph import Graph, Node

BLOCKED = "com.microsoft.nchwc"
"""The domain of onnxruntime's operators with channels in blocks."""

Sizes = tuple[int | str, ...]
"""A value's shape: all numbers but the batch."""

_ALIGNED = 4
"""ReorderInput takes multiples of this number of channels."""


class _Shapes(dict[str, Sizes]):
    """Shapes of values by name; asking for one that isn't known is an error of ours."""

    def __missing__(self, name: str) -> Sizes:
        raise ModelError(f"{name} of the training graph has no known shape")


@dataclass(frozen=True)
class Made:
    """The convolution that makes a value in blocks.

    Attributes:
        node: Its node.
        window: Its window.
        inputs: Channels of its input.
        in_blocks: Whether its input is in blocks.
    """

    node: Node
    window: Window
    inputs: int
    in_blocks: bool


class Layouts:
    """The values of a graph in both layouts, converted when the other one is read.

    A value may have a deferred scale, one number per channel (`defer`); a convolution applies it to its kernel,
    which is far smaller.

    Args:
        shapes: Shapes of values, as far as they are known.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, Sizes], block: int, batch: int) -> None:
        self.graph, self.block, self.batch = graph, block, batch
        self.shapes = _Shapes(shapes)
        self._blocked: dict[str, str] = {}
        self._plain: dict[str, str] = {}
        self._deferred: dict[str, str] = {}
        self._masks: set[str] = set()
        self._convolutions: dict[str, Made] = {}

    # -- shapes -----------------------------------------------------------------------------------------------------

    def image(self, name: str) -> tuple[int, int, int] | None:
        """Channels, height and width of a value that is a map of channels, else None."""
        shape = self.shapes.get(name, ())
        if len(shape) != 4:
            return None
        _, c, h, w = shape
        return (c, h, w) if isinstance(c, int) and isinstance(h, int) and isinstance(w, int) else None

    def sizes(self, name: str) -> tuple[int, int, int]:
        """`image` of a value that has to be one.

        Raises:
            ModelError: Its shape is not known, or another one.
        """
        found = self.image(name)
        if found is None:
            raise ModelError(f"{name} of the training graph", expected="[N, C, H, W]", got=self.shapes[name])
        return found

    def filled(self, channels: int) -> int:
        """Channels filled up to whole blocks."""
        return -(-channels // self.block) * self.block

    # -- values -----------------------------------------------------------------------------------------------------

    def in_blocks(self, name: str) -> bool:
        """Whether a value is there in blocks already."""
        return name in self._blocked

    def put(self, name: str, value: str) -> None:
        """Register the value in blocks of a name."""
        self._blocked[name] = value

    def mask(self, name: str) -> None:
        """Register a value as boolean, which can't be reordered as it is."""
        self._masks.add(name)

    def rename(self, name: str, value: str) -> None:
        """Register the value in plain layout of a name."""
        self._plain[name] = value

    def plain(self, name: str) -> str:
        """A value in plain layout."""
        self._apply_deferred(name)
        if name in self._blocked and name not in self._plain:
            channels = self.sizes(name)[0]
            value, attrs = self._blocked[name], {"channels": channels, "channels_last": 0}
            if name in self._masks:
                value = self.graph.emit("Cast", value, attrs={"to": 1})
                value = self.graph.emit("ReorderOutput", value, attrs=attrs, domain=BLOCKED)
                self._plain[name] = self.graph.emit("Cast", value, attrs={"to": 9})
            else:
                self._plain[name] = self.graph.emit("ReorderOutput", value, attrs=attrs, domain=BLOCKED)
        return self._plain.get(name, name)

    def blocked(self, name: str) -> str:
        """A value in blocks."""
        self._apply_deferred(name)
        if name not in self._blocked:
            g, channels = self.graph, self.sizes(name)[0]
            value = self.plain(name)
            if name in self._masks:
                value = g.emit("Cast", value, attrs={"to": 1})
            if channels % _ALIGNED:
                value = g.emit("Pad", value, g.ints(0, 0, 0, 0, 0, -channels % _ALIGNED, 0, 0))
            value = g.emit("ReorderInput", value, attrs={"channels_last": 0}, domain=BLOCKED)
            self._blocked[name] = g.emit("Cast", value, attrs={"to": 9}) if name in self._masks else value
        return self._blocked[name]

    def rows(self, name: str) -> str:
        """A value in blocks as [N, blocks, places, block]."""
        channels, height, width = self.sizes(name)
        g, blocks = self.graph, self.filled(channels) // self.block
        return g.emit("Reshape", self.blocked(name), g.ints(-1, blocks, height * width, self.block))

    def vector(self, value: str, channels: int) -> str:
        """A vector [C] filled up to whole blocks."""
        more = self.filled(channels) - channels
        return self.graph.emit("Pad", value, self.graph.ints(0, more)) if more else value

    # -- deferred scales ---------------------------------------------------------------------------------------------

    def defer(self, name: str, vector: str) -> None:
        """Defer the multiplication of a value by a vector [C]."""
        self._deferred[name] = vector

    def deferred(self, name: str) -> str | None:
        """The deferred scale of a value, if it has one."""
        return self._deferred.get(name)

    def without_scale(self, name: str, *, blocked: bool) -> str:
        """A value in one of the layouts, without its deferred scale."""
        deferred = self._deferred.pop(name, None)
        value = self.blocked(name) if blocked else self.plain(name)
        if deferred is not None:
            self._deferred[name] = deferred
        return value

    def _apply_deferred(self, name: str) -> None:
        deferred = self._deferred.pop(name, None)
        if deferred is None:
            return
        channels, g = self.sizes(name)[0], self.graph
        if name in self._blocked:
            self._blocked[name] = self.affine(self._blocked[name], channels, deferred)
            self._plain.pop(name, None)
        else:
            column = g.emit("Unsqueeze", deferred, g.ints(1, 2))
            self._plain[name] = g.emit("Mul", self._plain.get(name, name), column)

    # -- operators in blocks ----------------------------------------------------------------------------------------

    def affine(
        self,
        value: str,
        channels: int,
        scale: str,
        shift: str = "",
        add: str = "",
        bounds: Sequence[float] = (),
    ) -> str:
        """Value · scale + shift + add within bounds: one pass, as a convolution of 1×1.

        Args:
            scale: A vector [C].
            shift: Another one, or nothing.
            add: Another value in blocks, or nothing.
            bounds: The least result, which is 0 if it is the only bound, and the greatest.
        """
        scale, shift = (self.vector(v, channels) if v else "" for v in (scale, shift))
        return self._pointwise(value, self.filled(channels), scale, shift, add, bounds)

    def affine_each(
        self, value: str, name: str, scale: str, shift: str = "", add: str = "", bounds: Sequence[float] = ()
    ) -> str:
        """`affine` with numbers of their own for every sample: the vectors are [N, C].

        Args:
            shift: What is added to them, or nothing.
            add: Another value in blocks, or nothing.
            bounds: As `affine` has them.
        """
        g, (channels, height, width) = self.graph, self.sizes(name)
        filled, number = self.filled(channels), self.batch * self.filled(channels)
        if filled != channels:
            more = g.ints(0, 0, 0, filled - channels)
            scale, shift = (g.emit("Pad", v, more) if v else "" for v in (scale, shift))
        scale, shift = (g.emit("Reshape", v, g.ints(number)) if v else "" for v in (scale, shift))
        laid = g.ints(1, number, height, width)
        value, add = (g.emit("Reshape", v, laid) if v else "" for v in (value, add))
        result = self._pointwise(value, number, scale, shift, add, bounds)
        return g.emit("Reshape", result, g.ints(self.batch, filled, height, width))

    def _pointwise(self, value: str, number: int, scale: str, shift: str, add: str, bounds: Sequence[float]) -> str:
        g = self.graph
        kernel = g.emit("Reshape", scale, g.ints(number, 1, 1, 1))
        inputs = [value, kernel, shift, add]
        while not inputs[-1]:
            inputs.pop()
        ones, zeros = [1, 1], [0, 0, 0, 0]
        attrs: dict[str, Any] = {
            "kernel_shape": ones,
            "strides": ones,
            "dilations": ones,
            "pads": zeros,
            "group": number,
        }
        if bounds:
            attrs["activation"] = "Relu" if len(bounds) == 1 else "Clip"
        if len(bounds) > 1:
            attrs["activation_params"] = [float(b) for b in bounds]
        return g.emit("Conv", *inputs, attrs=attrs, domain=BLOCKED)

    def summed(self, name: str) -> str:
        """The sums of a value over all but its channels, [C]; the deferred scale is applied to the sums."""
        deferred = self._deferred.get(name)
        value = self.without_scale(name, blocked=self.in_blocks(name))
        g, (channels, height, width) = self.graph, self.sizes(name)
        if self.in_blocks(name):
            total = self.total(value, channels, height * width)
        else:
            total = g.emit("ReduceSum", value, g.ints(0, 2, 3), attrs={"keepdims": 0})
        return total if deferred is None else g.emit("Mul", total, deferred)

    def total(self, value: str, channels: int, places: int) -> str:
        """The sums over batch and places of a value in blocks, [C]."""
        each = self.total_each(value, channels, places)
        return self._first(self.graph.emit("ReduceSum", each, self.graph.ints(0), attrs={"keepdims": 0}), channels)

    def total_each(self, value: str, channels: int, places: int) -> str:
        """The sums over places of a value in blocks, [N, C] filled up."""
        g = self.graph
        rows = g.emit("Reshape", value, g.ints(-1, places, self.block))
        each = g.emit("ReduceSum", rows, g.ints(1), attrs={"keepdims": 0})
        return g.emit("Reshape", each, g.ints(-1, self.filled(channels)))

    def _first(self, vector: str, channels: int) -> str:
        """What of a vector isn't filled up."""
        if self.filled(channels) == channels:
            return vector
        return self.graph.emit("Slice", vector, self.graph.ints(0), self.graph.ints(channels), self.graph.ints(0))

    def dot(self, first: str, second: str, name: str) -> str:
        """The sums over batch and places of the products of two values in blocks, [C]."""
        each, g = self.dot_each(first, second, name), self.graph
        return self._first(g.emit("ReduceSum", each, g.ints(0), attrs={"keepdims": 0}), self.sizes(name)[0])

    def dot_each(self, first: str, second: str, name: str) -> str:
        """The sums over places of the products of two values in blocks, [N, C] filled up."""
        channels, height, width = self.sizes(name)
        filled, ones = self.filled(channels), (1, 1)
        w = Window((height, width), (1, 1), ones, ones, ((0, 0), (0, 0)), (height, width))
        return self.graph.emit("Reshape", self.correlated(first, second, w, filled), self.graph.ints(-1, filled))

    def correlated(self, x: str, dy: str, w: Window, filled: int) -> str:
        """What the places of a window have in common, for every sample and channel: [1, N · C, h, w] in blocks.

        Every sample's channel is one of a depthwise convolution whose kernel is that channel of `dy`: products are
        summed as they are made, in one pass over both.

        Args:
            x: A value in blocks with the window's input sizes.
            filled: Channels, filled up.
        """
        g, number = self.graph, self.batch * filled
        (top, bottom), (left, right) = w.pads
        attrs: dict[str, Any] = {
            "kernel_shape": list(w.output),
            "strides": list(w.dilations),
            "dilations": list(w.strides),
            "pads": [top, left, bottom, right],
            "group": number,
        }
        image = g.emit("Reshape", x, g.ints(1, number, *w.sizes))
        kernel = g.emit("Reshape", dy, g.ints(number, 1, *w.output))
        return g.emit("Conv", image, kernel, attrs=attrs, domain=BLOCKED)

    # -- convolutions that take more in -----------------------------------------------------------------------------

    def made(self, name: str, by: Made) -> None:
        """Remember which convolution makes a value in blocks: it can still take a shift and a sum in."""
        self._convolutions[name] = by

    def one_place(self, name: str) -> str:
        """The channels of a value in blocks at the middle place of the first sample, [C].

        Where a convolution makes the value, a second one computes that place alone: what the first one makes may then
        depend on it.
        """
        channels, *sizes = self.sizes(name)
        middle = [size // 2 for size in sizes]
        made = self._convolutions.get(name)
        if made is None or len(made.node.inputs) > 3:
            place = self._part(self.blocked(name), channels, sizes, [(m, m + 1) for m in middle], in_blocks=True)
        else:
            node, w = made.node, made.window
            parts, pads = [], []
            for at, size, kernel, stride, dilation, (before, _) in zip(
                middle, w.sizes, w.kernel, w.strides, w.dilations, w.pads, strict=True
            ):
                begin = at * stride - before
                end = begin + (kernel - 1) * dilation + 1
                parts.append((max(begin, 0), min(end, size)))
                pads.append((max(-begin, 0), max(end - size, 0)))
            image = self._part(node.inputs[0], made.inputs, w.sizes, parts, in_blocks=made.in_blocks)
            (top, bottom), (left, right) = pads
            attrs = {**node.attrs, "pads": [top, left, bottom, right]}
            place = self.graph.emit("Conv", image, *node.inputs[1:], attrs=attrs, domain=BLOCKED)
        return self._first(self.graph.emit("Reshape", place, self.graph.ints(self.filled(channels))), channels)

    def _part(
        self, value: str, channels: int, sizes: Sequence[int], parts: Sequence[tuple[int, int]], *, in_blocks: bool
    ) -> str:
        """Some rows and columns of the first sample of a value."""
        g, filled = self.graph, self.filled(channels)
        if in_blocks:
            value = g.emit("Reshape", value, g.ints(-1, filled // self.block, *sizes, self.block))
        begins, ends = ([part[i] for part in parts] for i in (0, 1))
        value = g.emit("Slice", value, g.ints(0, *begins), g.ints(1, *ends), g.ints(0, 2, 3))
        if in_blocks:
            value = g.emit("Reshape", value, g.ints(1, filled, *(end - begin for begin, end in parts)))
        return value

    def absorb(self, name: str, *, shift: str = "", add: str = "") -> bool:
        """Let the convolution that makes a value add a vector [C] or another value in blocks to it, at no cost.

        Nobody may have read the value yet. Returns whether it could.
        """
        made = self._convolutions.get(name)
        if made is None or len(made.node.inputs) > 3 or name in self._plain:
            return False
        node = made.node
        if shift:
            vector = self.vector(shift, self.sizes(name)[0])
            bias = node.inputs[2:]
            node.inputs[2:] = [self.graph.emit("Add", bias[0], vector) if bias else vector]
        else:
            node.inputs += [""] * (3 - len(node.inputs)) + [add]
        # What it takes in may have been computed after it.
        nodes = self.graph.nodes
        del nodes[next(i for i in reversed(range(len(nodes))) if nodes[i] is node)]
        nodes.append(node)
        return True
