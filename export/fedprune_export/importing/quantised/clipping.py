"""Finds where the range of a quantisation does the work of a Relu or Clip that quantisers have removed.

A quantiser measures the range of an activation's output, and rounding to integers ends at both ends of the range. So
onnxruntime's quantiser leaves out a Relu or Clip before it: the zero point of such a range is the type's least integer.
A range always contains 0, so a least number of 0 says that none below it was seen.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedprune_export.ir.graph import Array, Node

# Upper ends of usual clips: ReLU6, Clip to 1, and DeepSpeech's. Any other end is only the largest number that was seen.
_CLIP_ENDS = (1.0, 6.0, 20.0)
_END_TOLERANCE = 1e-5  # a scale in float32 gives the range's end to about 1e-7

_NOT_NEGATIVE = frozenset(
    {"Abs", "Exp", "HardSigmoid", "ReduceL1", "ReduceL2", "ReduceSumSquare", "Relu", "Sigmoid", "Softmax", "Softplus"}
    | {"Sqrt", "ThresholdedRelu"}
)
# Operators whose output is not negative if no input is.
_SIGN_PRESERVING = frozenset(
    {"Add", "AveragePool", "Concat", "Div", "Dropout", "Expand", "Flatten", "Gather", "GatherElements", "GatherND"}
    | {"GlobalAveragePool", "GlobalMaxPool", "Identity", "Max", "MaxPool", "Min", "Mul", "ReduceMax", "ReduceMean"}
    | {"ReduceMin", "ReduceSum", "Reshape", "Resize", "Slice", "Split", "Squeeze", "Sum", "Tile", "Transpose"}
    | {"Unsqueeze", "DepthToSpace", "SpaceToDepth", "Cast"}
)
_DATA_INPUTS = {"Add", "Concat", "Div", "Max", "Min", "Mul", "Sum"}


def is_not_negative(name: str, makers: Mapping[str, Node], tensors: Mapping[str, Array]) -> bool:
    """Whether a value can't be negative by the operators that make it. Inputs of a file are taken for such values:
    their range is that of the data."""
    pending, seen = [name], set[str]()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        node = makers.get(value)
        if node is None:
            if value in tensors and (np.asarray(tensors[value], np.float64) < 0).any():
                return False
        elif node.domain:
            return False
        elif node.op == "Clip":
            low = tensors.get(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("min")
            if low is None or float(np.asarray(low).reshape(-1)[0]) < 0:
                return False
        elif node.op == "Pad":
            border = node.inputs[2] if len(node.inputs) > 2 else ""
            pending += [node.inputs[0], border] if border else node.inputs[:1]
        elif node.op in _SIGN_PRESERVING:
            pending += node.inputs if node.op in _DATA_INPUTS else node.inputs[:1]
        elif node.op not in _NOT_NEGATIVE:
            return False
    return True


def clip_end(upper: float) -> float | None:
    """The upper end of the Clip that a range from 0 to a number stands for; None for a Relu."""
    return next((end for end in _CLIP_ENDS if abs(upper - end) <= _END_TOLERANCE * end), None)
