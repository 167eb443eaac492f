"""Writes the nodes of an ONNX file anew, one by one, and infers shapes and numbers that don't depend on data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.ir.graph import Array, Graph, read_opset
from fedprune_export.ir.shape_inference import InferredShapes, infer_node, set_value
from fedprune_export.ir.trace import TRACE_BATCHES


def operator_of(node: onnx.NodeProto) -> tuple[str, str]:
    """Domain and name of a node's operator; the standard's domain is empty."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


class Names:
    """The names of all values of a graph, and of graphs within."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._taken = set(names_within(graph))
        self._next = dict[str, int]()

    def fresh(self, name: str) -> str:
        """Reserve a name: this one, or with a number appended if it is in use."""
        unique, number = name, self._next.get(name, 0)
        while unique in self._taken:
            number += 1
            unique = f"{name}_{number}"
        self._next[name] = number
        self._taken.add(unique)
        return unique


def names_within(graph: onnx.GraphProto) -> Iterator[str]:
    """All names of values in a graph, and in graphs within it."""
    for values in (graph.input, graph.output, graph.initializer):
        yield from (value.name for value in values)
    for node in graph.node:
        yield from node.input
        yield from node.output
        for inner in inner_graphs(node):
            yield from names_within(inner)


class NodeWriter:
    """The nodes that take the place of a model's own.

    They are inferred at two sizes of the file's free axes: a value that is the same number at both depends neither on
    data nor on a free size.

    Attributes:
        nodes: What is written so far.
        names: The names that are in use.
        model: The model, of whose nodes only the written ones count.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.names = Names(model.graph)
        self.model, self._opset = onnx.ModelProto(), read_opset(model)
        self.model.CopyFrom(model)
        del self.model.graph.node[:]
        self._inferred = [InferredShapes() for _ in TRACE_BATCHES]
        self._pending = onnx.ModelProto()  # what isn't inferred yet
        self._pending.CopyFrom(self.model)
        del self._pending.graph.output[:]

    def written_model(self) -> onnx.ModelProto:
        self.model.graph.node.extend(self.nodes)
        return self.model

    # -- nodes ---------------------------------------------------------------------------------------------------------

    def add(self, node: onnx.NodeProto) -> None:
        self.nodes.append(node)
        if not any(inner_graphs(node)):
            self._pending.graph.node.append(node)

    def add_tensor(self, tensor: onnx.TensorProto, name: str) -> None:
        stored = self.model.graph.initializer.add()
        stored.CopyFrom(tensor)
        stored.name = name
        self._pending.graph.initializer.append(stored)

    def emit(self, op: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> None:
        self.add(helper.make_node(op, inputs, outputs, **attrs))

    def emit_constant(self, value: Array, name: str) -> str:
        name = self.names.fresh(name)
        self.emit("Constant", [], [name], value=numpy_helper.from_array(value, name))
        return name

    def emit_with_list(
        self, op: str, name: str, what: str, values: Sequence[int], outputs: Sequence[str], **attrs: Any
    ) -> None:
        """Emit a node that takes a list: an attribute until opset 12, then an input."""
        inputs = [name]
        if self._opset < 13:
            attrs[what] = values
        else:
            inputs.append(self.emit_constant(np.array(values, np.int64), f"{outputs[0]}.{what}"))
        self.emit(op, inputs, outputs, **attrs)

    # -- shapes and numbers --------------------------------------------------------------------------------------------

    def inferences(self) -> Sequence[InferredShapes]:
        """Shapes, types and small numbers of what is written so far, at each of the two sizes."""
        graph = Graph.from_proto(self._pending)
        for size, inferred in zip(TRACE_BATCHES, self._inferred, strict=True):
            for port in graph.inputs:
                inferred.shapes[port.name] = tuple(d if isinstance(d, int) else size for d in port.shape)
                inferred.dtypes[port.name] = port.dtype
            for name, value in graph.initializers.items():
                set_value(inferred, name, value)
            for node in graph.nodes:
                # Operators that make no sense, and values that would be huge, are refused later.
                with suppress(ModelError):
                    infer_node(graph, inferred, node, [o for o in node.outputs if o])
        self._pending = onnx.ModelProto(opset_import=self.model.opset_import)
        return self._inferred

    def value(self, name: str) -> Array | None:
        """A value that is computed only from constants and sizes; None if it depends on data or on a free size."""
        first, second = (inferred.numbers.get(name) for inferred in self.inferences())
        return first if first is not None and second is not None and np.array_equal(first, second) else None

    def number(self, name: str) -> int | None:
        """A constant condition or whole number; None if it is left out, computed or something else."""
        value = self.value(name) if name else None
        return None if value is None or value.size != 1 or value.dtype.kind not in "biu" else int(value.reshape(-1)[0])

    def size(self, name: str, axis: int) -> int | None:
        """The size of an axis; None if it is free or unknown."""
        shapes = [inferred.shapes.get(name, ()) for inferred in self.inferences()]
        sizes = {shape[axis] if -len(shape) <= axis < len(shape) else None for shape in shapes}
        return sizes.pop() if len(sizes) == 1 else None
