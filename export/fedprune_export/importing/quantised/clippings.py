"""Writes the Relu or Clip that a quantiser left out, because the range of a rounding does its work.

Rounding to integers ends at both ends of the range that was measured. So onnxruntime's quantiser leaves out a Relu or
Clip before it. A range always contains 0, so one that begins there says that no number below it was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np

from fedprune.core.text import first_few
from fedprune_export.importing.quantised.rules import Rounding
from fedprune_export.ir.graph import Graph, Node, node_label

_CLIP_INPUTS_OPSET = 11  # from which on Clip takes its bounds as inputs

# Upper ends of usual clips: ReLU6, Clip to 1, and DeepSpeech's. Any other end is only the largest number that was seen.
_CLIP_ENDS = (1.0, 6.0, 20.0)
_END_TOLERANCE = 1e-5  # a scale in float32 gives the range's end to about 1e-7

# The least number that these operators can give, whatever they read.
_LEAST = {
    **dict.fromkeys(("Abs", "Exp", "HardSigmoid", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid"), 0.0),
    **dict.fromkeys(("Softmax", "Softplus", "Sqrt", "ThresholdedRelu"), 0.0),
    **dict.fromkeys(("Cos", "Erf", "Sin", "Softsign", "Tanh"), -1.0),
}
# Operators whose output isn't less than their least input: the first, which has the data of most, or any.
_PASSING = frozenset(
    {"AveragePool", "Cast", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"}
    | {"GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "Reshape"}
    | {"Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
_PASSING_ALL = frozenset({"Concat", "Max", "Min", "Pad"})


def write_clippings(graph: Graph, roundings: Mapping[str, Rounding]) -> list[str]:
    """Write a Relu or Clip for each rounding of a graph that is one. Returns the note on it, if there is any."""
    ranges = {r.steps[0].inputs[0]: r.range for r in roundings.values() if r.range is not None}
    # The range of an input is that of the data.
    bounds = {p.name: ranges[p.name][0] for p in graph.inputs if p.name in ranges}
    places, ends = list[str](), set[str]()
    makers = graph.producers()

    def least(name: str) -> float:
        if name in graph.initializers:
            return float(np.asarray(graph.initializers[name], np.float64).min(initial=math.inf))
        return bounds.get(name, -math.inf)

    for node in graph.nodes:
        rounding = roundings.get(node.outputs[0])
        if rounding is not None and rounding.range is not None and not rounding.range[0] and least(node.inputs[0]) < 0:
            places.append(node_label(makers[node.inputs[0]]))
            ends.add(_clip(graph, node, rounding.range[1]))
        bounds |= dict.fromkeys(node.outputs, _least_output(node, least))
    shown = first_few(list(dict.fromkeys(places)), max_names=3)
    note = (
        f"The ranges of the file's quantisation begin at 0 behind {shown}, where quantisers leave out a Relu or Clip: "
        f"it is written again ({', '.join(sorted(ends))})."
    )
    return [note] if places else []


def _clip(graph: Graph, node: Node, upper: float) -> str:
    """Make a Relu of a node, or a Clip if the upper end is a usual one. Returns which."""
    end = next((end for end in _CLIP_ENDS if abs(upper - end) <= _END_TOLERANCE * end), None)
    node.op = "Relu" if end is None else "Clip"
    if end is None:
        return "Relu"
    if graph.opset < _CLIP_INPUTS_OPSET:
        node.attrs = {"min": 0.0, "max": end}
    else:
        node.inputs += [graph.scalar(0), graph.scalar(end)]
    return f"Clip to {end:g}"


def _least_output(node: Node, least: Callable[[str], float]) -> float:
    """A bound below all numbers that a node can give, from such bounds of its inputs."""
    if node.domain or node.op in _LEAST:
        return _LEAST.get(node.op, -math.inf)
    if node.op == "Clip":
        return least(node.inputs[1]) if any(node.inputs[1:2]) else float(node.attrs.get("min", -math.inf))
    if node.op in _PASSING:
        return least(node.inputs[0])
    if node.op in _PASSING_ALL:
        return min(least(i) for i in node.inputs if i)
    if node.op in ("Add", "Sum"):
        return sum(least(i) for i in node.inputs)
    is_product = node.op in ("Mul", "Div", "ReduceSum")
    return 0.0 if is_product and min(least(i) for i in node.inputs[:2]) >= 0 else -math.inf
