"""Composites: operators that ONNX added after opset 17, such as Gelu and GroupNormalization, and their expansion.

Inside the compiler each is one node, with the name and meaning of ONNX's operator, so that one rule can cut it and one
differentiate it. `expand_composites` replaces those that a file's opset lacks (LayerNormalization, too) by simpler
operators. These rules read no shape, because a training graph has no fixed number of channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

from fedprune_export.ir.drafts import Draft, Node

_Draft = TypeVar("_Draft", bound=Draft)

GELU_CUBE = 0.044715  # the factor of the cube in the tanh form of Gelu

# The opset that introduced each operator; files of an older opset get simpler operators instead.
NATIVE_SINCE = {"LayerNormalization": 17, "Mish": 18, "Gelu": 20, "GroupNormalization": 21, "RMSNormalization": 23}

COMPOSITES = frozenset(NATIVE_SINCE) - {"LayerNormalization"}


def expand_composites(graph: _Draft, opset: int) -> _Draft:
    """Replace composites that `opset` lacks by simpler operators. Returns the same graph if there are none."""
    rules = {op: rule for op, rule in _RULES.items() if opset < NATIVE_SINCE[op]}
    if not any(n.op in rules and not n.domain for n in graph.nodes):
        return graph
    out = graph.copy()
    out.rewrite(rules)
    return out


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


_RULES: dict[str, Callable[[Draft, Node], None]] = {
    "Gelu": _gelu,
    "Mish": _mish,
    "GroupNormalization": _group_norm,
    "RMSNormalization": _rms_norm,
    "LayerNormalization": _layer_norm,
}
