"""Cutting: the physically smaller graph of a submodel.

Weights are gathered in rank order; what else in a graph says a channel count (reshape targets, convolution groups) is
rewritten. Entries that depend on the batch are never written as numbers: they would freeze the batch of the analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedprune.architecture import Axis
from fedprune.errors import ModelError
from fedprune.selection import Selection
from fedprune_export.graph import Graph, Node
from fedprune_export.imported import Model


def cut(model: Model, selection: Selection) -> Graph:
    """The submodel's inference graph with its weights.

    Args:
        model: The whole model.
        selection: What to keep.

    Raises:
        BundleError: The selection belongs to another architecture.
    """
    model.check(selection)
    graph = at_widths(model, selection.widths)
    graph.initializers = {**selection.gather(model.tensors), **graph.initializers}
    return graph


def at_widths(model: Model, widths: Sequence[int]) -> Graph:
    """The graph of a submodel without its weights: nodes and constants depend on widths alone.

    Raises:
        BundleError: The widths don't fit the architecture.
    """
    sizes = _Sizes(model, model.architecture.check_widths(widths))
    graph = model.graph.copy()
    for name in model.architecture.by_name:
        del graph.initializers[name]
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        rewrite = None if node.domain else _REWRITES.get(node.op)
        if rewrite is not None:
            rewrite(graph, node, sizes)
        graph.nodes.append(node)
    graph.initializers = {k: v for k, v in graph.initializers.items() if any(k in n.inputs for n in graph.nodes)}
    return graph


class _Sizes:
    """Sizes of values before and after the cut; None where they depend on the batch."""

    def __init__(self, model: Model, widths: Sequence[int]) -> None:
        self._values = model.values
        self._widths = widths
        self._full = model.architecture.sizes

    def before(self, name: str) -> list[int | None]:
        return [a.length if a is not None else None for a in self._axes(name)]

    def after(self, name: str) -> list[int | None]:
        return [a.size(self._widths, self._full) if a is not None else None for a in self._axes(name)]

    def _axes(self, name: str) -> tuple[Axis | None, ...]:
        axes = self._values.get(name)
        if axes is None:
            raise ModelError(f"value {name} was not analysed", hint="Import the model again.")
        return axes


def _conv(graph: Graph, node: Node, sizes: _Sizes) -> None:
    """Grouped convolutions lose whole groups; depthwise ones a group per channel."""
    groups = int(node.attrs.get("group", 1))
    if groups > 1:
        full, now = sizes.before(node.inputs[0])[1], sizes.after(node.inputs[0])[1]
        node.attrs["group"] = groups * (now or 0) // (full or 1)


def _norm(graph: Graph, node: Node, sizes: _Sizes) -> None:
    """A constant that scales or shifts all channels alike is as long as there are channels left."""
    before, after = sizes.before(node.inputs[0])[1], sizes.after(node.inputs[0])[1]
    for i in (1, 2):
        constant = graph.initializers.get(node.inputs[i])
        if constant is not None and before != after:
            node.inputs[i] = graph.constant(np.full(after or 0, constant[0]), np.float32)


def _target(graph: Graph, node: Node, sizes: _Sizes) -> None:
    """A target shape: known sizes as numbers, one batch-dependent entry as -1, several as computed before."""
    before, after = sizes.before(node.outputs[0]), sizes.after(node.outputs[0])
    if before == after:
        return
    free = [i for i, n in enumerate(after) if n is None]
    if len(free) <= 1 and node.op == "Reshape":
        node.inputs[1] = graph.ints(*(-1 if n is None else n for n in after))
        return
    old = node.inputs[1]
    parts = [
        graph.ints(n) if n is not None else graph.emit("Gather", old, graph.ints(i), attrs={"axis": 0})
        for i, n in enumerate(after)
    ]
    node.inputs[1] = graph.emit("Concat", *parts, attrs={"axis": 0})


_REWRITES: dict[str, Callable[[Graph, Node, _Sizes], None]] = {
    "BatchNormalization": _norm,
    "Conv": _conv,
    "Reshape": _target,
    "Expand": _target,
}


def masked(model: Model, selection: Selection) -> Graph:
    """The whole graph with everything that the submodel lacks set to zero: what a cut must equal.

    Norm vectors of lost channels are zero as well, so that a lost channel is zero wherever weights contract it.
    """
    graph = model.graph.copy()
    for name, value in model.tensors.items():
        graph.initializers[name] = np.where(selection.covered(name), value, np.float32(0))
    return graph
