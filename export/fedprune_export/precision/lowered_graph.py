"""A submodel's graph on its way to a lower precision, and its division into what boards run and what makes its tensors.

Weights change after every round, so that a board has to convert them itself, with onnxruntime alone. Passes write all
that they do into one graph, as if its weights were inputs. What then depends on nothing else becomes the *prepare*
graph, which makes the other one's tensors once per round.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedprune.model.step_contract import X
from fedprune_export.bundles.inference import zero_weights
from fedprune_export.channels.cost_table import LAYERS
from fedprune_export.ir.graph import Graph, Node, Port
from fedprune_export.ir.shape_inference import infer
from fedprune_export.pruning.cut import at_widths
from fedprune_export.pruning.model import Model


@dataclass
class LoweredGraph:
    """A graph that passes of this package rewrite.

    Attributes:
        graph: Its inputs are `x`, the weights, and with int8 the ranges of activations.
        shapes: Shapes of values for a batch of two samples; missing where they can't be inferred.
        dtypes: Types of values; missing where they can't be inferred.
    """

    graph: Graph
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, np.dtype[Any]]

    @classmethod
    def of(cls, model: Model, widths: Sequence[int]) -> LoweredGraph:
        """The graph of a submodel. Raises `BundleError` if the widths don't fit the architecture."""
        graph, weights = at_widths(model, widths), zero_weights(model, widths)
        complete = graph.copy()
        complete.initializers |= weights
        inferred = infer(complete, batch=2)
        for name, value in weights.items():
            graph.add_input(name, (None,) * value.ndim)
        return cls(graph, inferred.shapes, inferred.dtypes)

    def is_float(self, name: str) -> bool:
        """Whether a value is known to be float32."""
        return self.dtypes.get(name) == np.float32

    def output_names(self) -> set[str]:
        return {p.name for p in self.graph.outputs}

    def tensors(self) -> set[str]:
        """Weights, ranges and the values that depend on them alone, without those that only the graph's outputs are."""
        return self._tensors_and_constants()[0]

    def _tensors_and_constants(self) -> tuple[set[str], set[str]]:
        tensors, constants = {p.name for p in self.graph.inputs if p.name != X}, set(self.graph.initializers)
        output_names = self.output_names()
        for node in self.graph.nodes:
            reads = [i for i in node.inputs if i]
            # Weights of 8 bits are dequantised where they are read.
            if not reads or node.op == "DequantizeLinear" or not output_names.isdisjoint(node.outputs):
                continue
            if all(i in tensors or i in constants for i in reads):
                (constants if constants.issuperset(reads) else tensors).update(o for o in node.outputs if o)
        return tensors, constants

    def split(self) -> Graph:
        """Remove all that weights and ranges decide from the graph; returns the prepare graph, which computes it.

        The outputs of the prepare graph are inputs of nodes of the other one, in the order of reading.
        """
        tensors, constants = self._tensors_and_constants()
        graph = self.graph
        weights = {p.name for p in graph.inputs}
        prepare = Graph(name="prepare", initializers=dict(graph.initializers), _counter=graph._counter)
        prepare.nodes = [n for n in graph.nodes if not (tensors | constants).isdisjoint(n.outputs)]
        graph.nodes = [n for n in graph.nodes if tensors.isdisjoint(n.outputs)]
        names: dict[str, str] = {}
        for name in dict.fromkeys(i for n in graph.nodes for i in n.inputs if i in tensors):
            # A weight that stays as it is needs another name: an input can't be an output.
            names[name] = prepare.emit("Identity", name, out=f"{name}~float32") if name in weights else name
        graph.rename(names)
        prepare.outputs = [Port(n, np.dtype(np.float32), ()) for n in names.values()]
        prepare.prune()
        read = {i for n in prepare.nodes for i in n.inputs}
        prepare.inputs = [p for p in graph.inputs if p.name in read]
        graph.inputs = [p for p in graph.inputs if p.name == X]
        graph.prune()
        return prepare


def is_layer(lowered: LoweredGraph, node: Node, tensors: Collection[str]) -> bool:
    """Whether a node is a convolution or a product with a matrix of weights, with at most one bias per channel."""
    if node.domain or node.op not in LAYERS or node.inputs[1] not in tensors:
        return False
    weight_shape, biases = lowered.shapes.get(node.inputs[1]), [i for i in node.inputs[2:] if i]
    if weight_shape is None or not all(i in tensors or i in lowered.graph.initializers for i in biases):
        return False
    if node.op in ("Conv", "ConvTranspose"):
        return True
    is_plain = node.attrs.get("alpha", 1.0) == node.attrs.get("beta", 1.0) == 1.0 and not node.attrs.get("transA", 0)
    return is_plain and len(weight_shape) == 2 and all(len(lowered.shapes.get(i, ())) == 1 for i in biases)


def node_text(node: Node) -> str:
    """A node in lists of nodes that stay in float32."""
    return f"{node.op} {node.name or node.outputs[0]}"
