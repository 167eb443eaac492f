"""Pooling, reductions, and what measures sizes."""

from __future__ import annotations

from fedprune_export.channels.atoms import still
from fedprune_export.channels.rule import Channels, rule
from fedprune_export.graph import Node


@rule("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "GlobalLpPool")
def pooling(channels: Channels, node: Node) -> None:
    """Channels pass, places stay."""
    x = channels.of(node, 0)
    for i, name in enumerate(node.outputs):
        if name:
            shape = channels.shape(name)
            channels.out(node, [x[0], x[1], *(still(n) for n in shape[2:])], i)


@rule("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
def reduction(channels: Channels, node: Node) -> None:
    """What is reduced away stays, because cutting it would change the result; the rest passes."""
    x = channels.of(node, 0)
    axes = node.attrs.get("axes")
    if axes is None and channels.has(node, 1):
        axes = channels.graph.initializers[node.inputs[1]].reshape(-1).tolist()
    gone = {a % len(x) for a in (axes if axes else range(len(x)))}
    channels.fix([x[a] for a in gone])
    if node.attrs.get("keepdims", 1):
        channels.out(node, [still(1) if a in gone else x[a] for a in range(len(x))])
    else:
        channels.out(node, [x[a] for a in range(len(x)) if a not in gone])


@rule("Shape", "Size", "ConstantOfShape", "Range")
def measure(channels: Channels, node: Node) -> None:
    """Sizes are not channels: the inputs may be cut, the outputs are plain numbers."""
    for i, name in enumerate(node.outputs):
        channels.out(node, channels.still(name), i)
