"""Nodes, inputs, outputs and constants of a graph, and methods that add to them.

Values are identified by name. Weights and constants are both *initialisers*; the importer records which of them are
weights (`pruning.model.Model`). Drafts are a base class of their own because the rules that write a graph at an opset
work on them, and `Graph` imports these rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fedprune.planning.probe_report import CPU
from fedprune_export.ir.operators import SIZE_OPERATORS

Array = npt.NDArray[Any]
Dim = int | str | None

# The opset of normalised graphs and of graphs that train; every onnxruntime that fedprune supports loads it.
NORMAL_OPSET = 17

# The IR version that was released with each opset: an onnxruntime refuses files with a later one than its own.
_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}

_Draft = TypeVar("_Draft", bound="Draft")


@dataclass
class Node:
    """One operator. Attributes are Python values: int, float, str, lists of these, or numpy arrays for tensors."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""

    def copy(self) -> Node:
        """A copy whose lists can be changed."""
        inputs, outputs, attrs = list(self.inputs), list(self.outputs), dict(self.attrs)
        return Node(self.op, inputs, outputs, attrs, self.name, self.domain)

    @property
    def bodies(self) -> list[onnx.GraphProto]:
        """The node's sub-graphs: a loop has one."""
        return [v for v in self.attrs.values() if isinstance(v, onnx.GraphProto)]

    def to_proto(self) -> onnx.NodeProto:
        """As a node of an ONNX graph."""
        proto = onnx.NodeProto()
        self.write(proto)
        return proto

    def write(self, proto: onnx.NodeProto) -> None:
        """Fill in an empty node of an ONNX graph. Copying finished nodes into it would take most of the time."""
        proto.op_type, proto.domain = self.op, self.domain
        proto.input.extend(self.inputs)
        proto.output.extend(self.outputs)
        if self.name:
            proto.name = self.name
        for name, value in sorted(self.attrs.items()):
            _write_attribute(proto.attribute.add(), name, value)


@dataclass
class Port:
    """An input or output of a graph: name, numpy type and shape (a name or None for a free dimension)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]


@dataclass
class Draft:
    """Nodes in topological order with their inputs, outputs and constants; `metadata` is text by keys `fedprune.*`.

    `unit` is the processor whose kernels the graph is written for, one of `UNITS`; `domains` are the versions of
    operators that aren't the standard's, by their domain (1 if it is left out).
    """

    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Array] = field(default_factory=dict)
    opset: int = NORMAL_OPSET
    name: str = "fedprune"
    metadata: dict[str, str] = field(default_factory=dict)
    unit: str = CPU
    domains: dict[str, int] = field(default_factory=dict)
    _counter: int = field(default=0, repr=False)
    _constants: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False)

    def add_input(self, name: str, shape: tuple[Dim, ...] = (), dtype: npt.DTypeLike = np.float32) -> None:
        """Append an input; its shape has names for free dimensions."""
        self.inputs.append(Port(name, np.dtype(dtype), shape))

    def add_output(self, name: str, shape: tuple[Dim, ...] = (), dtype: npt.DTypeLike = np.float32) -> None:
        """Append an output; its shape has names for free dimensions."""
        self.outputs.append(Port(name, np.dtype(dtype), shape))

    def fresh(self, stem: str) -> str:
        """A new name for a value, which nothing else in this graph has."""
        self._counter += 1
        return f"{stem}~{self._counter}"

    def emit(
        self, op: str, *inputs: str, attrs: Mapping[str, Any] | None = None, out: str | None = None, domain: str = ""
    ) -> str:
        """Append a node with one output and return the output's name."""
        output = out or self.fresh(op)
        self.nodes.append(Node(op, list(inputs), [output], dict(attrs or {}), output, domain))
        return output

    def emit_many(
        self, op: str, *inputs: str, outputs: int, attrs: Mapping[str, Any] | None = None, domain: str = ""
    ) -> list[str]:
        """Append a node with several outputs and return their names."""
        names = [self.fresh(op) for _ in range(outputs)]
        self.nodes.append(Node(op, list(inputs), list(names), dict(attrs or {}), names[0], domain))
        return names

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """The name of a constant with this value; equal constants share one."""
        array = np.array(value, dtype=dtype, order="C")
        # Equal bytes, not equal numbers: 0.0 and −0.0 are two constants.
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("const")
            self.initializers[name] = array
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        if values not in self._constants:
            self._constants[values] = self.constant(list(values), np.int64)
        return self._constants[values]

    def scalar(self, value: float) -> str:
        """A constant float32 of shape []."""
        return self.constant(value, np.float32)

    def producers(self) -> dict[str, Node]:
        """Which node makes each value."""
        return {o: n for n in self.nodes for o in n.outputs if o}

    def consumers(self) -> dict[str, list[tuple[Node, int]]]:
        """Which nodes read each value, and at which input."""
        out: dict[str, list[tuple[Node, int]]] = {}
        for node in self.nodes:
            for i, name in enumerate(node.inputs):
                if name:
                    out.setdefault(name, []).append((node, i))
        return out

    def values_from_inputs(self, *weights: str) -> set[str]:
        """The inputs, these tensors, and all values that depend on their numbers; their sizes alone don't count."""
        out = {*weights, *(p.name for p in self.inputs)}
        for node in self.nodes:
            if not out.isdisjoint(node.inputs) and (node.domain or node.op not in SIZE_OPERATORS):
                out.update(o for o in node.outputs if o)
        return out

    def rewrite(self, rules: Mapping[str, Callable[..., None]], *known: object, domain: str = "") -> None:
        """Let rules, by operator, emit what takes the place of a domain's nodes; `known` is what they read besides."""
        nodes, self.nodes = self.nodes, []
        for node in nodes:
            if node.domain == domain and node.op in rules:
                rules[node.op](self, node, *known)
            else:
                self.nodes.append(node)

    def rename(self, names: Mapping[str, str]) -> None:
        """Call values of nodes and initialisers by other names; ports keep theirs."""
        self.initializers = {names.get(k, k): v for k, v in self.initializers.items()}
        for node in self.nodes:
            node.inputs = [names.get(i, i) for i in node.inputs]
            node.outputs = [names.get(o, o) for o in node.outputs]

    def prune(self) -> None:
        """Drop nodes and initialisers that no output needs."""
        needed = {p.name for p in self.outputs}
        needed_nodes: list[Node] = []
        for node in reversed(self.nodes):
            if not needed.isdisjoint(node.outputs):
                # A loop's body reads values of this graph without listing them as inputs.
                needed.update(node.inputs, *(n.input for body in node.bodies for n in body.node))
                needed.discard("")
                needed_nodes.append(node)
        self.nodes = needed_nodes[::-1]
        self.initializers = {k: v for k, v in self.initializers.items() if k in needed}
        self._constants = {k: v for k, v in self._constants.items() if v in self.initializers}

    def copy(self: _Draft) -> _Draft:
        """A copy whose nodes and lists can be changed; arrays are shared."""
        copied = self.copy_without_nodes()
        copied.nodes = [n.copy() for n in self.nodes]
        return copied

    def copy_without_nodes(self: _Draft) -> _Draft:
        """A copy without the nodes. Names that it gives to new values differ from those of the nodes."""
        return type(self)(
            [Port(p.name, p.dtype, p.shape) for p in self.inputs],
            [Port(p.name, p.dtype, p.shape) for p in self.outputs],
            [],
            dict(self.initializers),
            self.opset,
            self.name,
            dict(self.metadata),
            self.unit,
            dict(self.domains),
            self._counter,
            dict(self._constants),
        )

    def to_unlowered_proto(self) -> onnx.ModelProto:
        """As an ONNX model with its operators unchanged, whether its opset has them or not."""
        domains = sorted({n.domain for n in self.nodes if n.domain})
        graph = helper.make_graph(
            [],
            self.name,
            [_port_proto(p) for p in self.inputs],
            [_port_proto(p) for p in self.outputs],
            [numpy_helper.from_array(v, k) for k, v in self.initializers.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", self.opset),
                *(helper.make_opsetid(d, self.domains.get(d, 1)) for d in domains),
            ],
            ir_version=_IR_VERSIONS.get(self.opset, 8),
            producer_name="fedprune",
        )
        # make_graph would copy every node once more.
        for node in self.nodes:
            node.write(model.graph.node.add())
        helper.set_model_props(model, dict(sorted(self.metadata.items())))
        return model


def _port_proto(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(port.dtype), list(port.shape))


def _write_attribute(proto: onnx.AttributeProto, name: str, value: Any) -> None:
    # Nearly all are integers, and make_attribute takes its time to find that out.
    if type(value) is int:
        proto.name, proto.i, proto.type = name, value, onnx.AttributeProto.INT
    elif type(value) is list and all(type(v) is int for v in value):
        proto.name, proto.type = name, onnx.AttributeProto.INTS
        proto.ints.extend(value)
    else:
        tensor = numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        proto.CopyFrom(helper.make_attribute(name, tensor))
