"""Writes ReverseSequence as a Slice of step -1 where it reverses samples as a whole.

TensorFlow has no other operator to reverse an axis: tf2onnx writes a backward layer with as many equal lengths as there
are samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune_export.importing.graph_writer import TRIAL_SIZES, GraphWriter

_FIRST = -(2**63) + 1  # the end of a reversed axis, as torch's exporters write it


def without_reversals(model: onnx.ModelProto, opset: int) -> None:
    """Write reversals of a whole axis as slices; the model is changed. Reversals by lengths of samples stay."""
    _Reversals(model, opset).write()


class _Reversals(GraphWriter):
    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """A Slice for a ReverseSequence of full lengths; any other node itself."""
        if node.op_type != "ReverseSequence" or node.domain not in ("", "ai.onnx") or len(node.input) != 2:
            return [node]
        axis = next((a.i for a in node.attribute if a.name == "time_axis"), 0)
        length = self._size(node.input[0], axis)
        if length is None or not self._are_lengths(node.input[1], length):
            return [node]
        bounds = [
            self._constant(np.array([number], np.int64), f"{node.output[0]}.{what}")
            for what, number in (("start", -1), ("end", _FIRST), ("axis", axis), ("step", -1))
        ]
        names = [bound.output[0] for bound in bounds]
        return [*bounds, helper.make_node("Slice", [node.input[0], *names], [node.output[0]], name=node.name)]

    def _are_lengths(self, name: str, length: int) -> bool:
        """Whether all lengths of samples are this one, whatever the batch."""
        try:
            values = [self._value_at_size(name, size) for size in TRIAL_SIZES]
        except ModelError:
            return False
        return all(value is not None and bool((value == length).all()) for value in values)
