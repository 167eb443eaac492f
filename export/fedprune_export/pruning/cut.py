"""Cutting: the physically smaller graph of a submodel.

Weights are gathered in rank order; what else in a graph says a channel count is rewritten (see `rewrites`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedprune.model.architecture import Axis
from fedprune.model.selection import Selection
from fedprune_export.ir.dropout import without_dropout
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.masked_reference import masked
from fedprune_export.pruning.model import RANKS_KEY, Model
from fedprune_export.pruning.rewrites import REWRITES, Sizes


def pinned(model: Model, widths: Sequence[int]) -> Model:
    """The submodel of these widths, none of whose sizes varies but the batch.

    Its tensors keep their names, so that whatever serves the model's training graphs serves the submodel's. All of them
    are zeros that take no memory: graphs that train read shapes alone. Raises `BundleError` if the widths don't fit the
    architecture.
    """
    whole = model.architecture
    kept = whole.check_widths(widths)

    def fixed(axis: Axis) -> Axis:
        return Axis.fixed(axis.size(kept, whole.sizes))

    tensors = tuple(replace(t, axes=tuple(map(fixed, t.axes))) for t in whole.tensors)
    values = {name: tuple(None if a is None else fixed(a) for a in axes) for name, axes in model.values.items()}
    graph = at_widths(model, widths, training=True)
    nothing = {
        t.name: np.broadcast_to(np.zeros((), model.graph.initializers[t.name].dtype), tuple(a.length for a in t.axes))
        for t in tensors
    }
    graph.initializers = {**nothing, **graph.initializers}
    return replace(model, graph=graph, architecture=replace(whole, groups=(), tensors=tensors), values=values)


__all__ = ["at_widths", "cut", "masked"]


def cut(model: Model, selection: Selection) -> Graph:
    """The submodel's inference graph with its weights.

    Raises `BundleError` if the selection belongs to another architecture.
    """
    model.check(selection)
    graph = at_widths(model, selection.widths)
    graph.initializers = {**selection.gather(model.tensors), **graph.initializers}
    return graph


def at_widths(model: Model, widths: Sequence[int], *, training: bool = False) -> Graph:
    """The graph of a submodel without its weights: nodes and constants depend on widths alone.

    `training`: whether it is to be trained, and keeps its dropouts. Raises `BundleError` if the widths don't fit the
    architecture.
    """
    sizes = Sizes(model, model.architecture.check_widths(widths))
    graph = model.graph.copy()
    graph.metadata.pop(RANKS_KEY, None)  # of the whole model's channels
    if not training:
        without_dropout(graph)
    for name in model.architecture.by_name:
        del graph.initializers[name]
    nodes, graph.nodes = graph.nodes, []
    for node in nodes:
        rewrite = None if node.domain else REWRITES.get(node.op)
        if rewrite is not None:
            rewrite(graph, node, sizes)
        graph.nodes.append(node)
    graph.prune()
    return graph
