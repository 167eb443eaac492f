"""Lets random numbers of a file be drawn by boards: each draw becomes a Dropout whose metadata says how it is drawn.

The Dropout's input is what evaluation takes instead: the mean, or the likelier value of a Bernoulli variable whose
probability is computed. So a model's predictions are the same from run to run, which a draw's would not be.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from fedprune.core.text import first_few, quantity
from fedprune.model.random_inputs import NORMAL, UNIFORM, Draw
from fedprune_export.importing.value_inference import graph_shapes, value_types
from fedprune_export.ir.dropout import DRAWS_KEY, DROPOUT_AXES_KEY, is_dropout, read_draws, read_mask_axes
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.trace import Trace

# Operators that are drawn, with the names and defaults of what says how.
_NORMAL_ATTRIBUTES = {"mean": 0.0, "scale": 1.0}
_UNIFORM_ATTRIBUTES = {"low": 0.0, "high": 1.0}
_KINDS: dict[str, tuple[str, dict[str, float]]] = {
    "RandomNormal": (NORMAL, _NORMAL_ATTRIBUTES),
    "RandomNormalLike": (NORMAL, _NORMAL_ATTRIBUTES),
    "RandomUniform": (UNIFORM, _UNIFORM_ATTRIBUTES),
    "RandomUniformLike": (UNIFORM, _UNIFORM_ATTRIBUTES),
    "Bernoulli": (UNIFORM, _UNIFORM_ATTRIBUTES),
}


def rewrite_draws(graph: Graph, notes: list[str]) -> bool:
    """Let a graph's random numbers be inputs of a training step. Returns whether it has any; `notes` gets a sentence on
    them."""
    if not any(node.op in _KINDS and not node.domain for node in graph.nodes):
        return False
    drawn = list[str]()
    shapes, types, makers = graph_shapes(graph), value_types(graph), graph.producers()
    distributions = {name: draw.to_json() for name, draw in read_draws(graph.metadata).items()}

    def rewrite_draw(graph: Graph, node: Node) -> None:
        kind, defaults = _KINDS[node.op]
        # Attributes are float32, which is meant as the decimal number that it is nearest to.
        draw = Draw(kind, *(float(f"{node.attrs.get(name, default):.6g}") for name, default in defaults.items()))
        is_bernoulli = node.op == "Bernoulli"
        # The only probability of a Bernoulli variable; None if it has several, or they are computed.
        filling = _filling(graph, makers, node.inputs[0]) if node.inputs else None
        shares = np.unique(filling.astype(np.float64) if is_bernoulli and filling is not None else [])
        share = float(f"{shares[0]:.6g}") if shares.size == 1 and 0 <= shares[0] <= 1 else None
        sizes = node.attrs.get("shape")
        if sizes is None and filling is not None and None not in (dims := shapes.get(node.inputs[0], [None])):
            sizes = dims
        mean = np.array([draw.mean if share is None else share], np.float32)
        value = graph.emit(
            "ConstantOfShape",
            _shape(graph, node, sizes),
            attrs={"value": mean},
            out=graph.fresh(f"{node.outputs[0]}.mean"),
        )
        # A dropout of the mean gives 0 or 1.
        ratio = [] if share is None else [graph.scalar(1 - share)]
        value = graph.emit("Dropout", value, *ratio, out=graph.fresh(f"{node.outputs[0]}.drawn"))
        if share is None:
            distributions[value] = draw.to_json()
            drawn.append(node.op)
        if is_bernoulli and share is None:
            value = graph.emit("Less", value, node.inputs[0])
        element_type = node.attrs.get("dtype") or types.get(next(iter(node.inputs), ""), onnx.TensorProto.FLOAT)
        graph.emit("Cast", value, attrs={"to": element_type}, out=node.outputs[0])

    graph.rewrite(dict.fromkeys(_KINDS, rewrite_draw))
    graph.metadata[DRAWS_KEY] = json.dumps(distributions)
    # A Bernoulli variable with one probability is a dropout, which needs no note.
    if drawn:
        notes.append(
            f"Boards train with {quantity(len(drawn), 'draw')} of random numbers "
            f"({first_few(list(dict.fromkeys(drawn)))}), as the model has them. Predictions and evaluation take the "
            "mean of each instead, so that they can be repeated."
        )
    return True


def merge_masks(graph: Graph, trace: Trace) -> None:
    """Let products with a mask that is drawn be dropouts, which cost nothing in predictions: stochastic depth and
    dropouts of channels multiply by draws of 0 and 1, divided by their mean."""
    makers, readers = graph.producers(), graph.consumers()
    draws, axes = read_draws(graph.metadata), read_mask_axes(graph)
    for node in graph.nodes:
        if node.op != "Mul" or node.domain:
            continue
        for value, mask in (node.inputs, node.inputs[::-1]):
            scaled = makers.get(mask)
            drawn = makers.get(scaled.inputs[0]) if scaled is not None and scaled.op == "Div" else None
            if scaled is None or drawn is None or not is_dropout(drawn) or drawn.name in draws:
                continue
            fill, mean = makers.get(drawn.inputs[0]), graph.initializers.get(scaled.inputs[1])
            if (
                fill is not None
                and fill.op == "ConstantOfShape"
                and mean is not None
                and np.array_equal(fill.attrs["value"], mean.reshape(-1))
                and len(readers[mask]) == len(readers[drawn.outputs[0]]) == 1
                and trace.dims(value) == trace.dims(node.outputs[0])
            ):
                node.op, node.inputs = "Dropout", [value, drawn.inputs[1]]
                dims = trace.dims(mask)
                skipped = len(trace.dims(value)) - len(dims)
                axes[node.name] = tuple(i for i, size in enumerate(dims, skipped) if size != 1)
                break
    if axes:
        graph.metadata[DROPOUT_AXES_KEY] = json.dumps(axes)
        graph.prune()


def _shape(graph: Graph, node: Node, sizes: Sequence[int] | None) -> str:
    """The shape of a draw: that of its input, or a constant one.

    A file with a fixed batch has it in constant shapes, too: there it is that of the input, so that every sample has
    random numbers of its own.
    """
    if sizes is None:
        return graph.emit("Shape", node.inputs[0])
    samples = graph.inputs[0]
    if len(sizes) < 2 or samples.shape[:1] != (sizes[0],):
        return graph.ints(*sizes)
    batch = graph.emit("Gather", graph.emit("Shape", samples.name), graph.ints(0))
    return graph.emit("Concat", batch, graph.ints(*sizes[1:]), attrs={"axis": 0})


def _filling(graph: Graph, makers: Mapping[str, Node], name: str) -> Array | None:
    """What a value is filled with, before it gets its shape; None if it is computed from data."""
    while name not in graph.initializers:
        maker = makers.get(name)
        if maker is None or maker.op not in ("ConstantOfShape", "Cast", "CastLike", "Expand"):
            return None
        if maker.op == "ConstantOfShape":
            return np.asarray(maker.attrs.get("value", 0.0))
        name = maker.inputs[0]
    return graph.initializers[name]
