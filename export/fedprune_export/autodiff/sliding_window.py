"""The sliding window of a convolution or a pooling: its geometry, and which positions of the input each output reads.

`window` and `transposed_window` read the geometry from a node's attributes. The convolutions of this package and
`operators.pooling` write the node and its gradient with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import Tape, describe
from fedprune_export.ir.graph import Node

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Window:
    """A sliding window over the spatial axes of a value. All fields have one entry per axis.

    Attributes:
        sizes: The input's sizes.
        pads: Padding before and after.
        output: How many positions the window has.
        overhang: How much of the padding after the input only serves a last window that reaches beyond it.
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
    def is_tiling(self) -> bool:
        """Whether windows are adjacent and cover the input exactly."""
        return (
            self.kernel == self.strides
            and all(d == 1 for d in self.dilations)
            and all(p == (0, 0) for p in self.pads)
            and all(s % k == 0 for s, k in zip(self.sizes, self.kernel, strict=True))
        )

    @property
    def is_pointwise(self) -> bool:
        """Whether each position reads itself alone, whatever the sizes are."""
        return not any(self.flat_pads) and all(n == 1 for n in (*self.kernel, *self.strides))

    @property
    def has_flipped_gradient(self) -> bool:
        """Whether a convolution with the flipped kernel makes the gradient of the input."""
        fits = all(max(pads) <= d * (k - 1) for pads, d, k in zip(self.pads, self.dilations, self.kernel, strict=True))
        return fits and all(s == 1 for s in self.strides)

    @property
    def leftover_rows(self) -> list[int]:
        """Per axis, how many input rows at the end no window reaches."""
        return [
            size + sum(pad) - (stride * (out - 1) + dilation * (k - 1) + 1)
            for size, pad, stride, out, dilation, k in zip(
                self.sizes, self.pads, self.strides, self.output, self.dilations, self.kernel, strict=True
            )
        ]

    @property
    def attrs(self) -> dict[str, Any]:
        """The window as attributes of an ONNX node."""
        return {
            "kernel_shape": list(self.kernel),
            "strides": list(self.strides),
            "dilations": list(self.dilations),
            "pads": self.flat_pads,
        }

    def conv_attrs(self, group: int = 1) -> dict[str, Any]:
        """The attributes of a Conv node with this window."""
        return {**self.attrs, "group": group}

    def transposed_attrs(self, group: int = 1) -> dict[str, Any]:
        """The attributes of a ConvTranspose node from the window's positions back to its input."""
        return {**self.conv_attrs(group), "output_padding": self.leftover_rows}


def window(tape: Tape, node: Node, kernel: tuple[int, ...]) -> Window:
    """The window of a convolution or a pooling, from the node's attributes.

    Raises `ModelError` if the input's spatial sizes vary, or nothing is left of them.
    """
    sizes = tape.static(node, tape.shape(node.inputs[0])[2:])
    rank = len(sizes)
    if len(kernel) != rank:
        raise ModelError(f"{describe(node)}: axes of the kernel", expected=rank, got=len(kernel))
    strides, dilations = _per_axis(node, "strides", [1] * rank), _per_axis(node, "dilations", [1] * rank)
    spans = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    totals = [
        max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        for size, stride, span in zip(sizes, strides, spans, strict=True)
    ]
    pads = _padding(node, totals)
    output, overhang = [], [0] * rank
    for i, (size, stride, span) in enumerate(zip(sizes, strides, spans, strict=True)):
        slack = size + sum(pads[i]) - span
        count = slack // stride + 1
        # Rounding up: a window more, if it starts inside the input or the padding before it; its overhang is padding.
        rounds_up = bool(int(node.attrs.get("ceil_mode", 0)) and slack % stride)
        if rounds_up and count * stride < size + pads[i][0]:
            overhang[i] = stride - slack % stride
            pads[i] = (pads[i][0], pads[i][1] + overhang[i])
            count += 1
        output.append(count)
    if min(output) < 1:
        raise ModelError(f"{describe(node)}: the kernel is larger than its input", got=list(sizes))
    return Window(sizes, kernel, strides, dilations, tuple(pads), tuple(output), tuple(overhang))


def transposed_window(tape: Tape, node: Node) -> Window:
    """The window of the convolution that a transposed convolution reverses: it slides over the node's output.

    Raises `ModelError` if the input's spatial sizes vary, or nothing would be left of them.
    """
    output, kernel = (tape.static(node, tape.shape(name)[2:]) for name in node.inputs[:2])
    rank = len(output)
    strides, dilations = _per_axis(node, "strides", [1] * rank), _per_axis(node, "dilations", [1] * rank)
    added_rows = _per_axis(node, "output_padding", [0] * rank)
    unpadded_sizes = [
        s * (n - 1) + d * (k - 1) + 1 + added
        for s, n, d, k, added in zip(strides, output, dilations, kernel, added_rows, strict=True)
    ]
    target_sizes = _per_axis(node, "output_shape", [n * s for n, s in zip(output, strides, strict=True)])[-rank:]
    totals = [max(size - target, 0) for size, target in zip(unpadded_sizes, target_sizes, strict=True)]
    pads = _padding(node, totals)
    sizes = tuple(size - sum(pad) for size, pad in zip(unpadded_sizes, pads, strict=True))
    if min(sizes) < 1 or any(added >= s for added, s in zip(added_rows, strides, strict=True)):
        # onnxruntime doesn't run the second kind either.
        raise ModelError(
            f"{describe(node)}: padding of its output",
            expected="at least one, added ones fewer than the stride",
            got=list(sizes),
        )
    return Window(sizes, kernel, strides, dilations, tuple(pads), output)


def _per_axis(node: Node, attribute: str, default: list[int]) -> tuple[int, ...]:
    return tuple(int(v) for v in node.attrs.get(attribute) or default)


def _padding(node: Node, totals: Sequence[int]) -> list[tuple[int, int]]:
    """The padding before and after each axis.

    `totals`: what an axis needs in sum where only the output's size is given: by `output_shape`, or by an `auto_pad`,
    as large as the input divided by the stride.
    """
    auto_pad, rank = str(node.attrs.get("auto_pad", "NOTSET")), len(totals)
    if "output_shape" in node.attrs or auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        # ONNX puts an odd element at the end with SAME_UPPER, else at the start.
        halves = [(total // 2, total - total // 2) for total in totals]
        return halves if auto_pad == "SAME_UPPER" else [half[::-1] for half in halves]
    # `pads` doesn't count where `auto_pad` is set.
    flat = _per_axis(node, "pads" if auto_pad == "NOTSET" else "", [0] * (2 * rank))
    return list(zip(flat[:rank], flat[rank:], strict=True))


def read_indices(w: Window, axis: int) -> Indices:
    """The index of one axis that each output reads by each kernel element, -1 for padding: [outputs, elements]."""
    starts = np.arange(w.output[axis])[:, None] * w.strides[axis] - w.pads[axis][0]
    indices = starts + np.arange(w.kernel[axis]) * w.dilations[axis]
    return np.where((indices >= 0) & (indices < w.sizes[axis]), indices, -1).astype(np.int64)


def product_indices(a: Indices, b: Indices, size: int) -> Indices:
    """Flat indices over two axes from the indices over each: [outputs, elements]. `size`: of the second axis."""
    first, second = a[:, None, :, None], b[None, :, None, :]
    flat = np.where((first < 0) | (second < 0), -1, first * size + second)
    return flat.reshape(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1])


def flat_read_indices(w: Window) -> Indices:
    """The index of the flat map that each output reads at each kernel element, -1 for padding: [outputs, elements]."""
    indices = np.zeros((1, 1), np.int64)
    for axis, size in enumerate(w.sizes):
        indices = product_indices(indices, read_indices(w, axis), size)
    return indices


def inverse_reads(read: Indices, positions: int) -> Indices:
    """Invert reads: which output each position goes to by each kernel element, [positions, elements], -1 for none.

    One kernel element brings a position to one output at most. `read`: [outputs, elements].
    """
    outputs_of = np.full((positions, read.shape[1]), -1, np.int64)
    output, element = np.nonzero(read >= 0)
    outputs_of[read[output, element], element] = output
    return outputs_of
