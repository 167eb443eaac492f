"""Writes a normalised graph at a target's opset: the operators that opset 17 has in another form, and composites.

Composites are operators that ONNX added after opset 17, such as Gelu and GroupNormalization. Inside the compiler each
is one node, with the name and meaning of ONNX's operator, so that one rule can cut it and one differentiate it. Files
of opsets that lack one (LayerNormalization, too) get simpler operators. These rules read no shape, because a training
graph has no fixed number of channels.

To support a further form, add a rule to `_LATER`, `_EARLIER` or `_COMPOSITES`: a function that emits what the opset
has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import onnx
from onnx import helper

from fedprune.core.errors import ModelError
from fedprune_export.ir.drafts import NORMAL_OPSET, Draft, Node

WRITABLE_OPSETS = range(13, 24)  # opsets that can be written

GELU_CUBE = 0.044715  # the factor of the cube in the tanh form of Gelu

# Reductions whose axes are an attribute at opset 17 and an input from 18 on.
REDUCTIONS = frozenset(
    {
        *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSum"),
        *("ReduceLogSumExp", "ReduceSumSquare"),
    }
)

# Names that GridSample gives its modes from opset 20 on.
_GRID_SAMPLE_MODES = {"bilinear": "linear", "bicubic": "cubic"}

_Rule = Callable[[Draft, Node], None]
_Draft = TypeVar("_Draft", bound=Draft)


def lower_to_opset(graph: _Draft, opset: int) -> _Draft:
    """A normalised graph in the forms of an opset; values keep their names. It is the same object if nothing changes.

    Raises `ModelError` if there is no such opset, or an operator has no form in it.
    """
    if opset not in WRITABLE_OPSETS:
        raise ModelError("opset to write", expected=f"{WRITABLE_OPSETS[0]} to {WRITABLE_OPSETS[-1]}", got=opset)
    rules = {op: rule for op, (since, rule) in (_COMPOSITES | _EARLIER).items() if opset < since}
    if opset == NORMAL_OPSET and not any(n.op in rules and not n.domain for n in graph.nodes):
        return graph
    out = graph.copy()
    out.opset = opset
    out.rewrite(rules)
    # What composites consist of has later forms, too.
    out.rewrite({op: rule for op, (since, rule) in _LATER.items() if opset >= since})
    if opset != NORMAL_OPSET:
        for node in out.nodes:
            if not node.domain:
                fit_opset(node, opset)
    return out


def fit_opset(node: Node, opset: int) -> None:
    """Remove attributes that an opset lacks, where they say what is always so in it.

    Raises `ModelError` if the opset lacks the operator, or the form of it that the node uses.
    """
    hint = "Use operators and forms that `fedprune-export operators` lists"
    hint += "." if opset == NORMAL_OPSET else ", or another --opset."
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError as error:
        raise ModelError(f"operator {node.op} ({node.name}) does not exist in opset {opset}", hint=hint) from error
    latest = onnx.defs.get_schema(node.op).attributes
    extra = sorted(node.attrs.keys() - schema.attributes.keys())
    for name in extra[:]:
        if name in latest and helper.make_attribute(name, node.attrs[name]) == latest[name].default_value:
            del node.attrs[name]
            extra.remove(name)
    # Inputs that are left out at the end don't count.
    used = len(node.inputs)
    while used and not node.inputs[used - 1]:
        used -= 1
    if extra or used > schema.max_input:
        raise ModelError(
            f"operator {node.op} ({node.name}) is in a form that opset {opset} doesn't have",
            got=", ".join(extra) or f"{used} inputs",
            hint=hint,
        )


def _reduction(out: Draft, node: Node) -> None:
    axes = node.attrs.pop("axes", None)
    if axes is not None:
        node.inputs = [node.inputs[0], out.ints(*axes)]
    out.nodes.append(node)


def _split(out: Draft, node: Node) -> None:
    """Set the number of parts, which opset 18 requires for equal parts."""
    if len(node.inputs) < 2 or not node.inputs[1]:
        node.attrs["num_outputs"] = len(node.outputs)
    out.nodes.append(node)


def _grid_sample(out: Draft, node: Node) -> None:
    mode = node.attrs.get("mode", "bilinear")
    node.attrs["mode"] = _GRID_SAMPLE_MODES.get(mode, mode)
    out.nodes.append(node)


def _shape(out: Draft, node: Node) -> None:
    """Slice a part of a shape from the full shape; `start` and `end` came with opset 15."""
    start, end = node.attrs.pop("start", 0), node.attrs.pop("end", None)
    if start or end is not None:
        full_shape = out.emit("Shape", node.inputs[0])
        # An end beyond the last axis means all of them.
        out.emit("Slice", full_shape, out.ints(start), out.ints(2**62 if end is None else end), out=node.outputs[0])
    else:
        out.nodes.append(node)


def _hard_swish(out: Draft, node: Node) -> None:
    # HardSwish came with opset 14; it is x · HardSigmoid(x; 1/6, 1/2).
    gate = out.emit("HardSigmoid", node.inputs[0], attrs={"alpha": 1 / 6, "beta": 0.5})
    out.emit("Mul", node.inputs[0], gate, out=node.outputs[0])


# -- composites --------------------------------------------------------------------------------------------------------


def _gelu(out: Draft, node: Node) -> None:
    """x / 2 * (1 + erf(x / sqrt 2)), in the order that onnxruntime fuses; or its approximation by tanh."""
    x = node.inputs[0]
    if node.attrs.get("approximate", "none") == "tanh":
        cube = out.emit("Mul", out.emit("Mul", x, x), x)
        inner = out.emit("Add", x, out.emit("Mul", cube, out.scalar(GELU_CUBE)))
        curve = out.emit("Tanh", out.emit("Mul", inner, out.scalar(math.sqrt(2 / math.pi))))
    else:
        curve = out.emit("Erf", out.emit("Div", x, out.scalar(math.sqrt(2))))
    product = out.emit("Mul", x, out.emit("Add", curve, out.scalar(1)))
    out.emit("Mul", product, out.scalar(0.5), out=node.outputs[0])


def _mish(out: Draft, node: Node) -> None:
    x = node.inputs[0]
    out.emit("Mul", x, out.emit("Tanh", out.emit("Softplus", x)), out=node.outputs[0])


def _group_norm(out: Draft, node: Node) -> None:
    """An instance norm of [batch, groups, rest], then scale and bias on [batch, channels, rest]."""
    x, scale, bias = node.inputs
    groups = int(node.attrs["num_groups"])
    # The node's vectors are per channel; an instance norm of groups takes one number per group.
    one, zero = (out.constant([v] * groups, "float32") for v in (1.0, 0.0))
    grouped = out.emit("Reshape", x, out.ints(0, groups, -1))
    attrs = {"epsilon": float(node.attrs.get("epsilon", 1e-5))}
    normal = out.emit("InstanceNormalization", grouped, one, zero, attrs=attrs)
    # The number of channels is read from the scale, because a cut graph has another one.
    rows = out.emit("Concat", out.ints(0), out.emit("Shape", scale), out.ints(-1), attrs={"axis": 0})
    value = out.emit("Mul", out.emit("Reshape", normal, rows), out.emit("Unsqueeze", scale, out.ints(1)))
    value = out.emit("Add", value, out.emit("Unsqueeze", bias, out.ints(1)))
    out.emit("Reshape", value, out.emit("Shape", x), out=node.outputs[0])


def _rms_norm(out: Draft, node: Node) -> None:
    """x / sqrt(mean x^2 + epsilon) * scale, with means over the axes from `axis` on."""
    x, scale = node.inputs
    axes, value, is_flattened = _trailing_axes(out, node)
    normal = out.emit("Div", value, _root_mean_square(out, node, value, axes))
    if is_flattened:
        normal = out.emit("Reshape", normal, out.emit("Shape", x))
    out.emit("Mul", normal, scale, out=node.outputs[0])


def _layer_norm(out: Draft, node: Node) -> None:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias; outputs mean and 1 / deviation, too, if they are used."""
    x, scale, *bias = (i for i in node.inputs if i)
    mean_output, inverse_output = [*node.outputs[1:], "", ""][:2]
    axes, value, is_flattened = _trailing_axes(out, node)
    mean = out.emit("ReduceMean", value, attrs=axes, out=mean_output or None)
    centred = out.emit("Sub", value, mean)
    root = _root_mean_square(out, node, centred, axes)
    if inverse_output:
        out.emit("Reciprocal", root, out=inverse_output)
    normal = out.emit("Div", centred, root)
    if is_flattened:
        normal = out.emit("Reshape", normal, out.emit("Shape", x))
    if bias:
        out.emit("Add", out.emit("Mul", normal, scale), bias[0], out=node.outputs[0])
    else:
        out.emit("Mul", normal, scale, out=node.outputs[0])


def _trailing_axes(out: Draft, node: Node) -> tuple[dict[str, object], str, bool]:
    """The axes from `axis` on as attributes of a reduction, the value to reduce, and whether that is x as a matrix.

    Without the number of axes, those from a positive `axis` on can't be listed: flatten them into a matrix's columns.
    """
    axis = int(node.attrs.get("axis", -1))
    if axis < 0:
        return {"axes": list(range(axis, 0)), "keepdims": 1}, node.inputs[0], False
    return {"axes": [-1], "keepdims": 1}, out.emit("Flatten", node.inputs[0], attrs={"axis": axis}), True


def _root_mean_square(out: Draft, node: Node, value: str, axes: dict[str, object]) -> str:
    mean_square = out.emit("ReduceMean", out.emit("Mul", value, value), attrs=axes)
    return out.emit("Sqrt", out.emit("Add", mean_square, out.scalar(float(node.attrs.get("epsilon", 1e-5)))))


# First opset of a new form, and how to write it.
_LATER: dict[str, tuple[int, _Rule]] = {
    **dict.fromkeys(REDUCTIONS, (18, _reduction)),
    "Split": (18, _split),
    "GridSample": (20, _grid_sample),
}

# First opset of the form that opset 17 has, and how to write it before.
_EARLIER: dict[str, tuple[int, _Rule]] = {"Shape": (15, _shape), "HardSwish": (14, _hard_swish)}

# First opset that has a composite, and how to write it before.
_COMPOSITES: dict[str, tuple[int, _Rule]] = {
    "LayerNormalization": (17, _layer_norm),
    "Mish": (18, _mish),
    "Gelu": (20, _gelu),
    "GroupNormalization": (21, _group_norm),
    "RMSNormalization": (23, _rms_norm),
}

NATIVE_SINCE = {op: since for op, (since, _) in _COMPOSITES.items()}
COMPOSITES = frozenset(NATIVE_SINCE) - {"LayerNormalization"}
NEWER_FORMS = {op: since for op, (since, _) in (_LATER | _EARLIER).items()}  # operators with an older form, too
