"""Sliding windows: what convolutions and poolings have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Tape, describe
from fedprune_export.ir.graph import Graph, Node

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial axes of a value.

    Attributes:
        sizes: The input's spatial sizes.
        kernel: The window's sizes.
        strides: Steps of the window.
        dilations: Steps inside the window.
        pads: Padding before and after, per axis.
        output: How many positions the window has per axis.
        overhang: How much of the padding after is there only because the last window reaches beyond, per axis.
    """

    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    output: tuple[int, ...]
    overhang: tuple[int, ...] = ()

    @property
    def flat_pads(self) -> list[int]:
        """Padding in ONNX order: all begins, then all ends."""
        return [p[0] for p in self.pads] + [p[1] for p in self.pads]

    @property
    def tiles(self) -> bool:
        """Whether windows lie side by side and cover the input exactly."""
        return (
            self.kernel == self.strides
            and all(d == 1 for d in self.dilations)
            and all(p == (0, 0) for p in self.pads)
            and all(s % k == 0 for s, k in zip(self.sizes, self.kernel, strict=True))
        )

    @property
    def flips(self) -> bool:
        """Whether a convolution with the flipped kernel makes the gradient of the input."""
        fits = all(
            p <= d * (k - 1) for pad, d, k in zip(self.pads, self.dilations, self.kernel, strict=True) for p in pad
        )
        return fits and all(s == 1 for s in self.strides)


def window(tape: Tape, node: Node, kernel: tuple[int, ...]) -> Window:
    """The window that a node's attributes describe.

    Raises:
        ModelError: The input's spatial sizes vary, or nothing is left of them.
    """
    shape = tape.shape(node.inputs[0])
    sizes = tape.static(node, shape[2:])
    rank = len(sizes)
    if len(kernel) != rank:
        raise ModelError(f"{describe(node)}: axes of the kernel", expected=rank, got=len(kernel))
    strides = tuple(int(s) for s in node.attrs.get("strides", [1] * rank))
    dilations = tuple(int(d) for d in node.attrs.get("dilations", [1] * rank))
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    mode = str(node.attrs.get("auto_pad", "NOTSET"))
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for size, stride, span in zip(sizes, strides, spans, strict=True):
            total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    else:
        flat = [int(p) for p in node.attrs.get("pads", [0] * (2 * rank))] if mode == "NOTSET" else [0] * (2 * rank)
        pads = list(zip(flat[:rank], flat[rank:], strict=True))
    output, overhang = [], [0] * rank
    for i, (size, stride, span) in enumerate(zip(sizes, strides, spans, strict=True)):
        room = size + sum(pads[i]) - span
        count = room // stride + 1
        # Rounding up: a window more, if it starts inside the input or the padding before it; its overhang is padding.
        rounds_up = bool(int(node.attrs.get("ceil_mode", 0)) and room % stride)
        if rounds_up and count * stride < size + pads[i][0]:
            overhang[i] = stride - room % stride
            pads[i] = (pads[i][0], pads[i][1] + overhang[i])
            count += 1
        output.append(count)
    if min(output) < 1:
        raise ModelError(f"{describe(node)}: the kernel is larger than its input", got=list(sizes))
    return Window(sizes, kernel, strides, dilations, tuple(pads), tuple(output), tuple(overhang))


def leftovers(w: Window) -> list[int]:
    """Per axis, how many input rows at the end no window reaches: a transposed convolution must add them."""
    return [
        size + sum(pad) - (stride * (out - 1) + dilation * (k - 1) + 1)
        for size, pad, stride, out, dilation, k in zip(
            w.sizes, w.pads, w.strides, w.output, w.dilations, w.kernel, strict=True
        )
    ]


def reads(w: Window, axis: int) -> Indices:
    """Which index of one axis each output reads at each kernel element, -1 for padding: [outputs, elements]."""
    at = np.arange(w.output[axis])[:, None] * w.strides[axis] + np.arange(w.kernel[axis]) * w.dilations[axis]
    at = at - w.pads[axis][0]
    return np.where((at >= 0) & (at < w.sizes[axis]), at, -1).astype(np.int64)


def joined(a: Indices, b: Indices, size: int) -> Indices:
    """Indices over two axes, of which the second has `size` places, from those over each: [outputs, elements]."""
    left, right = a[:, None, :, None], b[None, :, None, :]
    both = np.where((left < 0) | (right < 0), -1, left * size + right)
    return both.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def all_reads(w: Window) -> Indices:
    """Which place of the whole map each output reads at each kernel element, -1 for padding: [outputs, elements]."""
    out = np.zeros((1, 1), np.int64)
    for axis, size in enumerate(w.sizes):
        out = joined(out, reads(w, axis), size)
    return out


def answers(read: Indices, places: int) -> Indices:
    """The inverse of what is read: which output each place goes to by each kernel element, -1 for none.

    One kernel element brings a place to one output at most.

    Args:
        read: What each output reads: [outputs, elements].
        places: How many there are to read.
    """
    back = np.full((places, read.shape[1]), -1, np.int64)
    output, element = np.nonzero(read >= 0)
    back[read[output, element], element] = output
    return back


def operator_attrs(w: Window, group: int = 1) -> dict[str, Any]:
    """The attributes of onnxruntime's convolutions."""
    return {
        "kernel_shape": list(w.kernel),
        "strides": list(w.strides),
        "dilations": list(w.dilations),
        "pads": w.flat_pads,
        "group": group,
    }


def add_bias(g: Graph, y: str, bias: list[str], rank: int) -> str:
    """A vector added to the channels of [N, C, ...], if there is one."""
    return g.emit("Add", y, g.emit("Unsqueeze", bias[0], g.ints(*range(1, rank + 1)))) if bias else y
