"""Rewrites sequence operators, which exporters emit for chunk, split, unbind and stack, as Split, Gather and Concat."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, shown
from fedprune_export.importing.names import Names
from fedprune_export.ir.graph import read_tensor

Array = npt.NDArray[Any]

SEQUENCE_OPERATORS = frozenset(
    {
        *("SplitToSequence", "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceInsert", "SequenceErase"),
        *("SequenceLength", "ConcatFromSequence"),
    }
)
"""Operators that make or read sequences."""

SPLIT_AND_CONCAT = {"SplitToSequence": "Split", "ConcatFromSequence": "Concat"}
"""Those that become an operator on tensors; the others are removed."""

_MOST_PARTS = 4096
_LARGE = 4096


def without_sequences(model: onnx.ModelProto, opset: int) -> None:
    """Write sequences as tensors; the model is changed.

    Raises `ModelError` if a length or position isn't known, or a sequence is used in another way.
    """
    writer = _Writer(model, opset)
    for node in list(model.graph.node):
        writer.take(node)
    del model.graph.node[:]
    model.graph.node.extend(writer.nodes)


@dataclass
class _Writer:
    model: onnx.ModelProto
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    sequences: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self._names = Names(graph)
        self._tensors = {t.name: t for t in graph.initializer}
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Constant" and attribute.name == "value":
                    self._tensors[node.output[0]] = attribute.t
        self._shapes: dict[str, list[int | None]] | None = None

    def take(self, node: onnx.NodeProto) -> None:
        if node.domain not in ("", "ai.onnx") or node.op_type not in SEQUENCE_OPERATORS:
            read = [i for i in node.input if i in self.sequences]
            if read and node.op_type == "Identity":
                self.sequences[node.output[0]] = self.sequences[read[0]]
            elif read:
                raise ModelError(
                    f"{node.op_type} {shown(node.name)} reads a sequence", hint="Export without sequences."
                )
            else:
                self.nodes.append(node)
            return
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        rules = {
            "SplitToSequence": self._split,
            "SequenceAt": self._at,
            "SequenceConstruct": self._construct,
            "SequenceEmpty": self._empty,
            "SequenceInsert": self._insert,
            "SequenceErase": self._erase,
            "SequenceLength": self._length,
            "ConcatFromSequence": self._concat,
        }
        rules[node.op_type](node, attrs)

    def _split(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        x, axis = node.input[0], int(attrs.get("axis", 0))
        total = self._size(x, axis)
        split = self._number(node, 1)
        if total is None:
            raise ModelError(f"SplitToSequence {shown(node.name)} splits an axis of unknown size")
        if split is None or split.ndim == 0:
            each = 1 if split is None else int(split.reshape(-1)[0])
            if not each > 0 or total // each > _MOST_PARTS:
                raise ModelError(
                    f"SplitToSequence {shown(node.name)}", expected="a few parts", got=f"{total} by {each}"
                )
            sizes = [min(each, total - i) for i in range(0, total, each)]
        else:
            sizes = [int(s) for s in split.reshape(-1)[:_MOST_PARTS]]
        if not sizes:
            raise ModelError(f"SplitToSequence {shown(node.name)} makes no parts")
        if split is None and not attrs.get("keepdims", 1):
            parts = [self._name(node.output[0]) for _ in sizes]
            for i, part in enumerate(parts):
                self.nodes.append(helper.make_node("Gather", [x, self._constant(np.int64(i))], [part], axis=axis))
        else:
            parts = self._parts(x, sizes, axis, node.output[0])
        self.sequences[node.output[0]] = parts

    def _parts(self, x: str, sizes: list[int], axis: int, stem: str) -> list[str]:
        parts = [self._name(stem) for _ in sizes]
        if self.opset < 13:
            self.nodes.append(helper.make_node("Split", [x], parts, axis=axis, split=sizes))
        else:
            self.nodes.append(
                helper.make_node("Split", [x, self._constant(np.array(sizes, np.int64))], parts, axis=axis)
            )
        return parts

    def _at(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        parts, i = self._sequence(node), self._position(node, 1)
        if not -len(parts) <= i < len(parts):
            raise ModelError(f"SequenceAt {shown(node.name)}", expected=f"an index into {len(parts)} elements", got=i)
        self.nodes.append(helper.make_node("Identity", [parts[i]], [node.output[0]]))

    def _construct(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        self.sequences[node.output[0]] = list(node.input)

    def _empty(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        self.sequences[node.output[0]] = []

    def _insert(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        parts = list(self._sequence(node))
        at = self._position(node, 2) if len(node.input) > 2 and node.input[2] else len(parts)
        if not -len(parts) <= at <= len(parts):
            raise ModelError(
                f"SequenceInsert {shown(node.name)}", expected=f"an index into {len(parts)} elements", got=at
            )
        parts.insert(at, node.input[1])
        self.sequences[node.output[0]] = parts

    def _erase(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        parts = list(self._sequence(node))
        at = self._position(node, 1) if len(node.input) > 1 and node.input[1] else -1
        if not -len(parts) <= at < len(parts):
            raise ModelError(
                f"SequenceErase {shown(node.name)}", expected=f"an index into {len(parts)} elements", got=at
            )
        del parts[at]
        self.sequences[node.output[0]] = parts

    def _length(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        self.nodes.append(
            helper.make_node("Identity", [self._constant(np.int64(len(self._sequence(node))))], [node.output[0]])
        )

    def _concat(self, node: onnx.NodeProto, attrs: dict[str, Any]) -> None:
        parts, axis = self._sequence(node), int(attrs.get("axis", 0))
        if attrs.get("new_axis", 0):
            parts = [self._unsqueezed(p, axis) for p in parts]
        self.nodes.append(helper.make_node("Concat", parts, [node.output[0]], axis=axis))

    def _unsqueezed(self, value: str, axis: int) -> str:
        name = self._name(value)
        if self.opset < 13:
            self.nodes.append(helper.make_node("Unsqueeze", [value], [name], axes=[axis]))
        else:
            axes = self._constant(np.array([axis], np.int64))
            self.nodes.append(helper.make_node("Unsqueeze", [value, axes], [name]))
        return name

    def _sequence(self, node: onnx.NodeProto) -> list[str]:
        if node.input[0] not in self.sequences:
            raise ModelError(f"{node.op_type} {shown(node.name)} reads a sequence of unknown length")
        return self.sequences[node.input[0]]

    def _position(self, node: onnx.NodeProto, index: int) -> int:
        found = self._number(node, index)
        if found is None or found.size != 1:
            raise ModelError(
                f"{node.op_type} {shown(node.name)} takes a computed position", expected="a constant position"
            )
        return int(found.reshape(-1)[0])

    def _number(self, node: onnx.NodeProto, index: int) -> Array | None:
        """The constant at an input, or None."""
        if len(node.input) <= index or not node.input[index]:
            return None
        tensor = self._tensors.get(node.input[index])
        if tensor is None:
            raise ModelError(f"{node.op_type} {shown(node.name)} takes computed numbers", expected="constant numbers")
        found = read_tensor(tensor)
        if found.dtype.kind not in "iu":
            raise ModelError(f"{node.op_type} {shown(node.name)}", expected="integers", got=found.dtype)
        return found

    def _size(self, value: str, axis: int) -> int | None:
        if self._shapes is None:
            self._shapes = inferred(self.model)
        shape = self._shapes.get(value)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def _constant(self, value: Any) -> str:
        name = self._name("place")
        tensor = numpy_helper.from_array(np.asarray(value), name)
        self.nodes.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    def _name(self, stem: str) -> str:
        return self._names.fresh(f"{stem}_0")


def inferred(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """Shapes as far as they are known without running anything."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if len(tensor.raw_data) > _LARGE:  # shape inference reads a tensor's values only if they are sizes
            tensor.ClearField("raw_data")
    try:
        graph = onnx.shape_inference.infer_shapes(bare).graph
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
        graph = model.graph
    out: dict[str, list[int | None]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            out[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return out
