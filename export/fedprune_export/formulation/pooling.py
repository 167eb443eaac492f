"""Poolings, sums over maps, and what joins a flat part of a network: from blocks to plain layout where they must."""

from __future__ import annotations

from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED
from fedprune_export.gradients.intents import POOL_GRADIENT
from fedprune_export.gradients.pooling import tiled_gradient
from fedprune_export.graph import Node


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
    dy, x, y = (to.layouts.plain(n) for n in node.inputs)
    to.layouts.shapes[node.outputs[0]] = to.layouts.shapes[node.inputs[1]]
    to.name(tiled_gradient(to.graph, node.attrs["window"], x, y, dy), node.outputs[0])
    return True


@rule("ReduceSum")
def reduce_sum(to: Formulator, node: Node) -> bool:
    """The sum over everything but the channels, as biases have it."""
    name, layouts = node.inputs[0], to.layouts
    axes = to.graph.initializers.get(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or axes.tolist() != [0, 2, 3] or node.attrs.get("keepdims", 1) or layouts.image(name) is None:
        return False
    to.name(layouts.summed(name), node.outputs[0])
    return True
