"""Where the values of a graph lie in memory: as [N, C, H, W], or with channels in blocks.

In blocks a value is [N, C/b, H, W, b]: b neighbouring channels of a place are neighbours in memory, so that one vector
instruction computes with all of them. Channels are filled up to whole blocks with zeros. onnxruntime's operators for
this layout (domain `com.microsoft.nchwc`) say its shape as [N, C, H, W] with the filled-up C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedprune_export.graph import Graph, Node

BLOCKED = "com.microsoft.nchwc"
"""The domain of onnxruntime's operators with channels in blocks."""

Sizes = tuple[int | str, ...]
"""A value's shape: all numbers but the batch."""

_ALIGNED = 4
"""ReorderInput takes a multiple of so many channels."""


class Layouts:
    """The values of a graph in both layouts, converted when somebody asks for the other one.

    A value may still have to be multiplied by a vector, one number per channel (`owe`): a convolution does that to its
    kernel, which is far smaller.

    Args:
        graph: The graph that is written to.
        shapes: Shapes of values, as far as they are known.
        block: Channels of a block.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, Sizes], block: int) -> None:
        self.graph, self.block = graph, block
        self.shapes = dict(shapes)
        self._blocked: dict[str, str] = {}
        self._plain: dict[str, str] = {}
        self._owed: dict[str, str] = {}
        self._masks: set[str] = set()
        self._convolutions: dict[str, Node] = {}

    # -- shapes -----------------------------------------------------------------------------------------------------

    def image(self, name: str) -> tuple[int, int, int] | None:
        """Channels, height and width of a value that is a map of channels, else None."""
        shape = self.shapes.get(name, ())
        if len(shape) != 4:
            return None
        _, c, h, w = shape
        return (c, h, w) if isinstance(c, int) and isinstance(h, int) and isinstance(w, int) else None

    def sizes(self, name: str) -> tuple[int, int, int]:
        """`image` of a value that is known to be one."""
        found = self.image(name)
        if found is None:
            raise KeyError(name)
        return found

    def filled(self, channels: int) -> int:
        """Channels filled up to whole blocks."""
        return -(-channels // self.block) * self.block

    # -- values -----------------------------------------------------------------------------------------------------

    def in_blocks(self, name: str) -> bool:
        """Whether a value is there in blocks already."""
        return name in self._blocked

    def put(self, name: str, value: str) -> None:
        """Say which value in blocks a name stands for."""
        self._blocked[name] = value

    def mask(self, name: str) -> None:
        """Say that a value is one of truth values, which can't be reordered as they are."""
        self._masks.add(name)

    def rename(self, name: str, value: str) -> None:
        """Say which value in plain layout a name stands for."""
        self._plain[name] = value

    def plain(self, name: str) -> str:
        """A value in plain layout."""
        self._pay(name)
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
        self._pay(name)
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

    # -- what is owed -----------------------------------------------------------------------------------------------

    def owe(self, name: str, vector: str) -> None:
        """Let a value stand for itself times a vector [C]."""
        self._owed[name] = vector

    def owed(self, name: str) -> str | None:
        """What a value must still be multiplied by."""
        return self._owed.get(name)

    def unpaid(self, name: str, *, blocked: bool) -> str:
        """A value in one of the layouts without the factor that is owed."""
        owed = self._owed.pop(name, None)
        value = self.blocked(name) if blocked else self.plain(name)
        if owed is not None:
            self._owed[name] = owed
        return value

    def _pay(self, name: str) -> None:
        owed = self._owed.pop(name, None)
        if owed is None:
            return
        channels, g = self.sizes(name)[0], self.graph
        if name in self._blocked:
            self._blocked[name] = self.affine(self._blocked[name], channels, owed)
            self._plain.pop(name, None)
        else:
            column = g.emit("Unsqueeze", owed, g.ints(1, 2))
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
            value: A value in blocks.
            channels: Its channels.
            scale: A vector [C].
            shift: Another one, or nothing.
            add: Another value in blocks, or nothing.
            bounds: The least result, which is 0 if it stands alone, and the greatest.
        """
        g, filled = self.graph, self.filled(channels)
        kernel = g.emit("Reshape", self.vector(scale, channels), g.ints(filled, 1, 1, 1))
        inputs = [value, kernel, self.vector(shift, channels) if shift else "", add]
        while not inputs[-1]:
            inputs.pop()
        ones, zeros = [1, 1], [0, 0, 0, 0]
        attrs: dict[str, Any] = {
            "kernel_shape": ones,
            "strides": ones,
            "dilations": ones,
            "pads": zeros,
            "group": filled,
        }
        if bounds:
            attrs["activation"] = "Relu" if len(bounds) == 1 else "Clip"
        if len(bounds) > 1:
            attrs["activation_params"] = [float(b) for b in bounds]
        return g.emit("Conv", *inputs, attrs=attrs, domain=BLOCKED)

    def summed(self, name: str) -> str:
        """The sums of a value over all but its channels, [C]; what is owed is paid on the sums."""
        owed = self._owed.get(name)
        value = self.unpaid(name, blocked=self.in_blocks(name))
        g, (channels, height, width) = self.graph, self.sizes(name)
        if self.in_blocks(name):
            total = self.total(value, channels, height * width)
        else:
            total = g.emit("ReduceSum", value, g.ints(0, 2, 3), attrs={"keepdims": 0})
        return total if owed is None else g.emit("Mul", total, owed)

    def total(self, value: str, channels: int, places: int) -> str:
        """The sums over batch and places of a value in blocks, [C]."""
        g, filled = self.graph, self.filled(channels)
        rows = g.emit("Reshape", value, g.ints(-1, places, self.block))
        each = g.emit("ReduceSum", rows, g.ints(1), attrs={"keepdims": 0})
        total = g.emit("ReduceSum", g.emit("Reshape", each, g.ints(-1, filled)), g.ints(0), attrs={"keepdims": 0})
        return total if filled == channels else g.emit("Slice", total, g.ints(0), g.ints(channels), g.ints(0))

    # -- convolutions that take more in -----------------------------------------------------------------------------

    def made(self, name: str, node: Node) -> None:
        """Remember which convolution makes a value in blocks: it can still take a shift and a sum in."""
        self._convolutions[name] = node

    def absorb(self, name: str, *, shift: str = "", add: str = "") -> bool:
        """Let the convolution that makes a value add a vector [C] or another value in blocks to it, at no cost.

        Nobody may have read the value yet. Returns whether it could.
        """
        node = self._convolutions.get(name)
        if node is None or len(node.inputs) > (2 if shift else 3) or name in self._plain:
            return False
        if shift:
            node.inputs.append(self.vector(shift, self.sizes(name)[0]))
        else:
            node.inputs += [""] * (3 - len(node.inputs)) + [add]
        # What it takes in may have been computed after it.
        self.graph.nodes.remove(node)
        self.graph.nodes.append(node)
        return True
