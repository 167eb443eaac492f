"""Cuts a model: the physically smaller graph of a submodel.

Weights are gathered in rank order (the best channels first). Attributes and constants that hold a number of channels
are rewritten by the operators' rewrites (`rewrites`).
"""

from __future__ import annotations

from collections.abc import Sequence

from fedprune.model.selection import Selection
from fedprune_export.ir.dropout import remove_dropouts
from fedprune_export.ir.graph import Graph
from fedprune_export.ir.operators import load_rules
from fedprune_export.pruning.model import RANKS_KEY, Model
from fedprune_export.pruning.rewrites import REWRITES, Sizes


def cut(model: Model, selection: Selection) -> Graph:
    """The submodel's inference graph with its weights.

    Raises `BundleError` if the selection belongs to another architecture.
    """
    model.check_selection(selection)
    graph = at_widths(model, selection.widths)
    graph.initializers = {**selection.gather(model.tensors), **graph.initializers}
    return graph


def at_widths(model: Model, widths: Sequence[int]) -> Graph:
    """The graph of a submodel without its weights: nodes and constants depend on widths alone.

    Raises `BundleError` if the widths don't fit the architecture.
    """
    sizes = Sizes(model, model.architecture.check_widths(widths))
    graph = model.graph.copy()
    # Ranks are of the whole model's channels: a submodel has others.
    graph.metadata.pop(RANKS_KEY, None)
    remove_dropouts(graph)
    for name in model.architecture.by_name:
        del graph.initializers[name]
    nodes, graph.nodes, rewrites = graph.nodes, [], load_rules(REWRITES)
    for node in nodes:
        rewrite = None if node.domain else rewrites.get(node.op)
        if rewrite is not None:
            rewrite(graph, node, sizes)
        graph.nodes.append(node)
    graph.prune()
    return graph
