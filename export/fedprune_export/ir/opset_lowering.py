"""Writes a normalised graph at a target's opset, later or earlier than 17: the operators that changed in between.

To support a further form, add a rule to `_LATER` or `_EARLIER`: a function that emits what the opset has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import onnx

from fedprune.core.errors import ModelError
from fedprune_export.ir.composites import expand_composites
from fedprune_export.ir.drafts import NORMAL_OPSET, Draft, Node

WRITABLE_OPSETS = range(13, 24)  # opsets that can be written

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
    graph = expand_composites(graph, opset)
    if opset == NORMAL_OPSET:
        return graph
    rules = {op: rule for op, (since, rule) in _LATER.items() if opset >= since}
    rules |= {op: rule for op, (since, rule) in _EARLIER.items() if opset < since}
    out = graph.copy()
    out.opset = opset
    out.rewrite(rules)
    for node in out.nodes:
        if not node.domain:
            check_form(node, opset)
    return out


def check_form(node: Node, opset: int) -> None:
    """Make sure that an opset has an operator in the form that a node uses. Raises `ModelError` if it hasn't."""
    hint = "Use operators and forms that `fedprune-export operators` lists"
    hint += "." if opset == NORMAL_OPSET else ", or another --opset."
    try:
        schema = onnx.defs.get_schema(node.op, opset, "")
    except onnx.defs.SchemaError as error:
        raise ModelError(f"operator {node.op} ({node.name}) does not exist in opset {opset}", hint=hint) from error
    extra = sorted(set(node.attrs) - set(schema.attributes))
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


def _drop_default(name: str, value: object) -> _Rule:
    """Remove an attribute whose value is the only behaviour of an earlier opset."""

    def rule(out: Draft, node: Node) -> None:
        if node.attrs.get(name) == value:
            del node.attrs[name]
        out.nodes.append(node)

    return rule


# First opset of a new form, and how to write it.
_LATER: dict[str, tuple[int, _Rule]] = {
    **dict.fromkeys(REDUCTIONS, (18, _reduction)),
    "Split": (18, _split),
    "GridSample": (20, _grid_sample),
}

# First opset of the form that opset 17 has, and how to write it before.
_EARLIER: dict[str, tuple[int, _Rule]] = {
    "Shape": (15, _shape),
    "HardSwish": (14, _hard_swish),
    "Reshape": (14, _drop_default("allowzero", 0)),
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (14, _drop_default("layout", 0))),
    **dict.fromkeys(("ScatterND", "ScatterElements"), (16, _drop_default("reduction", "none"))),
}

LATER_FORMS = {op: since for op, (since, _) in _LATER.items()}  # first opset of a form that comes after opset 17's

# Operators whose form of opset 17 is not their first: the opset that introduced it.
EARLIER_FORMS = {op: since for op, (since, _) in _EARLIER.items()}
