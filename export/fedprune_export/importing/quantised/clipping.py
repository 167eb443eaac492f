"""Finds where the range of a quantisation does the work of a Relu or Clip that quantisers have removed.

A quantiser measures the range of an activation's output, and rounding to integers ends at both ends of the range. So
onnxruntime's quantiser leaves out a Relu or Clip before it: the zero point of such a range is the type's least integer.
A range always contains 0, so a least number of 0 says that none below it was seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from fedprune_export.ir.graph import Node

# Upper ends of usual clips: ReLU6, Clip to 1, and DeepSpeech's. Any other end is only the largest number that was seen.
_CLIP_ENDS = (1.0, 6.0, 20.0)
_END_TOLERANCE = 1e-5  # a scale in float32 gives the range's end to about 1e-7

# The least number that these operators can give, whatever they read.
_LEAST = {
    **dict.fromkeys(("Abs", "Exp", "HardSigmoid", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid"), 0.0),
    **dict.fromkeys(("Softmax", "Softplus", "Sqrt", "ThresholdedRelu"), 0.0),
    **dict.fromkeys(("Cos", "Erf", "Sin", "Softsign", "Tanh"), -1.0),
}
# Operators whose output isn't less than their least input; the first input has the data of most.
_PASSING = frozenset(
    {"AveragePool", "Cast", "DepthToSpace", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"}
    | {"GlobalAveragePool", "GlobalMaxPool", "Identity", "MaxPool", "ReduceMax", "ReduceMean", "ReduceMin", "Reshape"}
    | {"Resize", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
_PASSING_ALL = frozenset({"Concat", "Max", "Min"})


def least_output(node: Node, least: Callable[[str], float]) -> float:
    """A bound below all numbers that a node can give, from such bounds of its inputs."""
    if node.domain:
        return -math.inf
    if node.op in _LEAST:
        return _LEAST[node.op]
    if node.op == "Clip":
        if len(node.inputs) > 1 and node.inputs[1]:
            return least(node.inputs[1])
        return float(node.attrs.get("min", -math.inf))
    if node.op in _PASSING:
        return least(node.inputs[0])
    if node.op == "Pad":
        return min(least(i) for i in (node.inputs[0], *filter(None, node.inputs[2:3])))
    bounds = [least(i) for i in node.inputs]
    if node.op in _PASSING_ALL:
        return min(bounds)
    if node.op in ("Add", "Sum"):
        return sum(bounds)
    return 0.0 if node.op in ("Mul", "Div", "ReduceSum") and min(bounds[:2]) >= 0 else -math.inf


def clip_end(upper: float) -> float | None:
    """The upper end of the Clip that a range from 0 to a number stands for; None for a Relu."""
    return next((end for end in _CLIP_ENDS if abs(upper - end) <= _END_TOLERANCE * end), None)
