"""Replaces operators that no later pass reads: sequences, reversals of whole axes, and scalers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.importing.graph_writer import GraphWriter, operator_of
from fedprune_export.importing.parameter_roles import CONSTANT_PREFIX
from fedprune_export.ir.graph import Array
from fedprune_export.ir.trace import TRACE_BATCHES

_Attributes = Mapping[str, Any]
_Nodes = Sequence[onnx.NodeProto]

ML_DOMAIN = "ai.onnx.ml"

# Operators that make or read sequences, and what becomes of them; exporters emit them for chunk, unbind and stack.
SEQUENCE_OPERATORS = {
    "SplitToSequence": "becomes Split on import",
    "ConcatFromSequence": "becomes Concat on import",
    **dict.fromkeys(("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert"), "removed on import"),
}

# Every element becomes a value of its own. A split into more is most likely a damaged file.
_MAX_ELEMENTS = 4096

_REVERSED_END = -(2**63) + 1  # the end of a reversed axis, as torch's exporters write it


class Replacements(GraphWriter):
    """Keeps the elements of each sequence by its name, and gives their readers the elements.

    Writing raises `ModelError` if a length or position isn't known, or a sequence is used in another way.
    """

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        super().__init__(model, opset)
        self._sequences: dict[str, list[str]] = {}

    def rewrite_node(self, node: onnx.NodeProto) -> _Nodes:
        rule = _RULES.get(operator_of(node))
        if rule is not None:
            return rule(self, node, {a.name: helper.get_attribute_value(a) for a in node.attribute})
        elements = next((self._sequences[i] for i in node.input if i in self._sequences), None)
        if elements is None:
            return self._slice(node) if node.op_type == "Slice" else [node]
        if node.op_type != "Identity":
            hint = "Export it without loops over lists, or give its torch module itself."
            raise ModelError(f"{_label(node)} reads a sequence", hint=hint)
        self._sequences[node.output[0]] = elements
        return []

    def construct(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        self._sequences[node.output[0]] = list(node.input)
        return []

    def split(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        x, axis, split = node.input[0], int(attrs.get("axis", 0)), self._numbers(node, 1)
        total = self._size(x, axis)
        if total is None:
            raise ModelError(f"{_label(node)} splits an axis of unknown size")
        chunk_size = int(split) if split is not None and split.ndim == 0 else 1
        starts = range(0, total, chunk_size) if chunk_size > 0 else range(0)
        count = len(split) if split is not None and split.ndim else len(starts)
        if not 0 < count <= _MAX_ELEMENTS:
            raise ModelError(_label(node), expected="a few parts", got=f"{total} by {chunk_size}")
        sizes = [min(chunk_size, total - start) for start in starts[:count]]
        if split is not None and split.ndim:
            sizes = [int(size) for size in split.reshape(-1)]
        elements = [self._names.fresh(f"{node.output[0]}_0") for _ in sizes]
        self._sequences[node.output[0]] = elements
        if split is not None or attrs.get("keepdims", 1):
            return self._nodes_with_list("Split", x, "split", sizes, elements, axis=axis)
        rows = [self._names.fresh(f"{element}.row") for element in elements]
        nodes = self._nodes_with_list("Split", x, "split", sizes, rows, axis=axis)
        for row, element in zip(rows, elements, strict=True):
            nodes += self._nodes_with_list("Squeeze", row, "axes", [axis], [element])
        return nodes

    def concatenate(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        elements, axis = self._elements(node), int(attrs.get("axis", 0))
        if attrs.get("new_axis", 0):
            return self._stack(elements, axis, node.output[0])
        return [helper.make_node("Concat", elements, node.output, axis=axis)]

    def take(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        elements = self._elements(node)
        return [helper.make_node("Identity", [elements[self._position(node, 1, len(elements))]], node.output)]

    def insert(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        elements = list(self._elements(node))
        elements.insert(self._position(node, 2, len(elements) + 1), node.input[1])
        self._sequences[node.output[0]] = elements
        return []

    def reverse(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        """A Slice for a ReverseSequence of full lengths: TensorFlow has no other operator to reverse an axis, so
        tf2onnx writes a backward layer with as many equal lengths as there are samples."""
        axis = int(attrs.get("time_axis", 0))
        try:
            lengths = [self._value_at_size(node.input[1], size) for size in TRACE_BATCHES]
        except ModelError:
            lengths = [None]
        size = self._size(node.input[0], axis)
        if size is None or not all(value is not None and (value == size).all() for value in lengths):
            return [node]
        numbers = {"start": -1, "end": _REVERSED_END, "axis": axis, "step": -1}
        bounds = [self._constant(np.array([n], np.int64), f"{node.output[0]}.{what}") for what, n in numbers.items()]
        names = [node.input[0], *(bound.output[0] for bound in bounds)]
        return [*bounds, helper.make_node("Slice", names, node.output, name=node.name)]

    def scale(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        """Scikit-learn's StandardScaler."""
        stem = node.output[0]
        floats, centred = self._names.fresh(f"{stem}.floats"), self._names.fresh(f"{stem}.centred")
        offset, scale = (
            self._constant(np.array(attrs[key], np.float32), f"{CONSTANT_PREFIX}{stem}.{key}")
            for key in ("offset", "scale")
        )
        return [
            *(offset, scale),
            helper.make_node("Cast", node.input, [floats], to=onnx.TensorProto.FLOAT),
            helper.make_node("Sub", [floats, *offset.output], [centred]),
            helper.make_node("Mul", [centred, *scale.output], [stem]),
        ]

    def refuse_estimator(self, node: onnx.NodeProto, attrs: _Attributes) -> _Nodes:
        raise ModelError(
            f"{_label(node)} is an estimator whose parameters no gradient trains",
            expected="a network",
            hint="Fit scikit-learn's MLPClassifier or MLPRegressor to the same data (a linear model is one with "
            "hidden_layer_sizes=()), and export that.",
        )

    def _slice(self, node: onnx.NodeProto) -> _Nodes:
        """Stack only what is read of stacked states: most recurrent layers return their last one."""
        stack = self._maker(node.input[0])
        bounds = [self._constant_value(name) for name in node.input[1:]] if stack and stack.op_type == "Concat" else []
        numbers = [int(b.reshape(-1)[0]) for b in bounds if b is not None and b.size == 1]
        if stack is None or len(bounds) not in (3, 4) or len(numbers) < len(bounds):
            return [node]
        start, end, axis, step = [*numbers, 1][:4]
        is_stack = stack.attribute[0].i == axis and self._size(node.input[0], axis) == len(stack.input)
        picked = stack.input[start:end:step] if is_stack and step else []
        return [helper.make_node("Concat", picked, node.output, axis=axis)] if picked else [node]

    def _elements(self, node: onnx.NodeProto) -> list[str]:
        if node.input[0] not in self._sequences:
            raise ModelError(f"{_label(node)} reads a sequence of unknown length")
        return self._sequences[node.input[0]]

    def _position(self, node: onnx.NodeProto, index: int, count: int) -> int:
        """The position among so many that a node reads or writes, by default the last."""
        numbers = self._numbers(node, index)
        position = -1 if numbers is None else int(numbers.reshape(-1)[0]) if numbers.size == 1 else count
        if not -count <= position < count:
            raise ModelError(_label(node), expected=f"an index into {count} elements", got=position)
        return position % count

    def _numbers(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant integers at an input; None where it is left out."""
        if len(node.input) <= index or not node.input[index]:
            return None
        numbers = self._constant_value(node.input[index])
        if numbers is None or numbers.dtype.kind not in "iu":
            got = "computed ones" if numbers is None else numbers.dtype
            raise ModelError(f"numbers that {_label(node)} takes", expected="constant integers", got=got)
        return numbers


def _label(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {value_text(node.name or next(iter(node.output), ''))}"


_RULES: dict[tuple[str, str], Callable[[Replacements, onnx.NodeProto, _Attributes], _Nodes]] = {
    ("", "SplitToSequence"): Replacements.split,
    ("", "SequenceConstruct"): Replacements.construct,
    ("", "SequenceEmpty"): Replacements.construct,
    ("", "SequenceInsert"): Replacements.insert,
    ("", "SequenceAt"): Replacements.take,
    ("", "ConcatFromSequence"): Replacements.concatenate,
    ("", "ReverseSequence"): Replacements.reverse,
    (ML_DOMAIN, "Scaler"): Replacements.scale,
    **{
        (ML_DOMAIN, name): Replacements.refuse_estimator
        for name in (
            *("LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor"),
            *("TreeEnsemble", "TreeEnsembleClassifier", "TreeEnsembleRegressor"),
        )
    },
}
REPLACED = frozenset(_RULES)
