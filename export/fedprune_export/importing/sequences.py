"""Rewrites sequence operators, which exporters emit for chunk, split, unbind and stack, as Split and Concat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.graph_writer import GraphWriter
from fedprune_export.ir.graph import Array

# Operators that make or read sequences.
SEQUENCE_OPERATORS = frozenset(
    {
        *("SplitToSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"),
        *("SequenceLength", "ConcatFromSequence"),
    }
)

# Those that become an operator on tensors; the others are removed.
SPLIT_AND_CONCAT = {"SplitToSequence": "Split", "ConcatFromSequence": "Concat"}

# Every element becomes a value of its own. A split into more is most likely a damaged file.
_MAX_ELEMENTS = 4096


def without_sequences(model: onnx.ModelProto, opset: int) -> None:
    """Write sequences as tensors; the model is changed.

    Raises `ModelError` if a length or position isn't known, or a sequence is used in another way.
    """
    _Sequences(model, opset).write()


class _Sequences(GraphWriter):
    """Keeps the elements of each sequence by its name, and gives their readers the elements."""

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        super().__init__(model, opset)
        self._sequences: dict[str, list[str]] = {}

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        if node.domain in ("", "ai.onnx") and node.op_type in SEQUENCE_OPERATORS:
            return self._rewrite(node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        read = [i for i in node.input if i in self._sequences]
        if not read:
            return [node]
        if node.op_type != "Identity":
            what = f"{node.op_type} {value_text(node.name)} reads a sequence"
            raise ModelError(what, hint="Export without sequences.")
        self._sequences[node.output[0]] = self._sequences[read[0]]
        return []

    def _rewrite(self, node: onnx.NodeProto, attrs: Mapping[str, Any]) -> Sequence[onnx.NodeProto]:
        target, axis = node.output[0], int(attrs.get("axis", 0))
        if node.op_type == "SplitToSequence":
            return self._split(node, axis, keeps_axis=bool(attrs.get("keepdims", 1)))
        if node.op_type in ("SequenceConstruct", "SequenceEmpty"):
            self._sequences[target] = list(node.input)
            return []
        if node.input[0] not in self._sequences:
            raise ModelError(f"{node.op_type} {value_text(node.name)} reads a sequence of unknown length")
        elements = list(self._sequences[node.input[0]])
        if node.op_type == "ConcatFromSequence":
            if attrs.get("new_axis", 0):
                return self._stack(elements, axis, target)
            return [helper.make_node("Concat", elements, [target], axis=axis)]
        if node.op_type == "SequenceLength":
            count = onnx.numpy_helper.from_array(np.array(len(elements), np.int64))
            return [helper.make_node("Constant", [], [target], value=count)]
        if node.op_type == "SequenceAt":
            return [helper.make_node("Identity", [elements[self._position(node, 1, elements)]], [target])]
        if node.op_type == "SequenceErase":
            del elements[self._position(node, 1, elements)]
        else:  # SequenceInsert, whose position may be behind the last element
            elements.insert(self._position(node, 2, [*elements, ""]), node.input[1])
        self._sequences[target] = elements
        return []

    def _split(self, node: onnx.NodeProto, axis: int, *, keeps_axis: bool) -> list[onnx.NodeProto]:
        x, total, split = node.input[0], self._size(node.input[0], axis), self._numbers(node, 1)
        if total is None:
            raise ModelError(f"SplitToSequence {value_text(node.name)} splits an axis of unknown size")
        if split is None or split.ndim == 0:
            chunk_size = 1 if split is None else int(split)
            if not chunk_size > 0 or total // chunk_size > _MAX_ELEMENTS:
                what = f"SplitToSequence {value_text(node.name)}"
                raise ModelError(what, expected="a few parts", got=f"{total} by {chunk_size}")
            sizes = [min(chunk_size, total - i) for i in range(0, total, chunk_size)]
        else:
            sizes = [int(s) for s in split.reshape(-1)[:_MAX_ELEMENTS]]
        if not sizes:
            raise ModelError(f"SplitToSequence {value_text(node.name)} makes no parts")
        elements = [self._names.fresh(f"{node.output[0]}_0") for _ in sizes]
        self._sequences[node.output[0]] = elements
        if split is None and not keeps_axis:
            return self._unstack(x, axis, elements)
        return self._nodes_with_list("Split", x, "split", sizes, elements, axis=axis)

    def _position(self, node: onnx.NodeProto, index: int, elements: Sequence[str]) -> int:
        """The position of the element that a node reads or writes, by default the last."""
        numbers = self._numbers(node, index)
        position = -1 if numbers is None else int(numbers.reshape(-1)[0]) if numbers.size == 1 else len(elements)
        if not -len(elements) <= position < len(elements):
            expected = f"an index into {len(elements)} elements"
            raise ModelError(f"{node.op_type} {value_text(node.name)}", expected=expected, got=position)
        return position % len(elements)

    def _numbers(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant integers at an input; None where it is left out."""
        if len(node.input) <= index or not node.input[index]:
            return None
        numbers = self._constant_value(node.input[index])
        if numbers is None:
            what = f"{node.op_type} {value_text(node.name)} takes computed numbers"
            raise ModelError(what, expected="constant numbers")
        if numbers.dtype.kind not in "iu":
            raise ModelError(f"{node.op_type} {value_text(node.name)}", expected="integers", got=numbers.dtype)
        return numbers
