"""An ONNX graph as plain Python: what every pass of the compiler reads and writes, read from files and written to them.

What a graph holds is a `drafts.Draft`; this adds the file.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, value_text
from fedprune_export.ir.drafts import NORMAL_OPSET, Array, Dim, Draft, Node, Port
from fedprune_export.ir.opset_lowering import lower_to_opset

__all__ = ["NORMAL_OPSET", "Array", "Dim", "Graph", "Node", "Port", "check_name", "read_dims", "read_tensor"]

_Kind = TypeVar("_Kind")

_TYPES = frozenset(helper.get_all_tensor_dtypes())

# Unicode categories that names must not have, because they would steer a terminal or break a line: control and
# format characters, surrogates, line and paragraph separators.
_UNPRINTABLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


class Graph(Draft):
    """A graph that files are read into and written from, at any opset."""

    def to_proto(self, *, opset: int | None = None) -> onnx.ModelProto:
        """As an ONNX model. Raises `ModelError` if an operator has no form in that opset.

        Args:
            opset: What to write a normalised graph at; by default 17. Others can only be written as they are.
        """
        if self.opset == NORMAL_OPSET:
            return lower_to_opset(self, NORMAL_OPSET if opset is None else opset).to_unlowered_proto()
        if opset not in (None, self.opset):
            raise ModelError("only normalised graphs can be written at another opset", expected=self.opset, got=opset)
        return self.to_unlowered_proto()

    def to_bytes(self, *, opset: int | None = None) -> bytes:
        """As the bytes of an ONNX file; the same graph gives the same bytes. See `to_proto`."""
        raw: bytes = self.to_proto(opset=opset).SerializeToString(deterministic=True)
        return raw

    @classmethod
    def from_proto(cls, model: onnx.ModelProto) -> Graph:
        """Read an ONNX model; `Constant` nodes become initialisers.

        Raises `ModelError` if the model has local functions, sub-graphs or sparse tensors.
        """
        # The importer inlines functions and branches first, so what is left here can't be handled.
        if model.functions:
            raise ModelError("the model has local functions", hint="Export it without them (inline functions).")
        proto = model.graph
        if proto.sparse_initializer:
            name = value_text(proto.sparse_initializer[0].values.name)
            raise ModelError(f"tensor {name} is sparse", expected="dense tensors", hint=_DENSE_HINT)
        _check_names(proto)
        opset = read_opset(model)
        initializers = {t.name: read_tensor(t) for t in proto.initializer}
        nodes: list[Node] = []
        for n in proto.node:
            attrs = {a.name: _attribute_value(n, a) for a in n.attribute}
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
            domains={o.domain: int(o.version) for o in model.opset_import if o.domain not in ("", "ai.onnx")},
        )
        used_names: Iterable[str] = [
            *initializers,
            *(o for n in nodes for o in n.outputs),
            *(p.name for p in graph.inputs),
        ]
        counters = [t.rsplit("~", 1)[1] for t in used_names if "~" in t]
        # Only short numbers count: a name of a thousand digits is nothing that `fresh` could ever come to.
        graph._counter = max([int(t) for t in counters if re.fullmatch("[0-9]{1,9}", t)], default=0)
        return graph


def _check_names(graph: onnx.GraphProto) -> None:
    """Make sure that all names can be printed. protobuf returns names that aren't UTF-8 as bytes."""
    texts: list[object] = [graph.name, *(t.name for t in graph.initializer)]
    for n in graph.node:
        texts += [n.name, n.op_type, n.domain, *n.input, *n.output, *(a.name for a in n.attribute)]
    for value in (*graph.input, *graph.output):
        texts += [value.name, *(d.dim_param for d in value.type.tensor_type.shape.dim)]
    not_text = next((t for t in texts if not isinstance(t, str)), None)
    if not_text is not None:
        raise ModelError("a name in the model is not UTF-8 text", got=value_text(not_text))
    for text in texts:
        check_name(str(text))


def check_name(name: str) -> None:
    """Make sure that a name holds nothing that would steer a terminal or break a line.

    Raises `ModelError` if it does.
    """
    if not name.isprintable() and any(unicodedata.category(c) in _UNPRINTABLE_CATEGORIES for c in name):
        raise ModelError(
            "a name in the model holds characters that can't be printed", got=value_text(name), hint="Rename it."
        )


def read_tensor(tensor: onnx.TensorProto) -> Array:
    """The numbers of a tensor.

    Raises `ModelError` if they are in another file, of an unknown type, or more or fewer than its shape has.
    """
    name = value_text(tensor.name)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raise ModelError(f"tensor {name} is in another file", hint="Load the model with its external data.")
    try:
        return np.array(numpy_helper.to_array(tensor), order="C")  # 0-d stays 0-d, unlike ascontiguousarray
    except (KeyError, TypeError, ValueError) as error:
        reason = error if isinstance(error, ValueError) else "its type is unknown"
        raise ModelError(f"tensor {name} can't be read ({str(reason)[:200]})") from error


def _attribute_value(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> Any:
    if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS):
        raise ModelError(
            f"node {value_text(node.name or node.op_type)} has a sub-graph ({node.op_type})",
            hint="Export it without Scan and control flow that depends on data, or give its torch module itself.",
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
        raise ModelError(
            f"attribute {value_text(attribute.name)} of {value_text(node.op_type)} can't be read"
        ) from error
    return value


# A Constant may have its numbers in one of several attributes.
_CONSTANT_TYPES: dict[str, type[Any] | None] = {"value": None, "value_int": np.int64, "value_ints": np.int64}
_CONSTANT_TYPES |= {"value_float": np.float32, "value_floats": np.float32}
_DENSE_HINT = "Export it with its weights as tensors that hold all numbers, also zeros."


def _constant_value(attrs: Mapping[str, Any]) -> Array:
    for key, dtype in _CONSTANT_TYPES.items():
        if key in attrs:
            return np.asarray(attrs[key], dtype)
    raise ModelError("a Constant node holds neither numbers nor a dense tensor", got=", ".join(attrs), hint=_DENSE_HINT)


def _port(value: onnx.ValueInfoProto) -> Port:
    tensor = value.type.tensor_type
    # ZipMap's output, of which a prediction head takes the numbers.
    if value.type.sequence_type.elem_type.HasField("map_type"):
        return Port(value.name, np.dtype(np.float32), (None, None))
    if not value.type.HasField("tensor_type") or tensor.elem_type not in _TYPES:
        raise ModelError(
            f"{value_text(value.name)} is not a tensor of a known type",
            hint="Sequences, maps and optionals are not supported.",
        )
    return Port(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)), read_dims(value))


def read_opset(model: onnx.ModelProto) -> int:
    """The opset of the standard's operators in a file; 0 without one."""
    return next((int(o.version) for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def read_dims(value: onnx.ValueInfoProto) -> tuple[Dim, ...]:
    """The dimensions of a file's input or output: a name or None where they are free. Some exporters write these as 0
    or -1."""
    dims = value.type.tensor_type.shape.dim
    return tuple(
        d.dim_value if d.HasField("dim_value") and d.dim_value not in (0, -1) else (d.dim_param or None) for d in dims
    )


def decode_metadata(texts: Mapping[str, str], key: str, kind: type[_Kind], expected: str) -> _Kind | None:
    """Decode a text as JSON of a type; None without it.

    Raises `ModelError` if it is something else, or holds what can't be printed.
    """
    if key not in texts:
        return None
    try:
        value = msgspec.json.decode(texts[key], type=kind)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ModelError(f"metadata {key}", expected=expected, got=value_text(texts[key])) from error
    _check_printable(value)
    return value


def _check_printable(value: object) -> None:
    if isinstance(value, str):
        check_name(value)
    elif isinstance(value, (dict, list, tuple)):
        for item in (*value, *(value.values() if isinstance(value, dict) else ())):
            _check_printable(item)


def node_label(node: Node) -> str:
    """A node in messages."""
    return f"{node.op} {value_text(node.name or node.outputs[0])}"
