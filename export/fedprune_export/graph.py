"""An ONNX graph as plain Python: what every pass of the compiler reads and writes.

Values are known by name. Weights are *initialisers*; constants are initialisers too, and which of them are weights is
the importer's knowledge (`imported.Model`), not the graph's.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from fedprune.errors import ModelError, shown
from fedprune_export.target_opset import NORMAL_OPSET, at_opset

Array = npt.NDArray[Any]
Dim = int | str | None

TRAINING_OPSET = NORMAL_OPSET
"""The opset of graphs that train; every onnxruntime that fedprune supports loads it."""

_TYPES = frozenset(helper.get_all_tensor_dtypes())

_UNPRINTED = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Kinds of characters that names don't hold: controls, marks of direction, halves of characters, line ends."""

_IR_VERSIONS = {13: 7, 14: 7, 15: 8, 16: 8, 17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}


@dataclass
class Node:
    """One operator. Attributes are Python values: int, float, str, lists of these, or numpy arrays for tensors."""

    op: str
    inputs: list[str]
    outputs: list[str]
    attrs: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    domain: str = ""

    def read_inside(self) -> set[str]:
        """Names that the node's sub-graph reads, its own and those of the graph around it."""
        bodies = [v for v in self.attrs.values() if isinstance(v, onnx.GraphProto)]
        return {i for body in bodies for node in body.node for i in node.input}

    def to_proto(self) -> onnx.NodeProto:
        """As a node of an ONNX graph."""
        proto = helper.make_node(self.op, self.inputs, self.outputs, self.name or None, domain=self.domain)
        proto.attribute.extend(_attribute_proto(k, v) for k, v in sorted(self.attrs.items()))
        return proto


@dataclass
class Port:
    """An input or output of a graph: name, numpy type and shape (a name or None for a free dimension)."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Dim, ...]


@dataclass
class Graph:
    """Nodes in topological order with their inputs, outputs and constants; `metadata` is text by keys `fedprune.*`."""

    inputs: list[Port] = field(default_factory=list)
    outputs: list[Port] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    initializers: dict[str, Array] = field(default_factory=dict)
    opset: int = TRAINING_OPSET
    name: str = "fedprune"
    metadata: dict[str, str] = field(default_factory=dict)
    _counter: int = field(default=0, repr=False)
    _constants: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False)

    def fresh(self, stem: str) -> str:
        """A value name that nothing else in this graph has."""
        self._counter += 1
        return f"{stem}~{self._counter}"

    def emit(
        self,
        op: str,
        *inputs: str,
        attrs: Mapping[str, Any] | None = None,
        out: str | None = None,
        domain: str = "",
    ) -> str:
        """Append a node with one output and return the output's name."""
        output = out or self.fresh(op)
        self.nodes.append(Node(op, list(inputs), [output], dict(attrs or {}), output, domain))
        return output

    def emit_many(self, op: str, *inputs: str, outputs: int, attrs: Mapping[str, Any] | None = None) -> list[str]:
        """Append a node with several outputs and return their names."""
        names = [self.fresh(op) for _ in range(outputs)]
        self.nodes.append(Node(op, list(inputs), list(names), dict(attrs or {}), names[0]))
        return names

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> str:
        """The name of a constant with this value; equal constants share one."""
        array = np.array(value, dtype=dtype, order="C")
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            name = self.fresh("const")
            self.initializers[name] = array
            self._constants[key] = name
        return self._constants[key]

    def ints(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(list(values), np.int64)

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

    def prune(self) -> None:
        """Drop nodes and initialisers that no output needs."""
        needed = {p.name for p in self.outputs}
        kept: list[Node] = []
        for node in reversed(self.nodes):
            if needed.intersection(o for o in node.outputs if o):
                needed.update(i for i in node.inputs if i)
                needed.update(node.read_inside())
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = {k: v for k, v in self.initializers.items() if k in needed}
        self._constants = {k: v for k, v in self._constants.items() if v in self.initializers}

    def copy(self) -> Graph:
        """A copy whose nodes and lists can be changed; arrays are shared."""
        return Graph(
            [Port(p.name, p.dtype, p.shape) for p in self.inputs],
            [Port(p.name, p.dtype, p.shape) for p in self.outputs],
            [Node(n.op, list(n.inputs), list(n.outputs), dict(n.attrs), n.name, n.domain) for n in self.nodes],
            dict(self.initializers),
            self.opset,
            self.name,
            dict(self.metadata),
            self._counter,
            dict(self._constants),
        )

    def to_proto(self, *, opset: int | None = None) -> onnx.ModelProto:
        """As an ONNX model.

        Args:
            opset: What to write a normalised graph at; by default 17. Others can only be written as they are.

        Raises:
            ModelError: An operator has no form in that opset.
        """
        if self.opset == NORMAL_OPSET:
            return at_opset(self, NORMAL_OPSET if opset is None else opset)._proto()
        if opset not in (None, self.opset):
            raise ModelError("only normalised graphs can be written at another opset", expected=self.opset, got=opset)
        return self._proto()

    def _proto(self) -> onnx.ModelProto:
        domains = sorted({n.domain for n in self.nodes if n.domain})
        graph = helper.make_graph(
            [n.to_proto() for n in self.nodes],
            self.name,
            [_port_proto(p) for p in self.inputs],
            [_port_proto(p) for p in self.outputs],
            [numpy_helper.from_array(v, k) for k, v in self.initializers.items()],
        )
        model = helper.make_model(
            graph,
            opset_imports=[
                helper.make_opsetid("", self.opset),
                *(helper.make_opsetid(d, 1) for d in domains),
            ],
            ir_version=_IR_VERSIONS.get(self.opset, 8),
            producer_name="fedprune",
        )
        helper.set_model_props(model, dict(sorted(self.metadata.items())))
        return model

    def to_bytes(self, *, opset: int | None = None) -> bytes:
        """As the bytes of an ONNX file; the same graph gives the same bytes. See `to_proto`."""
        raw: bytes = self.to_proto(opset=opset).SerializeToString(deterministic=True)
        return raw

    @classmethod
    def from_proto(cls, model: onnx.ModelProto) -> Graph:
        """Read an ONNX model; `Constant` nodes become initialisers.

        Raises:
            ModelError: The model has local functions, sub-graphs or sparse tensors.
        """
        if model.functions:
            raise ModelError("the model has local functions", hint="Export it without them (inline functions).")
        proto = model.graph
        if proto.sparse_initializer:
            raise ModelError("the model has sparse tensors", hint="Export it with dense weights.")
        _check_text(proto)
        opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
        initializers = {t.name: read_tensor(t) for t in proto.initializer}
        nodes: list[Node] = []
        for n in proto.node:
            attrs = {a.name: _attribute(n, a) for a in n.attribute}
            domain = "" if n.domain == "ai.onnx" else n.domain
            if n.op_type == "Constant" and not domain:
                initializers[n.output[0]] = _constant_value(attrs)
            else:
                nodes.append(Node(n.op_type, list(n.input), list(n.output), attrs, n.name, domain))
        graph = cls(
            [_port(p) for p in proto.input if p.name not in initializers],
            [_port(p) for p in proto.output],
            nodes,
            initializers,
            opset,
            proto.name or "model",
            {p.key: p.value for p in model.metadata_props if p.key.startswith("fedprune.")},
        )
        taken: Iterable[str] = [
            *initializers,
            *(o for n in nodes for o in n.outputs),
            *(p.name for p in graph.inputs),
        ]
        tails = [t.rsplit("~", 1)[1] for t in taken if "~" in t]
        # Only short numbers count: a name of a thousand digits is nothing that `fresh` could ever come to.
        graph._counter = max([int(t) for t in tails if re.fullmatch("[0-9]{1,9}", t)], default=0)
        return graph


def _check_text(graph: onnx.GraphProto) -> None:
    """Make sure that all names are text that can be printed; protobuf hands on what isn't text as bytes."""
    texts: list[object] = [graph.name, *(t.name for t in graph.initializer)]
    for n in graph.node:
        texts += [n.name, n.op_type, n.domain, *n.input, *n.output, *(a.name for a in n.attribute)]
    for value in (*graph.input, *graph.output):
        texts += [value.name, *(d.dim_param for d in value.type.tensor_type.shape.dim)]
    odd = next((t for t in texts if not isinstance(t, str)), None)
    if odd is not None:
        raise ModelError("a name in the model is not UTF-8 text", got=shown(odd))
    for text in texts:
        check_name(str(text))


def check_name(name: str) -> None:
    """Make sure that a name holds nothing that would steer a terminal or break a line.

    Raises:
        ModelError: It does.
    """
    if not name.isprintable() and any(unicodedata.category(c) in _UNPRINTED for c in name):
        raise ModelError(
            "a name in the model holds characters that can't be printed", got=shown(name), hint="Rename it."
        )


def read_tensor(tensor: onnx.TensorProto) -> Array:
    """The numbers of a tensor.

    Raises:
        ModelError: They lie in another file, are of no known type, or are more or fewer than its shape says.
    """
    name = shown(tensor.name)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ModelError(f"tensor {name} lies in another file", hint="Load the model with its external data.")
    try:
        return np.array(numpy_helper.to_array(tensor), order="C")  # 0-d stays 0-d, unlike ascontiguousarray
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else "its type is unknown"
        raise ModelError(f"tensor {name} can't be read ({str(reason)[:200]})") from error


def _attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> Any:
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise ModelError(
            f"node {shown(node.name or node.op_type)} has a sub-graph ({node.op_type})",
            hint="Control flow can't be cut or trained; export the model without If, Loop and Scan.",
        )
    try:
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            return read_tensor(value)
        if isinstance(value, bytes):
            return value.decode()
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [v.decode() if isinstance(v, bytes) else v for v in value]
    except ValueError as error:  # of no known type, or text that isn't UTF-8
        raise ModelError(f"attribute {shown(attribute.name)} of {shown(node.op_type)} can't be read") from error
    return value


def _constant_value(attrs: Mapping[str, Any]) -> Array:
    for key, dtype in (
        ("value_int", np.int64),
        ("value_ints", np.int64),
        ("value_float", np.float32),
        ("value_floats", np.float32),
    ):
        if key in attrs:
            return np.array(attrs[key], dtype)
    if "value" in attrs:
        return np.asarray(attrs["value"])
    raise ModelError("a Constant node holds neither numbers nor a tensor", got=", ".join(attrs))


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or tensor.elem_type not in _TYPES:
        raise ModelError(
            f"{shown(value.name)} is not a tensor of a known type",
            hint="Sequences, maps and optionals are not supported.",
        )
    dims: list[Dim] = [d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim]
    return Port(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), tuple(dims))


def _port_proto(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, helper.np_dtype_to_tensor_dtype(port.dtype), list(port.shape))


def _attribute_proto(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, np.ndarray):
        value = numpy_helper.from_array(value)
    kind = onnx.AttributeProto.INTS if isinstance(value, list) and not value else None
    return helper.make_attribute(name, value, attr_type=kind)
