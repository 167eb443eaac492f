"""Reads a quantised file: its constants, its types, and what quantisations mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from fedprune_export.importing.fused_operators import restore_early_norms
from fedprune_export.importing.graph_writer import file_shapes
from fedprune_export.importing.quantised.numbers import Quantisation, refuse
from fedprune_export.ir.graph import Array, Graph, Node


class QuantisedFile:
    """A quantised file.

    Attributes:
        file: Its graph; rules add what operators do inside to it, for the comparison.
        makers: The nodes of the graph, by the names of their outputs.
        proto: The file as it is.
    """

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.file = Graph.from_proto(proto)
        self.makers = self.file.producers()
        self._shapes: dict[str, list[int | None]] | None = None

    def write(self, graph: Graph) -> onnx.ModelProto:
        """A graph with everything else that the file has."""
        model = onnx.ModelProto()
        model.CopyFrom(self.proto)
        model.graph.CopyFrom(graph.to_unlowered_proto().graph)
        used = {"", "ai.onnx", *(n.domain for n in graph.nodes)}
        opsets = [o for o in self.proto.opset_import if o.domain in used]
        del model.opset_import[:]
        model.opset_import.extend(opsets)
        restore_early_norms(model)
        return model

    def constant(self, name: str) -> Array | None:
        """A tensor of the file, also behind Identity; None if the value is computed."""
        while (node := self.makers.get(name)) is not None and node.op == "Identity" and not node.domain:
            name = node.inputs[0]
        return self.file.initializers.get(name)

    def parameters(self, node: Node, start: int, axis: int = 1) -> Quantisation:
        """The quantisation that a node's inputs give: scale, and zero point."""
        scale = node.inputs[start] if len(node.inputs) > start else ""
        if not scale:
            raise refuse(node, "has no scale")
        values = self.constant(scale)
        if values is not None and (not values.size or not (np.isfinite(values) & (values > 0)).all()):
            raise refuse(node, "has a scale that is no positive number")
        return Quantisation(scale, node.inputs[start + 1] if len(node.inputs) > start + 1 else "", axis)

    def integer_type(self, node: Node, quantisation: Quantisation) -> np.dtype[Any]:
        """The type of the integers that a node writes."""
        zero = self.constant(quantisation.zero)
        if zero is not None:
            return zero.dtype
        if quantisation.zero:
            raise refuse(node, "rounds by a zero point that the file computes")
        kind = int(node.attrs.get("output_dtype", 0)) or onnx.TensorProto.UINT8
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind))

    def rank(self, name: str) -> int | None:
        """The number of axes of a value; None if it isn't known."""
        if self._shapes is None:
            self._shapes = file_shapes(self.proto)
        return len(self._shapes[name]) if name in self._shapes else None

    def canonical(self, quantisation: Quantisation) -> Quantisation:
        """A quantisation without an axis where it has one scale, so that all readers of a tensor share it."""
        scale = self.constant(quantisation.scale)
        has_axis = scale is not None and scale.size > 1
        return quantisation if has_axis else Quantisation(quantisation.scale, quantisation.zero)

    def is_equal(self, first: Quantisation, second: Quantisation) -> bool:
        """Whether two quantisations give integers the same meaning."""
        return self._same(first.scale, second.scale) and self._same(first.zero, second.zero)

    def _same(self, first: str, second: str) -> bool:
        if first == second:
            return True
        one, other = self.constant(first), self.constant(second)
        if (first and one is None) or (second and other is None):
            return False
        # A zero point that is left out is 0.
        left, right = (np.zeros(1) if v is None else np.asarray(v, np.float64).reshape(-1) for v in (one, other))
        return np.array_equal(left, right)

    def reader(self, name: str) -> Node:
        """The first node that reads a value."""
        return next(n for n in self.file.nodes if name in n.inputs)
