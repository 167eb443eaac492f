"""Every opset as opset 17: what later opsets write differently is rewritten, earlier ones are raised.

To support a later operator or form, add a rule to `_RULES`: a function that changes one node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from fedprune.errors import ModelError
from fedprune_export.graph import TRAINING_OPSET, Graph, Node

Array = npt.NDArray[Any]

_REDUCTIONS = frozenset(
    {
        "ReduceMean",
        "ReduceMax",
        "ReduceMin",
        "ReduceProd",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceSumSquare",
    }
)


def upgraded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at opset 17 or later.

    Raises:
        ModelError: onnx can't convert it.
    """
    versions = [o.version for o in model.opset_import if o.domain in ("", "ai.onnx")]
    if not versions or versions[0] >= TRAINING_OPSET:
        return model
    try:
        from onnx import version_converter

        upgraded: onnx.ModelProto = version_converter.convert_version(model, TRAINING_OPSET)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"the model's opset {versions[0]} can't be raised to {TRAINING_OPSET} ({reason})",
            hint=f"Export it again with opset_version={TRAINING_OPSET} or later.",
        ) from error
    return upgraded


def lower(graph: Graph, notes: list[str]) -> None:
    """Rewrite operators of later opsets in the forms of opset 17.

    Raises:
        ModelError: An operator has no such form.
    """
    for node in graph.nodes:
        if node.domain:
            continue
        rule = _RULES.get(node.op)
        if rule is not None:
            rule(graph, node)
        if graph.opset > TRAINING_OPSET:
            _check_form(node)
    still = [n.name for n in graph.nodes if n.op == "BatchNormalization" and n.attrs.get("momentum") == 1]
    if still:
        notes.append(
            f"Statistics of {len(still)} batch normalisations are never updated, {still[0]} among them: their momentum "
            "says so (torch's 0, or None, which ONNX can't express)."
        )
    if graph.opset > TRAINING_OPSET:
        notes.append(f"Lowered from opset {graph.opset} to {TRAINING_OPSET}.")
        graph.opset = TRAINING_OPSET


def _check_form(node: Node) -> None:
    """Operators of later opsets are kept where they use only what opset 17 has."""
    try:
        schema = onnx.defs.get_schema(node.op, TRAINING_OPSET, "")
    except onnx.defs.SchemaError as error:
        raise ModelError(
            f"operator {node.op} ({node.name}) does not exist in opset {TRAINING_OPSET}",
            hint=f"Export the model with opset_version={TRAINING_OPSET} or 18.",
        ) from error
    extra = sorted(set(node.attrs) - set(schema.attributes))
    used = len(node.inputs)
    while used and not node.inputs[used - 1]:
        used -= 1
    if extra or used > schema.max_input:
        raise ModelError(
            f"operator {node.op} ({node.name}) is in a form that opset {TRAINING_OPSET} doesn't have",
            got=", ".join(extra) or f"{used} inputs",
            hint=f"Export the model with opset_version={TRAINING_OPSET} or 18.",
        )


def _static(graph: Graph, name: str, node: Node) -> Array:
    """An integer argument of an operator, which must be known when the model is imported."""
    if name in graph.initializers:
        return graph.initializers[name]
    raise ModelError(f"operator {node.op} ({node.name}) takes computed axes", expected="constant axes")


def _lower_reduction(graph: Graph, node: Node) -> None:
    """Axes as an attribute; empty axes with noop set mean that nothing is reduced."""
    if len(node.inputs) > 1 and node.inputs[1]:
        axes = _static(graph, node.inputs[1], node).reshape(-1).tolist()
        if axes or not node.attrs.get("noop_with_empty_axes"):
            node.inputs = node.inputs[:1]
            node.attrs.pop("noop_with_empty_axes", None)
            if axes:
                node.attrs["axes"] = axes
            return
        node.op, node.inputs, node.attrs = "Identity", node.inputs[:1], {}
        return
    if node.attrs.pop("noop_with_empty_axes", 0):
        node.op, node.attrs = "Identity", {}
    node.inputs = node.inputs[:1]


def _lower_pooling(graph: Graph, node: Node) -> None:
    """Dilations of 1 are the only ones that AveragePool knows in opset 17."""
    if node.op == "AveragePool" and all(d == 1 for d in node.attrs.get("dilations", [])):
        node.attrs.pop("dilations", None)


def _lower_cast(graph: Graph, node: Node) -> None:
    """The newer attributes of casts concern types below 16 bits only."""
    node.attrs.pop("saturate", None)
    node.attrs.pop("round_mode", None)


def _lower_reshape(graph: Graph, node: Node) -> None:
    if not node.attrs.get("allowzero"):
        node.attrs.pop("allowzero", None)


def _lower_batch_norm(graph: Graph, node: Node) -> None:
    if node.attrs.get("training_mode"):
        raise ModelError(
            f"batch normalisation {node.name} is in training mode",
            hint="Export the model in evaluation mode (module.eval()).",
        )
    node.attrs.pop("training_mode", None)
    node.attrs.pop("spatial", None)
    # What a file holds as a 32-bit number is meant as the decimal that it prints as: 0.9, not 0.899999976.
    keep = float(str(np.float32(node.attrs.get("momentum", 0.9))))
    if not 0 <= keep <= 1:
        raise ModelError(f"momentum of batch normalisation {node.name}", expected="from 0 to 1", got=keep)
    node.attrs["momentum"] = keep
    node.outputs = node.outputs[:1]


_RULES: dict[str, Callable[[Graph, Node], None]] = {
    **dict.fromkeys(_REDUCTIONS, _lower_reduction),
    "AveragePool": _lower_pooling,
    "Cast": _lower_cast,
    "CastLike": _lower_cast,
    "Reshape": _lower_reshape,
    "BatchNormalization": _lower_batch_norm,
}
