"""The cost table of an architecture: layers that multiply, and activations that take memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from fedprune.architecture import Activation, Axis, Layer
from fedprune.step import LOGITS, X
from fedprune_export.graph import Graph, Node
from fedprune_export.operators import ELEMENTWISE, REARRANGEMENTS, VIEWS
from fedprune_export.trace import Trace

ValueAxes = Mapping[str, tuple[Axis | None, ...]]
"""Per value its axes at full width; None for an axis that follows the batch."""

_READS_INPUT = frozenset(
    {
        "Conv",
        "ConvTranspose",
        "Gemm",
        "MatMul",
        "BatchNormalization",
        "Mul",
        "Div",
        "Pow",
        "Clip",
        "Abs",
        "Log",
        "Erf",
        "HardSigmoid",
        "HardSwish",
        "PRelu",
        "MaxPool",
        "ReduceMax",
        "ReduceMin",
        "Max",
        "Min",
    }
)
_READS_OUTPUT = frozenset(
    {"Relu", "LeakyRelu", "Sigmoid", "Tanh", "Exp", "Sqrt", "Reciprocal", "Softmax", "LogSoftmax", "MaxPool"}
)


def layers(graph: Graph, parameters: Mapping[str, str], seen: Trace) -> Iterable[Layer]:
    """A row per node that multiplies by a weight, in the order of the graph."""
    producers = graph.producers()
    for node in graph.nodes:
        if node.domain or node.op not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        for place in (1, 0):
            weight, axis = _origin(node, place, producers, seen)
            if weight not in parameters:
                continue
            shape, batched = seen.shapes[node.outputs[0]], seen.batched(node.outputs[0])
            per_sample = [1 if b else n for n, b in zip(shape, batched, strict=True)]
            if node.op == "ConvTranspose":
                per_sample = [1 if b else n for n, b in zip(seen.shapes[node.inputs[0]], batched, strict=True)]
            places = per_sample[2:] if node.op.startswith("Conv") else per_sample[:-1]
            axis = min(axis, max(0, len(seen.shapes[weight]) - 1))
            yield Layer(node.name, node.op, weight, int(np.prod(places, dtype=np.int64)), axis)
            break


def _origin(node: Node, place: int, producers: Mapping[str, Node], seen: Trace) -> tuple[str, int]:
    """The initialiser that a layer's input is arranged or computed from, and its axis that makes the output's channels.

    The operator says the axis of its input; transpositions between the weight and the operator are followed back.
    """
    name = node.inputs[place]
    rank = len(seen.shapes[name])
    if node.op == "Conv":
        axis = 0
    elif node.op == "ConvTranspose":
        axis = 1
    elif node.op == "Gemm":
        axis = (0 if node.attrs.get("transB") else 1) if place else (1 if node.attrs.get("transA") else 0)
    else:
        axis = rank - 1 if place == 1 else max(0, rank - 2)
    while name in producers and not producers[name].domain:
        maker = producers[name]
        if maker.op in REARRANGEMENTS:
            if maker.op == "Transpose":
                perm = list(maker.attrs.get("perm", range(rank)[::-1]))
                axis = int(perm[axis]) if axis < len(perm) else axis
            name = maker.inputs[0]
        elif maker.op in ELEMENTWISE:  # a scaled or squashed weight
            alike = [i for i in maker.inputs if i and seen.shapes[i] == seen.shapes[name]]
            if not alike:
                break
            name = alike[0]
        else:
            break
    return name, axis


def activations(graph: Graph, values: ValueAxes, seen: Trace) -> Iterable[Activation]:
    """All values that follow the batch, views counted with what they look at."""
    viewed = {
        n.outputs[0]: n.inputs[0] for n in graph.nodes if n.op in VIEWS and not n.domain and n.outputs[0] != LOGITS
    }

    def home(name: str) -> str:
        while name in viewed:
            name = viewed[name]
        return name

    kept: set[str] = set()
    for node in graph.nodes:
        unknown = bool(node.domain)
        if node.op in _READS_INPUT or unknown:
            reads = node.inputs[:1] if node.op in ("Clip", "BatchNormalization") else node.inputs
            kept.update(home(i) for i in reads if i)
        if node.op in _READS_OUTPUT or unknown:
            kept.update(home(o) for o in node.outputs if o)
    for name in (X, *(o for n in graph.nodes for o in n.outputs if o)):
        axes = values[name]
        if name in viewed or None not in axes or seen.dtypes[name].kind != "f":
            continue
        sizes = [a.length if a is not None else 1 for a in axes]
        place = next((i for i, a in enumerate(axes) if a is not None and a.groups), None)
        if place is None:
            place = next((i for i, a in enumerate(axes) if i and a is not None), None)
        channels = axes[place] if place is not None else None
        others = [n for i, n in enumerate(sizes) if i != place]
        yield Activation(name, channels or Axis.fixed(1), int(np.prod(others, dtype=np.int64)), name in kept)
