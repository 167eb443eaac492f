"""Poolings, sums over maps, and what joins a flat part of a network: from blocks to plain layout where they must."""

from __future__ import annotations

import math

import numpy as np

from fedprune_export.autodiff.conv_geometry import Window
from fedprune_export.autodiff.intents import POOL_GRADIENT
from fedprune_export.autodiff.rules.elementwise import STEEP
from fedprune_export.autodiff.rules.pooling import tiled_gradient
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED
from fedprune_export.ir.graph import Node


@rule("MaxPool")
def max_pool(to: Formulator, node: Node) -> bool:
    """A maximum over windows, which onnxruntime also has in blocks."""
    name, layouts = node.inputs[0], to.layouts
    if len(node.outputs) > 1 or not layouts.in_blocks(name) or layouts.image(node.outputs[0]) is None:
        return False
    attrs = {k: v for k, v in node.attrs.items() if k in ("kernel_shape", "strides", "pads", "dilations")}
    layouts.put(node.outputs[0], to.graph.emit("MaxPool", layouts.blocked(name), attrs=attrs, domain=BLOCKED))
    return True


@rule(POOL_GRADIENT)
def pool_gradient(to: Formulator, node: Node) -> bool:
    """The gradient of a maximum goes to its first place."""
    layouts, out, w = to.layouts, node.outputs[0], node.attrs["window"]
    layouts.shapes[out] = layouts.shapes[node.inputs[1]]
    if layouts.in_blocks(node.inputs[1]):
        layouts.put(out, _in_blocks(to, w, *map(layouts.blocked, node.inputs)))
    else:
        dy, x, y = map(layouts.plain, node.inputs)
        to.name(tiled_gradient(to.graph, w, x, y, dy), out)
    return True


def _in_blocks(to: Formulator, w: Window, dy: str, x: str, y: str) -> str:
    """`tiled_gradient` with masks of numbers instead of truth values: operators on these share out among threads.

    Steep lines are the comparisons: 1 where nothing is missing to the maximum, 0 where anything is.
    """
    g, b = to.graph, to.layouts.block
    marks = np.tile(np.arange(math.prod(w.kernel), 0, -1, dtype=np.float32).reshape(w.kernel), w.output)
    each = g.constant(np.repeat(marks.reshape(-1), b), np.float32)  # the same for all channels of a block

    def up(value: str) -> str:
        attrs = {"scales": [1, 1, *w.kernel], "mode": "nearest"}
        return g.emit("Upsample", value, attrs=attrs, domain=BLOCKED)

    def reached(value: str, best: str) -> str:
        return g.emit("HardSigmoid", g.emit("Sub", value, up(best)), attrs={"alpha": STEEP, "beta": 1.0})

    rows = g.emit("Reshape", reached(x, y), g.ints(-1, marks.size * b))
    shape = g.ints(to.layouts.batch, -1, *w.sizes)
    mark = g.emit("Reshape", g.emit("Mul", rows, each), shape)
    best = g.emit("MaxPool", mark, attrs={"kernel_shape": list(w.kernel), "strides": list(w.strides)}, domain=BLOCKED)
    return g.emit("Mul", reached(mark, best), up(dy))


@rule("ReduceSum")
def reduce_sum(to: Formulator, node: Node) -> bool:
    """The sum over everything but the channels, as biases have it."""
    name, layouts = node.inputs[0], to.layouts
    axes = to.graph.initializers.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.tolist() != [0, 2, 3] or node.attrs.get("keepdims", 1) or layouts.image(name) is None:
        return False
    to.name(layouts.summed(name), node.outputs[0])
    return True
