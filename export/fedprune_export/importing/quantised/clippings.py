"""Writes the Relu or Clip that a quantiser left out, because the range of a rounding does its work.

Rounding to integers ends at both ends of the range that was measured. So onnxruntime's quantiser leaves out a Relu or
Clip before it. A range always contains 0, so one that begins there says that no number below it was seen: where the
file rounds numbers below it, something was left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedprune.core.text import first_few
from fedprune_export.importing.quantised.rules import Rounding
from fedprune_export.ir.graph import Graph, Node, node_label

_CLIP_INPUTS_OPSET = 11  # from which on Clip takes its bounds as inputs

# Usual clips: to 1, ReLU6, DeepSpeech's, Hardtanh. Any other end is only the largest number that was seen.
_CLIPS = ((0.0, 1.0), (0.0, 6.0), (0.0, 20.0), (-1.0, 1.0))
_WIDTH_TOLERANCE = 1e-5  # a scale in float32 gives the range's width to about 1e-7
_ZERO_TOLERANCE = 0.02  # a range is moved by up to half a step of its integers, so that one of them is 0

LOST_CLIPS_NOTE = (
    "If the quantiser left out a Clip to other numbers than "
    + ", ".join(f"{lower:g} to {upper:g}" for lower, upper in _CLIPS)
    + ", its ranges don't tell, and the model lacks it."
)


def write_clippings(graph: Graph, roundings: Mapping[str, Rounding], least: Mapping[str, float]) -> list[str]:
    """Write a Relu or Clip for each rounding of a graph that is one. Returns the note on it, if there is any.

    `least`: the least number that the file rounds at each rounding with a range, for random samples.
    """
    places, operators, makers = list[str](), set[str](), graph.producers()
    for node in graph.nodes:
        rounding = roundings.get(node.outputs[0])
        if rounding is None or rounding.range is None or least[node.outputs[0]] >= rounding.range[0]:
            continue
        clip = _usual_clip(*rounding.range)
        # Any other range than from 0 says only which numbers were seen.
        if clip is not None or not rounding.range[0]:
            places.append(node_label(makers[node.inputs[0]]))
            operators.add(_clip(graph, node, clip))
    shown = first_few(list(dict.fromkeys(places)), max_names=3)
    note = (
        f"The ranges of the file's quantisation are those of a Relu or Clip behind {shown}, which quantisers leave out "
        f"there: it is written again ({', '.join(sorted(operators))})."
    )
    return [note] if places else []


def _usual_clip(lower: float, upper: float) -> tuple[float, float] | None:
    """The clip whose bounds are the ends of a range, up to the choice of its zero point."""
    for start, end in _CLIPS:
        width = end - start
        if abs(upper - lower - width) <= _WIDTH_TOLERANCE * width and abs(lower - start) <= _ZERO_TOLERANCE * -start:
            return start, end
    return None


def _clip(graph: Graph, node: Node, bounds: tuple[float, float] | None) -> str:
    """Make a Relu of a node, or a Clip to bounds. Returns which."""
    if bounds is None:
        node.op = "Relu"
        return "Relu"
    node.op = "Clip"
    if graph.opset < _CLIP_INPUTS_OPSET:
        node.attrs = dict(zip(("min", "max"), bounds, strict=True))
    else:
        node.inputs += [graph.scalar(bound) for bound in bounds]
    return f"Clip to {bounds[1]:g}" if not bounds[0] else f"Clip to {bounds[0]:g} to {bounds[1]:g}"
