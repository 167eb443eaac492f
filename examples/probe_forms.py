"""The probe's graphs of forms: one part of one convolution in one form each, written by the compiler's own rules."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fedprune.planning.probe_report import Shape
from fedprune_export.autodiff.conv_geometry import Window, operator_attrs
from fedprune_export.autodiff.rules.convolutions import Intended
from fedprune_export.autodiff.rules.dense import Dense, Formulation
from fedprune_export.autodiff.rules.depthwise import Depthwise
from fedprune_export.formulation import Forms
from fedprune_export.formulation.formulator import Formulator
from fedprune_export.ir.graph import Graph, Port

BATCH = 16
"""Samples of a run: whole blocks of any length."""

SHAPES = (
    *(Shape(3, 1, c, c, n * n) for c, n in ((32, 16), (64, 8), (16, 32), (128, 4), (64, 16), (32, 32), (128, 8))),
    *(Shape(1, 1, i, o, n * n) for i, o, n in ((32, 128, 16), (128, 32, 16), (128, 128, 8), (256, 256, 4))),
    *(Shape(3, 2, i, o, n * n) for i, o, n in ((32, 64, 16), (64, 128, 8))),
    *(Shape(3, 1, 1, c, n * n, depthwise=True) for c, n in ((96, 16), (192, 8), (32, 32))),
    *(Shape(5, 1, i, o, n * n) for i, o, n in ((32, 64, 14), (3, 32, 28))),
    *(Shape(3, 1, i, o, n * n) for i, o, n in ((3, 32, 32), (8, 8, 32), (24, 24, 16), (256, 256, 4))),
    Shape(1, 2, 32, 64, 256),
)
"""What is measured, the most telling shapes first: time may end before they do."""

KERNEL_FORMS = ("taps", "products", "columns")
INPUT_FORMS = ("flipped", "transposed")
_IMAGE_CHANNELS = 3


def graphs(shape: Shape, block: int) -> Iterator[tuple[str, Graph]]:
    """The graphs of a shape by name (`form_times.NAMES`): with blocks those in blocks alone, without the others."""
    yield from _in_blocks(shape, block) if block else _plain(shape)


def window(shape: Shape) -> Window:
    """The window of a shape, padded so that a stride of 1 keeps the map's size."""
    side = round(shape.places**0.5)
    sizes, k, t = (side * shape.stride,) * 2, shape.kernel, shape.stride
    return Window(sizes, (k, k), (t, t), (1, 1), ((k // 2, (k - 1) // 2),) * 2, (side, side))


def _empty(shape: Shape, block: int, *names: str) -> Graph:
    """A graph with some of a layer's values as inputs; in blocks values are as long as whole blocks."""
    w, b = window(shape), max(block, 1)
    inputs = shape.outputs if shape.depthwise else shape.inputs
    few = not shape.depthwise and inputs < block
    ports = {
        "x": ("N", inputs if few else -(-inputs // b) * b, *w.sizes),
        "dy": ("N", -(-shape.outputs // b) * b, *w.output),
        "w": (shape.outputs, shape.inputs, *w.kernel),
    }
    return Graph([Port(n, np.dtype(np.float32), ports[n]) for n in names])


def _plain(shape: Shape) -> Iterator[tuple[str, Graph]]:
    w, deep = window(shape), shape.depthwise
    graph = _empty(shape, 0, "x", "w")
    graph.emit("Conv", "x", "w", attrs=operator_attrs(w, shape.outputs if deep else 1), out="result")
    yield "depthwise.plain" if deep else "forward.plain", _done(graph)
    if deep:
        graph = _empty(shape, 0, "dy", "w")
        graph.emit("Identity", Depthwise(graph, w, "w").back("dy", []), out="result")
        yield "input.flipped", _done(graph)
        return
    forms = INPUT_FORMS if shape.stride == 1 else INPUT_FORMS[1:]
    for form in forms:
        graph = _empty(shape, 0, "dy", "w")
        value = getattr(Dense(graph, w, "w", Formulation("flipped", "taps")), f"back_by_{form}")("dy", [])
        graph.emit("Identity", value, out="result")
        yield f"input.{form}", _done(graph)
    few = ("convolution",) if shape.inputs <= _IMAGE_CHANNELS else ()
    for kernel in (*KERNEL_FORMS, *few):
        graph = _empty(shape, 0, "x", "dy")
        value = getattr(Dense(graph, w, "", Formulation("flipped", "taps")), f"kernel_by_{kernel}")("x", "dy")
        graph.emit("Identity", value, out="result")
        yield f"kernel.{kernel}", _done(graph)


def _in_blocks(shape: Shape, block: int) -> Iterator[tuple[str, Graph]]:
    w, forms = window(shape), Forms(block, BATCH, full=1)
    groups = shape.outputs if shape.depthwise else 1
    inputs = groups if shape.depthwise else shape.inputs
    few = not shape.depthwise and inputs < block
    shapes = {
        "x": ("N", inputs, *w.sizes),
        "dy": ("N", shape.outputs, *w.output),
        "w": (shape.outputs, shape.inputs, *w.kernel),
    }
    parts = [("depthwise" if shape.depthwise else "forward", ("x", "w"), ("N", shape.outputs, *w.output))]
    if shape.stride == 1:
        parts.append(("input", ("dy", "w"), shapes["x"]))
    if not shape.depthwise and forms.kernel_gradient(w, inputs, shape.outputs) == "blocked":
        parts.append(("kernel", ("x", "dy"), shapes["w"]))
    for part, names, made in parts:
        source = _empty(shape, block, *names)
        layer = Intended(source, w, "w", groups)
        if part == "kernel":
            layer.kernel_gradient("x", "dy")
        elif part == "input":
            layer.back("dy", [])
        else:
            layer.apply("x", [])
        source.nodes[-1].outputs = ["result"]
        source.outputs = [Port("result", np.dtype(np.float32), made)]
        out = Formulator(source, {**shapes, "result": made}, forms)
        for name in names:
            if name != "w" and not (name == "x" and few):
                out.layouts.put(name, name)
        graph = out.run()
        if out.layouts.in_blocks("result"):  # as it is, without the way back
            graph.outputs = [Port(out.layouts.blocked("result"), np.dtype(np.float32), ("N", None, None, None))]
            graph.prune()
        yield f"{part}.blocks", graph
    if not few:
        source = _empty(shape, block, "x")
        source.outputs = [Port("result", np.dtype(np.float32), shapes["x"])]
        out = Formulator(source, shapes, forms)
        out.layouts.put("x", "x")
        out.graph.emit("Identity", out.layouts.plain("x"), out="result")
        yield "convert.plain", out.graph


def _done(graph: Graph) -> Graph:
    graph.outputs = [Port("result", np.dtype(np.float32), ("N", None, None, None))]
    return graph
