"""Gradient rules of convolutions and transposed convolutions.

One is the other's pull-back, so both need the same three maps, in other roles.
"""

from __future__ import annotations

import math
from typing import Protocol

from fedprune.core.errors import ModelError
from fedprune.planning.probe_report import CUDA
from fedprune_export.autodiff import conv_geometry
from fedprune_export.autodiff.conv_geometry import Window, window
from fedprune_export.autodiff.rules.dense import ON_CUDA, Dense, formulation
from fedprune_export.autodiff.rules.depthwise import Depthwise
from fedprune_export.autodiff.tape import Dim, Pull, Tape, describe, rule
from fedprune_export.ir.graph import Node


class Convolution(Protocol):
    """A convolution with its window and kernel: three maps, each linear in what it is given.

    x is what a window slides over, [N, inputs, ...]; y has one place per position of the window, [N, outputs, ...].
    A bias is a list of one vector, or empty.
    """

    def apply(self, x: str, bias: list[str]) -> str:
        """y = x ∗ kernel + bias."""

    def back(self, dy: str, bias: list[str]) -> str:
        """The gradient of x, which is a transposed convolution, + bias."""

    def kernel_gradient(self, x: str, dy: str) -> str:
        """The gradient of the kernel."""


def convolution(tape: Tape, node: Node, w: Window, number: Dim, lengths: tuple[Dim, Dim]) -> Convolution:
    """How a layer is computed."""
    kernel, shape = tape.value(node.inputs[1]), tape.shape(node.inputs[1])
    if int(node.attrs.get("group", 1)) == 1:
        if tape.graph.unit == CUDA:
            return Dense(tape.graph, w, kernel, ON_CUDA)
        if math.prod(w.output) > conv_geometry.SMALL_MAP:
            return Dense(tape.graph, w, kernel, formulation(w, tape.extent(shape[1])))
    elif lengths == (1, 1):
        return Depthwise(tape.graph, w, kernel)
    return conv_geometry.Columns(tape, w, kernel, shape, number, lengths, tape.shape(node.inputs[0])[0])


@rule("Conv")
def conv(tape: Tape, node: Node) -> Pull:
    """y = x ∗ w + b in one or more dimensions, in any number of groups.

    Raises `ModelError` if groups don't keep equally many channels, or the size of the map varies.
    """
    data, weight = node.inputs[:2]
    w = window(tape, node, tape.static(node, tape.shape(weight)[2:]))
    number, taken = _groups(tape, node, data, 1)
    _, made = _groups(tape, node, weight, 0)
    layer = convolution(tape, node, w, number, (taken, made))
    x, bias = tape.value(data), _bias(tape, node)
    y = layer.apply(x, bias)
    tape.enter(node.outputs[0], y, (tape.shape(data)[0], tape.shape(weight)[0], *w.output))

    def pull(dy: str) -> None:
        _pull_bias(tape, node, dy)
        if tape.wants(weight):
            tape.add(weight, layer.kernel_gradient(x, dy))
        if tape.wants(data):
            tape.add(data, layer.back(dy, []))

    return pull


@rule("ConvTranspose")
def conv_transpose(tape: Tape, node: Node) -> Pull:
    """The pull-back of a convolution as a layer: its own pull-back is that convolution.

    Raises `ModelError` if groups don't keep equally many channels, or the size of the map varies.
    """
    data, weight = node.inputs[:2]
    w = transposed_window(tape, node)
    number, made = _groups(tape, node, data, 1)
    taken = tape.shape(weight)[1]
    layer = convolution(tape, node, w, number, (taken, made))
    x, bias = tape.value(data), _bias(tape, node)
    y = layer.back(x, bias)
    tape.enter(node.outputs[0], y, (tape.shape(data)[0], tape.product([number, taken]), *w.sizes))

    def pull(dy: str) -> None:
        _pull_bias(tape, node, dy)
        if tape.wants(weight):
            tape.add(weight, layer.kernel_gradient(dy, x))
        if tape.wants(data):
            tape.add(data, layer.apply(dy, []))

    return pull


def transposed_window(tape: Tape, node: Node) -> Window:
    """The window of the convolution whose pull-back a node is: it slides over the node's output.

    Raises `ModelError` if the input's spatial sizes vary, or nothing would be left of them.
    """
    output = tape.static(node, tape.shape(node.inputs[0])[2:])
    kernel = tape.static(node, tape.shape(node.inputs[1])[2:])
    rank = len(output)

    def numbers(name: str, default: int) -> list[int]:
        return [int(v) for v in node.attrs.get(name, [default] * rank)]

    strides, dilations, rests = numbers("strides", 1), numbers("dilations", 1), numbers("output_padding", 0)
    full = [
        s * (n - 1) + d * (k - 1) + 1 + rest
        for s, n, d, k, rest in zip(strides, output, dilations, kernel, rests, strict=True)
    ]
    mode = str(node.attrs.get("auto_pad", "NOTSET"))
    pads: list[tuple[int, int]]
    if "output_shape" in node.attrs or mode in ("SAME_UPPER", "SAME_LOWER"):
        given = [int(v) for v in node.attrs.get("output_shape", [])][-rank:]
        wanted = given or [n * s for n, s in zip(output, strides, strict=True)]
        pads = []
        for size, want in zip(full, wanted, strict=True):
            total = max(size - want, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
    else:
        wanted = full
        flat = [int(p) for p in node.attrs.get("pads", [0] * (2 * rank))] if mode == "NOTSET" else [0] * (2 * rank)
        pads = list(zip(flat[:rank], flat[rank:], strict=True))
    sizes = tuple(size - sum(pad) for size, pad in zip(full, pads, strict=True))
    if min(sizes) < 1 or any(rest >= s for rest, s in zip(rests, strides, strict=True)):
        # onnxruntime doesn't run the second kind either.
        raise ModelError(
            f"{describe(node)}: padding of its output",
            expected="at least one, added ones fewer than the stride",
            got=list(sizes),
        )
    return Window(sizes, kernel, tuple(strides), tuple(dilations), tuple(pads), output)


def _groups(tape: Tape, node: Node, name: str, axis: int) -> tuple[Dim, Dim]:
    """How many groups an axis of channels has, and how long they are."""
    groups = int(node.attrs.get("group", 1))
    return tape.blocks(node, name, axis, groups) if groups > 1 else (1, tape.shape(name)[axis])


def _bias(tape: Tape, node: Node) -> list[str]:
    return [tape.value(node.inputs[2])] if len(node.inputs) > 2 and node.inputs[2] else []


def _pull_bias(tape: Tape, node: Node, dy: str) -> None:
    name = node.inputs[2] if len(node.inputs) > 2 else ""
    if name and tape.wants(name):
        axes = tape.graph.ints(0, *range(2, len(tape.shape(node.inputs[0]))))
        tape.add(name, tape.graph.emit("ReduceSum", dy, axes, attrs={"keepdims": 0}))
