"""Rewrites the nodes of an ONNX file: new names, stacked and split values, and values that don't depend on data."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.node_order import inner_graphs
from fedprune_export.importing.runtime_inference import runtime_values
from fedprune_export.ir import shape_inference
from fedprune_export.ir.composites import COMPOSITES
from fedprune_export.ir.graph import Array, Graph
from fedprune_export.ir.operators import SIZE_OPERATORS
from fedprune_export.ir.trace import TRACE_BATCHES

_MAX_STEPS = 200  # most operators that compute a length or condition
_MAX_SIZE_TENSOR_BYTES = 4096  # a larger tensor holds no sizes, so shape inference doesn't need its numbers


# Types of floats, as numbers of `onnx.TensorProto`.
FLOAT_TYPES = frozenset(
    {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16}
)


_NOTHING: Mapping[str, Array] = MappingProxyType({})


def operator_of(node: onnx.NodeProto) -> tuple[str, str]:
    """Domain and name of a node's operator; the standard's domain is empty."""
    return "" if node.domain == "ai.onnx" else node.domain, node.op_type


def write_out_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its local functions written out. Raises `ModelError` if onnx can't."""
    try:
        out: onnx.ModelProto = inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelError(
            f"the model's functions, branches and loops can't be written out ({error_reason(error)})",
            hint="Export it without them.",
        ) from error
    return out


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


class GraphWriter:
    """Replaces nodes of a model's graph; a subclass says what replaces each."""

    def __init__(self, model: onnx.ModelProto, opset: int) -> None:
        self._model, self._graph, self._opset = model, model.graph, opset
        self._makers = {o: i for i, n in enumerate(model.graph.node) for o in n.output if o}
        self._tensors = {t.name: t for t in model.graph.initializer}
        self._shapes: dict[str, list[int | None]] | None = None
        self._names = Names(model.graph)

    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """The nodes that replace a node."""
        raise NotImplementedError

    def write(self) -> None:
        """Replace all nodes."""
        nodes = [written for node in self._graph.node for written in self.rewrite_node(node)]
        del self._graph.node[:]
        self._graph.node.extend(nodes)

    def _maker(self, name: str) -> onnx.NodeProto | None:
        return self._graph.node[self._makers[name]] if name in self._makers else None

    def _constant(self, value: Array, name: str) -> onnx.NodeProto:
        name = self._names.fresh(name)
        return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))

    def _stack(self, elements: Sequence[str], axis: int, target: str) -> list[onnx.NodeProto]:
        """Stack values along a new axis."""
        rows = [self._names.fresh(f"{p}.row") for p in elements]
        out: list[onnx.NodeProto] = []
        for element, row in zip(elements, rows, strict=True):
            out += self._nodes_with_list("Unsqueeze", element, "axes", [axis], [row])
        return [*out, helper.make_node("Concat", rows, [target], axis=axis)]

    def _nodes_with_list(
        self, op: str, name: str, what: str, values: Sequence[int], outputs: Sequence[str], **attrs: Any
    ) -> list[onnx.NodeProto]:
        """A node that takes a list: an attribute until opset 12, then an input."""
        if self._opset < 13:
            return [helper.make_node(op, [name], outputs, **{**attrs, what: values})]
        listed = self._constant(np.array(values, np.int64), f"{outputs[0]}.{what}")
        return [listed, helper.make_node(op, [name, listed.output[0]], outputs, **attrs)]

    def _size(self, name: str, axis: int) -> int | None:
        shape = self._shape(name)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def _shape(self, name: str) -> list[int | None] | None:
        if self._shapes is None:
            self._shapes = file_shapes(self._model)
        return self._shapes.get(name)

    def _constant_value(self, name: str, known: Mapping[str, Array] = _NOTHING) -> Array | None:
        """A value that is computed only from constants, sizes and known values; None if it depends on data or on a free
        size."""
        nodes = self._computing_nodes(name, known) or []
        reads_sizes = any(node.op_type in SIZE_OPERATORS for node in nodes)
        try:
            trials = [self._value_at_size(name, size, known) for size in TRACE_BATCHES[: 1 + reads_sizes]]
        except ModelError:  # operators that make no sense, or a value that would be huge
            return None
        same = all(f is not None and trials[0] is not None and np.array_equal(f, trials[0]) for f in trials)
        return trials[0] if same else None

    def _value_at_size(self, name: str, free: int, known: Mapping[str, Array] = _NOTHING) -> Array | None:
        """The value if every free size of the file is `free`; None if it depends on data."""
        nodes = self._computing_nodes(name, known)
        if nodes is None:
            return None
        model = onnx.ModelProto(opset_import=self._model.opset_import)
        model.graph.node.extend(nodes)
        read = {name, *(i for node in nodes for i in node.input)}
        model.graph.initializer.extend(self._tensors[i] for i in read if i in self._tensors)
        graph, values = Graph.from_proto(model), shape_inference.InferredShapes()
        for key, value in {**graph.initializers, **{i: known[i] for i in read if i in known}}.items():
            shape_inference.set_value(values, key, value)
        for node in graph.nodes:
            if node.op in SIZE_OPERATORS and node.inputs[0] not in values.shapes:
                shape = self._shape(node.inputs[0])
                if shape is None:
                    return None
                values.shapes[node.inputs[0]] = tuple(free if d is None else d for d in shape)
                values.dtypes[node.inputs[0]] = np.dtype(np.float32)  # any type: only its size counts
            shape_inference.infer_node(graph, values, node, node.outputs)
        return values.numbers.get(name)

    def _computing_nodes(self, name: str, known: Mapping[str, Array]) -> list[onnx.NodeProto] | None:
        """The nodes that compute a value of sizes, constants and known values, in order; None if data is among them, or
        too many."""
        nodes: dict[int, onnx.NodeProto] = {}
        pending = [name]
        while pending:
            value = pending.pop()
            index = self._makers.get(value)
            if index is None:
                if value not in self._tensors and value not in known:
                    return None
            elif index not in nodes:
                if len(nodes) >= _MAX_STEPS:
                    return None
                node = nodes[index] = self._graph.node[index]
                pending += [] if node.op_type in SIZE_OPERATORS else [i for i in node.input if i]
        return [nodes[index] for index in sorted(nodes)]


def file_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """The shapes that onnx infers; None for sizes that are free."""
    out: dict[str, list[int | None]] = {}
    for value in _inferred_values(model):
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            out[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return out


def value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The types of values that onnx infers, as numbers of `onnx.TensorProto`."""
    return {v.name: v.type.tensor_type.elem_type for v in _inferred_values(model) if v.type.HasField("tensor_type")}


def _inferred_values(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs, inner values and outputs, with what onnx and onnxruntime infer of them."""
    # Inference serialises the model, which takes long with its weights, and fails from 2 GiB on.
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        # Shape inference reads a tensor's values only if they are sizes.
        if len(tensor.raw_data) > _MAX_SIZE_TENSOR_BYTES:
            tensor.ClearField("raw_data")
    for node in bare.graph.node:
        # onnx infers no shapes of these.
        if node.op_type in COMPOSITES and node.domain in ("", "ai.onnx"):
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
    try:
        graph = onnx.shape_inference.infer_shapes(bare).graph
    # onnx can fail on files that run; then only what the file states is known.
    except (RuntimeError, ValueError, onnx.shape_inference.InferenceError):
        graph = model.graph
    return [*graph.input, *runtime_values(model), *graph.value_info, *graph.output]
