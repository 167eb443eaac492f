"""Values that HeteroFL's scaler multiplies: outputs of layers with weights, except the last layer.

A device that holds a share r of the channels sums over fewer inputs, so that its activations are smaller than the
whole model's; while it trains, the outputs of its layers are therefore multiplied by 1/r (Diao et al. 2021, Sec. 3.3,
`Scaler`), before any normalisation. The last layer's outputs are the logits and stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.model.architecture import TensorKind
from fedprune_export.channels.cost_table import LAYERS
from fedprune_export.ir.graph import Node
from fedprune_export.pruning.model import Model


def scaled_outputs(model: Model) -> frozenset[str]:
    """Names of the values that are multiplied: outputs of layers, with their bias where that is added by its own node.

    A layer is a last one where the output can be reached from it without passing another layer.
    """
    # Not those of recurrent layers: a scaled state would be scaled again at every step.
    weighted = {layer.name for layer in model.architecture.layers if layer.weight and layer.op in LAYERS}
    layers = [n for n in model.graph.nodes if n.op in LAYERS and n.name in weighted]
    last = _last_layer_outputs(model, layers)
    readers = model.graph.consumers()
    return frozenset(_with_bias(model, n, readers) for n in layers if n.outputs[0] not in last)


def _last_layer_outputs(model: Model, layers: list[Node]) -> set[str]:
    """First outputs of the layers from which the model's output is reached through no other layer."""
    producers, stops = model.graph.producers(), {n.outputs[0] for n in layers}
    last_outputs: set[str] = set()
    visited: set[str] = set()
    pending = [p.name for p in model.graph.outputs]
    while pending:
        name = pending.pop()
        if not name or name in visited:
            continue
        visited.add(name)
        if name in stops:
            last_outputs.add(name)
        elif name in producers:
            pending += producers[name].inputs
    return last_outputs


def _with_bias(model: Model, node: Node, consumers: Mapping[str, list[tuple[Node, int]]]) -> str:
    """A layer's output or, where the addition of a bias alone reads it, that sum."""
    # Importers write a layer's bias as a node of its own where its operator takes none, as after MatMul.
    name = node.outputs[0]
    readers = consumers.get(name, [])
    if len(readers) != 1 or readers[0][0].op != "Add":
        return name
    reader = readers[0][0]
    addend = next((i for i in reader.inputs if i != name), "")
    spec = model.architecture.by_name.get(addend)
    return reader.outputs[0] if spec is not None and spec.kind is TensorKind.BIAS else name
