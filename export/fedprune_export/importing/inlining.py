"""Inlines local functions and composite operators, and removes control flow and sequences, before a model is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper, inliner, numpy_helper

from fedprune.core.errors import ModelError, error_reason, value_text
from fedprune_export.importing.control_flow import CONTROL_FLOW, without_control_flow
from fedprune_export.importing.embedding_bags import without_embedding_bags
from fedprune_export.importing.graph_writer import TRIAL_SIZES, GraphWriter, Names
from fedprune_export.importing.linear_models import LINEAR_OPERATORS, ML_DOMAIN, without_linear_models
from fedprune_export.importing.model_file import check_valid_onnx
from fedprune_export.importing.sequences import SEQUENCE_OPERATORS, without_sequences
from fedprune_export.ir.graph import read_opset

MAX_NODES = 40_000  # operators of a model, with functions inlined; more would take over a minute to import

_MAX_CALL_DEPTH = 20  # functions that call functions

# Operators that are replaced by their definition in the standard, and the operators of the definition.
BY_DEFINITION = {
    "AffineGrid": "products with a grid of positions",
    "Attention": "products, Softmax and reshapes",
    "CenterCropPad": "Slice and Pad",
    "NegativeLogLikelihoodLoss": "GatherElements",
    "RotaryEmbedding": "products with cosines and sines",
    "SoftmaxCrossEntropyLoss": "LogSoftmax and GatherElements",
    "Swish": "a product with Sigmoid",
}


_REVERSED_END = -(2**63) + 1  # the end of a reversed axis, as torch's exporters write it


def inline_model(model: onnx.ModelProto, notes: list[str] | None = None) -> onnx.ModelProto:
    """The model without local functions, linear models of `ai.onnx.ml`, sequences, branches on constants, loops of a
    fixed length and reversals of whole samples: the same object if it has none.

    Raises `ModelError` if functions call each other without end, the model has too many operators, or the length of a
    sequence isn't known.
    """
    if model.functions:
        _check_calls(model)
        model = _inline_functions(model)
    if len(model.graph.node) > MAX_NODES:
        raise ModelError("number of operators", expected=f"at most {MAX_NODES}", got=len(model.graph.node))
    if any(n.domain == ML_DOMAIN and n.op_type in LINEAR_OPERATORS for n in model.graph.node):
        model = without_linear_models(model)
    operators = {n.op_type for n in model.graph.node if n.domain in ("", "ai.onnx")}
    opset = read_opset(model)
    if operators & BY_DEFINITION.keys():
        model = _expand_definitions(model)
        operators = {n.op_type for n in model.graph.node if n.domain in ("", "ai.onnx")}
    has_old_group_norm = 18 <= opset < 21 and "GroupNormalization" in operators
    unsupported = operators & (CONTROL_FLOW | SEQUENCE_OPERATORS | {"ReverseSequence"})
    # onnx's checker refuses the withdrawn GroupNormalization; then only the result is checked.
    if not has_old_group_norm and (model.functions or unsupported):
        check_valid_onnx(model)
    if not has_old_group_norm and not unsupported:
        return model
    out = onnx.ModelProto()
    out.CopyFrom(model)
    if "Loop" in operators and (count := without_embedding_bags(out, opset)) and notes is not None:
        bags = "An EmbeddingBag that was a loop" if count == 1 else f"{count} EmbeddingBags that were loops"
        notes.append(f"{bags} over samples became a lookup of all samples at once.")
    if operators & CONTROL_FLOW:
        without_control_flow(out, opset, MAX_NODES)
    if any(n.op_type == "ReverseSequence" for n in out.graph.node):
        without_reversals(out, opset)
    if has_old_group_norm:
        _replace_old_group_norms(out.graph)
    if any(n.op_type in SEQUENCE_OPERATORS for n in out.graph.node):
        without_sequences(out, opset)
    return out


def _check_calls(model: onnx.ModelProto) -> None:
    """Refuse functions that call each other without end, or become too many operators, with a `ModelError`."""
    functions = {(f.domain, f.name): f for f in model.functions}
    calls = {k: Counter((n.domain, n.op_type) for n in f.node) for k, f in functions.items()}
    sizes: dict[tuple[str, str], int] = {}

    def size(key: tuple[str, str], depth: int) -> int:
        if key not in functions:
            return 1
        if depth > _MAX_CALL_DEPTH:
            raise ModelError(
                f"local functions call each other more than {_MAX_CALL_DEPTH} deep", got=value_text(key[1])
            )
        if key not in sizes:
            sizes[key] = sum(n * size(k, depth + 1) for k, n in calls[key].items())
        return sizes[key]

    # Functions that call others several times grow exponentially, so the size is computed before anything is inlined.
    total = sum(size((n.domain, n.op_type), 0) for n in model.graph.node)
    if total > MAX_NODES:
        raise ModelError("number of operators with functions written out", expected=f"at most {MAX_NODES}", got=total)


def _inline_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    try:
        onnx.checker.check_model(model)
        out: onnx.ModelProto = inliner.inline_local_functions(model)
    except Exception as error:
        raise ModelError(
            f"the model's local functions can't be written out ({error_reason(error)})",
            hint="Export it without functions.",
        ) from error
    return out


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
    names = [("", name) for name in BY_DEFINITION]
    try:
        typed = onnx.shape_inference.infer_shapes(model)
        # The inliner reads types only from `value_info`, and inference doesn't write those of tensors there.
        for tensor in model.graph.initializer:
            typed.graph.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        out: onnx.ModelProto = inliner.inline_selected_functions(typed, names, inline_schema_functions=True)
    except Exception as error:
        operators = ", ".join(sorted({n.op_type for n in model.graph.node} & BY_DEFINITION.keys()))
        raise ModelError(
            f"{operators} can't be written by its definition ({error_reason(error)})",
            hint="Export the model at opset 18.",
        ) from error
    tensors = {tensor.name for tensor in model.graph.initializer}
    inner_values = [value for value in out.graph.value_info if value.name not in tensors]
    del out.graph.value_info[:]
    out.graph.value_info.extend(inner_values)
    return out


def _replace_old_group_norms(graph: onnx.GraphProto) -> None:
    """Write GroupNormalization of opsets 18 to 20, which scales by group and was withdrawn, as an instance norm."""
    nodes, names = list[onnx.NodeProto](), Names(graph)
    for node in graph.node:
        attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type != "GroupNormalization" or node.domain not in ("", "ai.onnx") or len(node.input) != 3:
            nodes.append(node)
            continue
        x, scale, bias = node.input
        target_name, apart, normal, shape = (
            names.fresh(f"{node.output[0]}.group_{suffix}") for suffix in ("target", "apart", "normal", "shape")
        )
        epsilon = attrs.get("epsilon", 1e-5)
        target = np.array([0, int(attrs.get("num_groups", 0)), -1], np.int64)
        graph.initializer.append(numpy_helper.from_array(target, target_name))
        nodes += [
            helper.make_node("Reshape", [x, target_name], [apart]),
            helper.make_node("InstanceNormalization", [apart, scale, bias], [normal], epsilon=epsilon),
            helper.make_node("Shape", [x], [shape]),
            helper.make_node("Reshape", [normal, shape], [node.output[0]]),
        ]
    del graph.node[:]
    graph.node.extend(nodes)


def without_reversals(model: onnx.ModelProto, opset: int) -> None:
    """Write reversals of a whole axis as slices of step -1; the model is changed. Reversals by lengths of samples stay.

    TensorFlow has no other operator to reverse an axis: tf2onnx writes a backward layer with as many equal lengths as
    there are samples.
    """
    _Reversals(model, opset).write()


class _Reversals(GraphWriter):
    def rewrite_node(self, node: onnx.NodeProto) -> Sequence[onnx.NodeProto]:
        """A Slice for a ReverseSequence of full lengths; any other node itself."""
        if node.op_type != "ReverseSequence" or node.domain not in ("", "ai.onnx") or len(node.input) != 2:
            return [node]
        axis = next((a.i for a in node.attribute if a.name == "time_axis"), 0)
        length = self._size(node.input[0], axis)
        if length is None or not self._are_lengths(node.input[1], length):
            return [node]
        bounds = [
            self._constant(np.array([number], np.int64), f"{node.output[0]}.{what}")
            for what, number in (("start", -1), ("end", _REVERSED_END), ("axis", axis), ("step", -1))
        ]
        names = [bound.output[0] for bound in bounds]
        return [*bounds, helper.make_node("Slice", [node.input[0], *names], [node.output[0]], name=node.name)]

    def _are_lengths(self, name: str, length: int) -> bool:
        """Whether all lengths of samples are this one, whatever the batch."""
        try:
            values = [self._value_at_size(name, size) for size in TRIAL_SIZES]
        except ModelError:
            return False
        return all(value is not None and bool((value == length).all()) for value in values)
