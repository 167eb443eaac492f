"""Shapes of all values of a graph at one batch size, without running it.

onnx infers the shapes of each operator; small values from which shapes are computed are computed as well. A file
can't make the process allocate what it claims, because each shape is checked before a value of that shape is made.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from fedprune.core.errors import ModelError, error_reason, value_text
from fedprune_export.ir.graph import Array, Graph, Node
from fedprune_export.ir.opset_lowering import NATIVE_SINCE

_MAX_COMPUTED_ELEMENTS = 1024  # numbers of a value that is computed; shape arithmetic has a handful

MAX_ELEMENTS = 2**28  # numbers of one value, and of all values that are needed at the same time: 1 GiB of float32
_SMALLER_HINT = (
    "Where the file leaves sizes free, give smaller ones with --input-shape (input_shape); otherwise export it for "
    "smaller samples."
)

MAX_MACS = 2**40  # MACs of one sample: the largest image networks take a fifth of it

# Operators whose arguments give the size of their output.
_SIZED_BY_ARGUMENTS = frozenset({"ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"})


@dataclass
class InferredShapes:
    """The shapes, types and small numbers of a graph's values at one batch size.

    Attributes:
        shapes: Shapes by name; values of which onnx can't tell the shape are missing.
        numbers: Values that don't depend on data, as long as they are small.
        missing: Values whose shape isn't known, in the graph's order.
    """

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, np.dtype[Any]] = field(default_factory=dict)
    numbers: dict[str, Array] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


class ShapeError(ModelError):
    """Shapes that don't fit an operator."""


def infer(graph: Graph, batch: int, measured: Mapping[str, Array] | None = None) -> InferredShapes:
    """The shapes of all values.

    Raises `ModelError` if an operator is in a form that onnx doesn't allow, or a value would be huge. `measured`:
    values that were computed at this batch size, where their shapes can't be told otherwise.
    """
    out = InferredShapes()
    for port in graph.inputs:
        out.shapes[port.name] = (batch, *(int(d) for d in port.shape[1:] if isinstance(d, int)))
        out.dtypes[port.name] = port.dtype
    for name, value in graph.initializers.items():
        set_value(out, name, value)
    for name, value in (measured or {}).items():
        set_value(out, name, value)
    for node in graph.nodes:
        outputs = [o for o in node.outputs if o and o not in out.shapes]
        if outputs:
            infer_node(graph, out, node, outputs)
    _check_memory(graph, out)
    work = sum(_macs(n, out) for n in graph.nodes if not n.domain) // max(batch, 1)
    if work > MAX_MACS:
        raise ModelError("MACs for one sample", expected=f"at most {MAX_MACS}", got=work)
    return out


def set_value(out: InferredShapes, name: str, value: Array) -> None:
    """Record a value: its shape and type, and its numbers if they are few."""
    out.shapes[name], out.dtypes[name] = value.shape, value.dtype
    if value.size <= _MAX_COMPUTED_ELEMENTS:
        out.numbers[name] = value


def infer_node(graph: Graph, out: InferredShapes, node: Node, outputs: Sequence[str]) -> None:
    """Add the shapes of a node's outputs, and their numbers where these are few."""
    reads = [i for i in node.inputs if i]
    if node.op == "GroupNormalization" and not node.domain and node.inputs[0] in out.shapes:
        # onnx infers no shape of it.
        inferred = {outputs[0]: (out.shapes[node.inputs[0]], out.dtypes[node.inputs[0]])}
    elif all(i in out.shapes for i in reads) and (not node.domain or node.op == "Constant"):
        inferred = _onnx_shapes(graph, out, node)
    else:
        inferred = {}
    for name in outputs:
        if name not in inferred:
            if node.op in _SIZED_BY_ARGUMENTS and not node.domain:
                raise ModelError(
                    f"the size of {node.op} {value_text(node.name)} can't be inferred without running it",
                    hint="Export the model with sizes that follow from the input's.",
                )
            out.missing.append(name)
            continue
        out.shapes[name], out.dtypes[name] = inferred[name]
        if math.prod(out.shapes[name]) > MAX_ELEMENTS:
            raise ModelError(
                f"{node.op} {value_text(node.name)} makes a value of {out.shapes[name]}"[:300],
                expected=f"at most {MAX_ELEMENTS} numbers",
                hint=_SMALLER_HINT,
            )
    few = all(name in inferred and math.prod(inferred[name][0]) <= _MAX_COMPUTED_ELEMENTS for name in outputs)
    # The numbers of a Shape or Size follow from the shape of its input.
    if (few and all(i in out.numbers for i in reads)) or (node.op in ("Shape", "Size") and few and not node.domain):
        for name, value in _output_values(graph, out, node).items():
            if value.shape == out.shapes.get(name):
                out.numbers[name] = value.astype(out.dtypes[name], copy=False)


# onnx knows a composite only from the opset that introduced it, and infers no shapes of the older forms of these.
_INFERRED_SINCE = {**NATIVE_SINCE, "GreaterOrEqual": 16, "LessOrEqual": 16}

_TypedShapes = dict[str, tuple[tuple[int, ...], "np.dtype[Any]"]]


# What onnx has inferred of an operator. Layers repeat, and a graph is inferred again and again while it is imported.
_INFERRED: dict[object, tuple[tuple[tuple[int, ...], np.dtype[Any]] | None, ...]] = {}
_MAX_INFERRED, _MAX_KEY_BYTES = 20_000, 64


def _onnx_shapes(graph: Graph, out: InferredShapes, node: Node) -> _TypedShapes:
    """Shapes and types of outputs, as far as onnx can infer them."""
    opset = max(graph.opset, _INFERRED_SINCE.get(node.op, 0))
    reads = list(dict.fromkeys(i for i in node.inputs if i))
    kinds = [(out.shapes[i], out.dtypes[i], _digest(out.numbers[i]) if i in out.numbers else b"") for i in reads]
    places = [reads.index(i) if i else None for i in node.inputs]
    attrs = sorted((k, repr((v.shape, _digest(v)) if isinstance(v, np.ndarray) else v)) for k, v in node.attrs.items())
    key = (node.op, node.domain, opset, *kinds, *places, *map(bool, node.outputs), *attrs)
    inferred = _INFERRED.get(key)
    if inferred is None:
        by_name = _inferred_by_onnx(out, node, opset)
        if len(_INFERRED) >= _MAX_INFERRED:
            _INFERRED.clear()
        inferred = _INFERRED[key] = tuple(by_name.get(name) for name in node.outputs)
    return {name: kind for name, kind in zip(node.outputs, inferred, strict=True) if kind is not None}


def _digest(value: Array) -> bytes:
    """An array's numbers, of many a digest."""
    raw = value.tobytes()
    return raw if len(raw) <= _MAX_KEY_BYTES else hashlib.blake2b(raw).digest()


def _inferred_by_onnx(out: InferredShapes, node: Node, opset: int) -> _TypedShapes:
    try:
        schema = onnx.defs.get_schema(node.op, opset, node.domain)
    except onnx.defs.SchemaError:
        return {}
    reads = dict.fromkeys(i for i in node.inputs if i)
    types = {
        i: helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(out.dtypes[i]), out.shapes[i]) for i in reads
    }
    # Shape inference needs the numbers of targets, axes and repeats.
    data = {i: numpy_helper.from_array(out.numbers[i], i) for i in reads if i in out.numbers}
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            schema, node.to_proto(), types, data, opset_imports=[helper.make_opsetid("", opset)], ir_version=8
        )
    except Exception as error:
        raise ShapeError(
            f"operator {node.op} {value_text(node.name)} breaks a rule of ONNX ({error_reason(error)})",
            hint="Mend it where it was made; onnx.shape_inference.infer_shapes finds the same at fixed sizes.",
        ) from error
    kinds: _TypedShapes = {}
    for name, kind in inferred.items():
        if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
            continue
        dims = kind.tensor_type.shape.dim
        if all(d.HasField("dim_value") and d.dim_value >= 0 for d in dims):
            dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind.tensor_type.elem_type))
            kinds[name] = (tuple(d.dim_value for d in dims), dtype)
    return kinds


def _check_memory(graph: Graph, out: InferredShapes) -> None:
    """Refuse graphs that need too many numbers at the same time, with a `ModelError`."""
    last: dict[str, int] = {}
    for index, node in enumerate(graph.nodes):
        last.update(dict.fromkeys((i for i in node.inputs if i), index))
    alive = 0
    for index, node in enumerate(graph.nodes):
        alive += sum(math.prod(out.shapes.get(o, ())) for o in node.outputs if o)
        if alive > MAX_ELEMENTS:
            raise ModelError(
                f"values of {alive} numbers are needed at the same time for one batch",
                expected=f"at most {MAX_ELEMENTS}",
                hint=_SMALLER_HINT,
            )
        # Weights are in memory already with the file, so only what nodes make is counted.
        done = {i for i in [*node.inputs, *node.outputs] if i and last.get(i, index) == index}
        alive -= sum(math.prod(out.shapes.get(i, ())) for i in done if i not in graph.initializers)


def _macs(node: Node, out: InferredShapes) -> int:
    """The MACs of an operator; one per output for operators without sums of products."""
    shapes = [out.shapes.get(i, ()) for i in node.inputs]
    output_size = math.prod(out.shapes.get(node.outputs[0], ()))
    if node.op in ("MatMul", "Gemm") and len(shapes) > 1 and shapes[0]:
        return output_size * shapes[0][0 if node.attrs.get("transA") else -1]
    if node.op == "Conv" and len(shapes) > 1:
        return output_size * math.prod(shapes[1][1:])
    # Each input number is multiplied by the whole kernel of its channel.
    if node.op == "ConvTranspose" and len(shapes) > 1:
        return math.prod(shapes[0]) * math.prod(shapes[1][1:])
    if node.op in ("LSTM", "GRU", "RNN") and len(shapes) > 2:
        return math.prod(shapes[0][:2]) * (math.prod(shapes[1]) + math.prod(shapes[2]))
    if node.op == "Einsum":
        return _einsum_macs(str(node.attrs.get("equation", "")), shapes)
    if "kernel_shape" in node.attrs:
        return output_size * math.prod(int(k) for k in node.attrs["kernel_shape"])
    return output_size


def _einsum_macs(equation: str, shapes: Sequence[tuple[int, ...]]) -> int:
    """The product of all sizes that an equation names; an ellipsis counts as the axes without a letter."""
    sizes: dict[str, int] = {}
    rest = 1
    for term, shape in zip(equation.partition("->")[0].replace(" ", "").split(","), shapes, strict=False):
        letters = term.replace(".", "")
        named = dict(zip(letters, shape[: len(letters)] if "." not in term else shape[-len(letters) :], strict=False))
        sizes.update(named)
        # The axes of an ellipsis have no letter; their product is what the letters leave of the shape.
        rest = max(rest, math.prod(shape) // max(1, math.prod(named.values())))
    return rest * math.prod(sizes.values())


# -- numbers -----------------------------------------------------------------------------------------------------------

# Operators whose few numbers are computed: none needs more room than its inputs and its output.
_COMPUTED_OPERATORS = frozenset(
    {
        *("Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Exp"),
        *("Expand", "Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual"),
        *("Log", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range", "Reciprocal", "ReduceMax"),
        *("ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Sign", "Slice", "Sqrt", "Squeeze", "Sub", "Sum"),
        *("Tile", "Transpose", "Unsqueeze", "Where"),
    }
)


@cache
def _reference_operator(operator: str, opset: int) -> Any:
    """The standard's own implementation of an operator."""
    from onnx.reference.ops import load_op  # 12 MB: servers, too, import this module

    return load_op("", operator, opset)


def _output_values(graph: Graph, out: InferredShapes, node: Node) -> dict[str, Array]:
    """Compute the outputs of an operator on few numbers; empty if the operator isn't listed above."""
    first = node.outputs[0]
    if node.op == "Shape":
        shape = out.shapes[node.inputs[0]]
        return {first: np.array(shape[int(node.attrs.get("start", 0)) : node.attrs.get("end")], np.int64)}
    if node.op == "Size":
        return {first: np.array(math.prod(out.shapes[node.inputs[0]]), np.int64)}
    if node.op not in _COMPUTED_OPERATORS or node.domain or len(node.outputs) != 1:
        return {}
    reads = [out.numbers[i] if i else None for i in node.inputs]
    attrs = {k: numpy_helper.from_array(v) if isinstance(v, np.ndarray) else v for k, v in node.attrs.items()}
    try:
        with np.errstate(all="ignore"):
            return {first: np.asarray(_reference_operator(node.op, graph.opset).eval(*reads, **attrs))}
    except Exception:  # noqa: BLE001  numbers of an untrusted file, which make no sense
        return {}
