"""A model at fixed widths, as a model of its own: what a graph is made of that is written for one board."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from fedprune.model.architecture import Axis
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model


def pinned(model: Model, widths: Sequence[int]) -> Model:
    """The submodel of these widths, none of whose sizes varies but the batch.

    Its tensors keep their names, so that whatever serves the model's training graphs serves the submodel's. All of them
    are zeros that take no memory: graphs that train read shapes alone.

    Args:
        model: The whole model.
        widths: Channels of every group.

    Raises:
        BundleError: The widths don't fit the architecture.
    """
    whole = model.architecture
    kept = whole.check_widths(widths)

    def fixed(axis: Axis) -> Axis:
        return Axis.fixed(axis.size(kept, whole.sizes))

    tensors = tuple(replace(t, axes=tuple(map(fixed, t.axes))) for t in whole.tensors)
    values = {name: tuple(None if a is None else fixed(a) for a in axes) for name, axes in model.values.items()}
    graph = at_widths(model, widths)
    nothing = {
        t.name: np.broadcast_to(np.zeros((), model.graph.initializers[t.name].dtype), tuple(a.length for a in t.axes))
        for t in tensors
    }
    graph.initializers = {**nothing, **graph.initializers}
    return replace(model, graph=graph, architecture=replace(whole, groups=(), tensors=tensors), values=values)
