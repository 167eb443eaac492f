"""The masked whole graph: the reference whose outputs a cut must equal.

Weights stay as they are. Lost channels are multiplied by zero where they are summed up: at the inputs of convolutions,
matrix products, recurrent layers and sums. In between their values don't matter, since no operator mixes them with kept
ones; zero weights instead would make weights that are normalised in the graph divide by zero. A norm, mean or extreme
over channels is one of those that are kept, be it of activations or of weights (weight standardisation, weight norm):
that is what the smaller network does, and all that it can do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.selection import Selection
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import load_rules, registrar
from fedprune_export.pruning.model import Model

Mask = npt.NDArray[np.float32]


def masked_graph(model: Model, selection: Selection) -> Graph:
    """The whole graph, with the channels masked that the submodel lacks."""
    graph = model.graph.copy()
    masks = MaskWriter(model, selection, graph)
    nodes, graph.nodes, rules = graph.nodes, [], load_rules(MASK_RULES)
    for node in nodes:
        rule = None if node.domain else rules.get(node.op)
        if rule is None or not rule(masks, node):
            graph.nodes.append(node)
    return graph


class MaskWriter:
    """Masks of values, and the graph they are written to."""

    def __init__(self, model: Model, selection: Selection, graph: Graph) -> None:
        self.graph = graph
        self._values = model.values
        self._selection = selection
        self._masks: dict[tuple[str, int], Mask | None] = {}

    def rank(self, name: str) -> int:
        return len(self._values[name])

    def length(self, name: str, axis: int) -> int:
        """Indices of an axis at full width. Raises `ModelError` if the axis follows the batch."""
        value_axis = self._values[name][axis]
        if value_axis is None:
            raise ModelError(f"a norm averages over axis {axis} of {name}, which follows the batch")
        return value_axis.length

    def mask_of(self, name: str, axis: int) -> Mask | None:
        """Ones for kept indices of an axis, zeros for lost ones; None where nothing is lost."""
        key = (name, axis % self.rank(name))
        if key not in self._masks:
            value_axis = self._values[name][axis]
            mask = None
            if value_axis is not None and value_axis.groups:
                mask = np.zeros(value_axis.length, np.float32)
                mask[self._selection.indices(value_axis)] = 1
            # A mask of ones would only cost a multiplication per layer.
            self._masks[key] = None if mask is None or mask.all() else mask
        return self._masks[key]

    def apply(self, node: Node, index: int, axes: Iterable[int]) -> None:
        """Multiply a node's input by the masks of these axes."""
        name = node.inputs[index]
        for axis in axes:
            mask = self.mask_of(name, axis)
            if mask is not None:
                node.inputs[index] = self.graph.emit(
                    "Mul", node.inputs[index], self.broadcast_mask(mask, axis % self.rank(name), self.rank(name))
                )

    def broadcast_mask(self, mask: Mask, axis: int, rank: int) -> str:
        """A mask as a constant that broadcasts along one of `rank` axes."""
        shape = [1] * rank
        shape[axis] = -1
        return self.graph.constant(mask.reshape(shape), np.float32)


# Masks the axes that a node contracts; returns whether it has written the node itself, in another form.
MaskRule = Callable[[MaskWriter, Node], bool | None]

MASK_RULES: dict[str, MaskRule] = {}  # rules by operator

mask_rule = registrar(MASK_RULES, "mask")  # register a rule for operators
