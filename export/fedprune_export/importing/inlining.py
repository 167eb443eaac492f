"""Inlines local functions and composite operators, and removes control flow and sequences, before a model is read.

onnx's inliner does it. onnxscript's folding, which could remove branches and sequences, would remove dropouts and fold
weights, too, knows no loops, and writes a Split that is invalid below opset 18.
"""

from __future__ import annotations

from collections import Counter

import onnx
from onnx import helper, inliner

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.control_flow import write_out
from fedprune_export.importing.model_file import check_valid_onnx
from fedprune_export.importing.node_writer import operator_of
from fedprune_export.ir.graph import read_opset

MAX_NODES = 40_000  # operators of a model, with functions inlined; more would take over a minute to import

_MAX_CALL_DEPTH = 20  # functions that call functions

# Operators that are replaced by their definition in the standard, and the operators of the definition.
BY_DEFINITION = {
    "AffineGrid": "products with a grid of positions",
    "Attention": "products, Softmax and reshapes",
    "CenterCropPad": "Slice and Pad",
    "MeanVarianceNormalization": "means and a quotient",
    "NegativeLogLikelihoodLoss": "GatherElements",
    "RotaryEmbedding": "products with cosines and sines",
    "SoftmaxCrossEntropyLoss": "LogSoftmax and GatherElements",
    "Swish": "a product with Sigmoid",
}


def inline_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without local functions, sequences, branches on constants, loops of a fixed length and what else
    `control_flow` writes out: the same object if it has none.

    Raises `ModelError` if functions call each other without end, the model has too many operators, the length of a
    sequence isn't known, or an estimator can't be trained.
    """
    if model.functions:
        _check_calls(model)
        check_valid_onnx(model)
        try:
            model = inliner.inline_local_functions(model)
        except Exception as error:
            raise ModelError(
                f"the model's functions can't be written out ({error_reason(error)})", hint="Export it without them."
            ) from error
    if len(model.graph.node) > MAX_NODES:
        raise ModelError("number of operators", expected=f"at most {MAX_NODES}", got=len(model.graph.node))
    if any(("", name) == operator_of(node) for node in model.graph.node for name in BY_DEFINITION):
        model = _expand_definitions(model)
    return write_out(model, MAX_NODES)


def _check_calls(model: onnx.ModelProto) -> None:
    """Refuse functions that call each other without end, or become too many operators, with a `ModelError`."""
    calls = {(f.domain, f.name): Counter((n.domain, n.op_type) for n in f.node) for f in model.functions}
    nodes = Counter((n.domain, n.op_type) for n in model.graph.node)
    # Functions that call others several times grow exponentially, so they are counted before anything is inlined.
    for _ in range(_MAX_CALL_DEPTH):
        called = [key for key in nodes if key in calls]
        for key, count in [(key, nodes.pop(key)) for key in called]:
            nodes.update({inner: count * each for inner, each in calls[key].items()})
        if nodes.total() > MAX_NODES:
            raise ModelError(
                "number of operators with functions written out", expected=f"at most {MAX_NODES}", got=nodes.total()
            )
        if not called:
            return
    raise ModelError(f"local functions call each other more than {_MAX_CALL_DEPTH} deep")


def _expand_definitions(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace operators by the standard's definitions, which depend on the types of their inputs."""
    check_valid_onnx(model)
    for node in (n for n in model.graph.node if n.op_type in BY_DEFINITION and n.op_type.endswith("Loss")):
        if b"none" not in (a.s for a in node.attribute):
            raise ModelError(
                f"{node.op_type} {node.name} makes one number of the whole batch",
                expected="reduction 'none'",
                hint="A loss gives one number per sample: reduction='none', then the mean over all axes but the first.",
            )
    names, completed = [("", name) for name in BY_DEFINITION], onnx.ModelProto()
    completed.CopyFrom(model)
    for node in (n for n in completed.graph.node if operator_of(n) in names):
        given = {a.name for a in node.attribute}
        defaults = onnx.defs.get_schema(node.op_type, read_opset(model)).attributes.items()
        # The inliner doesn't know an attribute's default.
        node.attribute.extend(a.default_value for n, a in defaults if a.default_value.name and n not in given)
    try:
        typed = onnx.shape_inference.infer_shapes(completed)
        # The inliner reads types only from `value_info`, and inference doesn't write those of tensors there.
        for tensor in model.graph.initializer:
            typed.graph.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        out: onnx.ModelProto = inliner.inline_selected_functions(typed, names, inline_schema_functions=True)
    except Exception as error:
        operators = ", ".join(sorted({n.op_type for n in model.graph.node} & BY_DEFINITION.keys()))
        raise ModelError(
            f"{operators} can't be written by its definition ({error_reason(error)})",
            hint="Export the model without them, or at opset 18.",
        ) from error
    del out.graph.value_info[:]
    return out
