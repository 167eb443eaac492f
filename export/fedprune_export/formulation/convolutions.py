"""Convolutions and their input gradients: with channels in blocks, or by standard operators."""

from __future__ import annotations

from fedprune_export.autodiff.conv_geometry import Window, operator_attrs
from fedprune_export.autodiff.intents import INPUT_GRADIENT
from fedprune_export.autodiff.rules.convolutions import Convolution
from fedprune_export.autodiff.rules.dense import Dense, Formulation
from fedprune_export.autodiff.rules.depthwise import Depthwise
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED, Made
from fedprune_export.ir.graph import Node


@rule("Conv")
def convolution(to: Formulator, node: Node) -> bool:
    """A layer's forward map."""
    x, kernel, *bias = node.inputs
    image, shape = to.layouts.image(x), to.layouts.shapes.get(kernel)
    out = to.layouts.image(node.outputs[0])
    if image is None or shape is None or out is None or to.layouts.deferred(x) is not None:
        return False
    many_of_each = image[0] > 1 and shape[1] == 1 and shape[0] != image[0]
    if int(node.attrs.get("group", 1)) not in (1, image[0]) or many_of_each:
        return False
    pads = [int(p) for p in node.attrs["pads"]]
    w = Window(
        image[1:],
        tuple(int(k) for k in node.attrs["kernel_shape"]),
        tuple(int(s) for s in node.attrs["strides"]),
        tuple(int(d) for d in node.attrs["dilations"]),
        ((pads[0], pads[2]), (pads[1], pads[3])),
        out[1:],
    )
    return _convolved(to, w, x, kernel, [b for b in bias if b], node.outputs[0])


@rule(INPUT_GRADIENT)
def input_gradient(to: Formulator, node: Node) -> bool:
    """A layer's gradient by its input: for stride 1 a convolution with the flipped kernel."""
    dy, kernel, *bias = node.inputs
    w: Window = node.attrs["window"]
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    shape = layouts.shapes[kernel]
    deep = node.attrs["group"] > 1
    inputs, outputs = int(shape[0] if deep else shape[1]), int(shape[0])
    held = layouts.plain(kernel)
    deferred = layouts.deferred(dy)
    if deferred is not None:
        held = g.emit("Mul", held, g.emit("Unsqueeze", deferred, g.ints(1, 2, 3)))
    form = to.forms.dense(w, inputs, outputs)
    dense = Dense(g, w, held, Formulation("flipped", form.weight_gradient))
    made = 1 if deep else outputs
    if w.flips and to.forms.in_blocks(dense.back_window(), made, inputs, depthwise=deep):
        flipped = dense.flipped_kernel(swapped=not deep)
        layouts.shapes[flipped] = (inputs, 1 if deep else outputs, *w.kernel)
        return _convolved(to, dense.back_window(), dy, flipped, bias, out)
    value, shifts = layouts.without_scale(dy, blocked=False), [layouts.plain(b) for b in bias]
    layer: Convolution = Depthwise(g, w, held) if deep else Dense(g, w, held, form)
    to.name(layer.back(value, shifts), out)
    return True


def _convolved(to: Formulator, w: Window, x: str, kernel: str, bias: list[str], out: str) -> bool:
    """A convolution of x without its deferred scale; the kernel is in plain layout."""
    layouts, g = to.layouts, to.graph
    outputs, inputs = (int(d) for d in layouts.shapes[kernel][:2])
    deep = inputs == 1 and layouts.sizes(x)[0] > 1
    if not to.forms.in_blocks(w, inputs, outputs, depthwise=deep):
        return False
    # There is an operator that reads few channels, an image's, in plain layout.
    few = inputs < layouts.block and not deep and not layouts.in_blocks(x)
    value = layouts.without_scale(x, blocked=not few)
    held = filter_of_few(to, kernel) if few or deep else filter_in_blocks(to, kernel)
    shifts = [layouts.vector(layouts.plain(b), outputs) for b in bias]
    attrs = operator_attrs(w, layouts.filled(outputs) if deep else 1)
    layouts.put(out, g.emit("Conv", value, held, *shifts, attrs=attrs, domain=BLOCKED))
    layouts.made(out, Made(g.nodes[-1], w, layouts.sizes(x)[0], in_blocks=not few))
    return True


def filter_in_blocks(to: Formulator, kernel: str) -> str:
    """A kernel as onnxruntime's operator reads it: [O/b, I/b, kh, kw, b of I, b of O]."""
    layouts, g, b = to.layouts, to.graph, to.layouts.block
    outputs, inputs, height, width = (int(d) for d in layouts.shapes[kernel])
    rows, columns, taps = layouts.filled(outputs), layouts.filled(inputs), height * width
    value = layouts.plain(kernel)
    if (rows, columns) != (outputs, inputs):
        value = g.emit("Pad", value, g.ints(0, 0, 0, 0, rows - outputs, columns - inputs, 0, 0))
    # Two passes of which each moves runs: one with the outputs last, one that sorts blocks of them.
    flat = g.emit("Transpose", g.emit("Reshape", value, g.ints(rows, columns * taps)), attrs={"perm": [1, 0]})
    apart = g.emit("Reshape", flat, g.ints(columns // b, b, taps, rows // b, b))
    sorted_ = g.emit("Transpose", apart, attrs={"perm": [3, 0, 2, 1, 4]})
    return g.emit("Reshape", sorted_, g.ints(rows, columns, height, width))


def filter_of_few(to: Formulator, kernel: str) -> str:
    """The same for few inputs per output, fewer than a block or one: [O/b, I, kh, kw, b of O]."""
    layouts, g, b = to.layouts, to.graph, to.layouts.block
    outputs, inputs, height, width = (int(d) for d in layouts.shapes[kernel])
    rows = layouts.filled(outputs)
    value = layouts.plain(kernel)
    if rows != outputs:
        value = g.emit("Pad", value, g.ints(0, 0, 0, 0, rows - outputs, 0, 0, 0))
    apart = g.emit("Reshape", value, g.ints(rows // b, b, inputs * height * width))
    return g.emit("Reshape", g.emit("Transpose", apart, attrs={"perm": [0, 2, 1]}), g.ints(rows, inputs, height, width))
