"""Translates every opset to opset 17 with composites: later forms are rewritten, earlier opsets are raised.

To support a later operator or form, add a rule to `_REPLACED` or `_CHANGED`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.constants import constant_input
from fedprune_export.importing.graph_writer import file_shapes
from fedprune_export.importing.pad_resize import RESIZE_MODES_OPSET, emit_pad, emit_resize, mark_early_resizes
from fedprune_export.importing.spectra import emit_dft, emit_fold, emit_stft
from fedprune_export.ir.composites import COMPOSITES
from fedprune_export.ir.graph import NORMAL_OPSET, Graph, Node, read_opset
from fedprune_export.ir.opset_lowering import REDUCTIONS, check_form
from fedprune_export.ir.trace import Trace

_SOFTMAXES = frozenset({"Hardmax", "LogSoftmax", "Softmax"})
_MIN_OPSET = 13  # nodes of this opset and later mean the same at opset 17


@dataclass
class Translation:
    """The graph that the rules write, and the values and shapes that they read."""

    graph: Graph
    trace: Trace  # of the graph before the translation
    read_values: set[str]  # values that some node reads, and the outputs


_Rule = Callable[[Translation, Node], None]


def upgrade_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at opset 13 or later. Raises `ModelError` if onnx can't convert it."""
    opset = read_opset(model)
    if not opset or opset >= _MIN_OPSET:
        return model
    try:
        from onnx import version_converter

        upgraded: onnx.ModelProto = version_converter.convert_version(model, NORMAL_OPSET)
    except Exception as error:
        raise ModelError(
            f"the model's opset {opset} can't be raised to {NORMAL_OPSET} ({error_reason(error)})",
            hint=f"Export it again with opset_version={NORMAL_OPSET} or later.",
        ) from error
    if opset < RESIZE_MODES_OPSET:
        mark_early_resizes(upgraded.graph)
    _restore_softmaxes(upgraded)
    return upgraded


def _restore_softmaxes(model: onnx.ModelProto) -> None:
    """Write a softmax over the last axis as one node again: the converter, which knows fewer shapes, flattens it."""
    shapes, makers = file_shapes(model), {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        softmax = makers.get(node.input[0]) if node.op_type == "Reshape" else None
        flat = makers.get(softmax.input[0]) if softmax is not None and softmax.op_type in _SOFTMAXES else None
        shape = makers.get(node.input[1]) if flat is not None and flat.op_type == "Flatten" else None
        if softmax is None or flat is None or shape is None or shape.op_type != "Shape":
            continue
        axis = next((a.i for a in flat.attribute if a.name == "axis"), 1)
        if shape.input[0] == flat.input[0] and len(shapes.get(flat.input[0], ())) == axis + 1:
            node.CopyFrom(helper.make_node(softmax.op_type, flat.input[:1], node.output, node.name, axis=axis))


def translate(graph: Graph, trace: Trace, notes: list[str]) -> None:
    """Rewrite the operators of a graph, whose shape arithmetic is folded, in the forms of opset 17.

    Raises `ModelError` if an operator has no form in opset 17.
    """
    nodes, graph.nodes = graph.nodes, []
    used = {p.name for p in graph.outputs} | {i for n in nodes for i in n.inputs}
    state = Translation(graph, trace, used)
    for node in nodes:
        if not node.domain and node.op in _REPLACED:
            _REPLACED[node.op](state, node)
            continue
        if not node.domain and node.op in _CHANGED:
            _CHANGED[node.op](state, node)
        graph.nodes.append(node)
    for node in graph.nodes:
        if not node.domain and node.op not in COMPOSITES and graph.opset > NORMAL_OPSET:
            check_form(node, NORMAL_OPSET)
    frozen_norms = [n.name for n in graph.nodes if n.op == "BatchNormalization" and n.attrs.get("momentum") == 1]
    if frozen_norms:
        notes.append(
            f"Statistics of {len(frozen_norms)} batch normalisations are never updated, {frozen_norms[0]} among them: "
            "their momentum says so (torch's 0, or None, which ONNX can't express)."
        )
    graph.opset = NORMAL_OPSET


def _reduction(state: Translation, node: Node) -> None:
    """Write axes as an attribute. Without axes, and with `noop_with_empty_axes` set, nothing is reduced."""
    nothing = node.attrs.pop("noop_with_empty_axes", 0)
    constant = constant_input(state.graph, node, 1, "axes")
    axes = [] if constant is None else constant.reshape(-1).tolist()
    if axes:
        node.attrs["axes"] = axes
    elif nothing:
        node.op, node.attrs = "Identity", {}
    node.inputs = node.inputs[:1]


def _reshape(state: Translation, node: Node) -> None:
    """Remove `allowzero` if it is 0, its default."""
    if not node.attrs.get("allowzero", 1):
        del node.attrs["allowzero"]


def _average_pool(state: Translation, node: Node) -> None:
    """Remove dilations of 1; opset 17 has no others."""
    if all(d == 1 for d in node.attrs.get("dilations", [])):
        node.attrs.pop("dilations", None)


def _lp_pool(state: Translation, node: Node) -> None:
    """The root of a sum of powers over windows or the whole map. Its gradient is 0 where the sum is."""
    graph, x, power = state.graph, node.inputs[0], int(node.attrs.pop("p", 2))
    raised = graph.emit("Mul", x, x) if power == 2 else graph.emit("Pow", graph.emit("Abs", x), graph.scalar(power))
    if node.op == "GlobalLpPool":
        total = graph.emit("ReduceSum", raised, graph.ints(*range(2, len(state.trace.shapes[x]))))
    else:
        if node.attrs.get("ceil_mode") or any(d != 1 for d in node.attrs.pop("dilations", [])):
            raise ModelError(f"{node.op} {node.name}: dilation or a rounded-up size", hint="Use a window that fits.")
        mean = graph.emit("AveragePool", raised, attrs={**node.attrs, "count_include_pad": 1})
        total = graph.emit("Mul", mean, graph.scalar(math.prod(node.attrs["kernel_shape"])))
    if power == 2:
        graph.emit("Sqrt", total, out=node.outputs[0])
        return
    # A root has an infinite slope at 0; the chosen branch has none.
    empty = graph.emit("Equal", total, graph.scalar(0))
    root = graph.emit("Pow", graph.emit("Where", empty, graph.scalar(1), total), graph.scalar(1 / power))
    graph.emit("Where", empty, graph.scalar(0), root, out=node.outputs[0])


def _local_response(state: Translation, node: Node) -> None:
    """x / (bias + alpha · mean of neighbouring channels' squares)^beta: channels become an axis of an average pool."""
    graph, x, size = state.graph, node.inputs[0], int(node.attrs["size"])
    alpha, beta, bias = (float(node.attrs.get(k, d)) for k, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    channels = state.trace.shapes[x][1]
    rows = graph.emit("Reshape", graph.emit("Mul", x, x), graph.ints(0, 1, channels, -1))
    window = {"kernel_shape": [size, 1], "pads": [(size - 1) // 2, 0, size // 2, 0], "count_include_pad": 1}
    means = graph.emit("AveragePool", rows, attrs=window)
    means = graph.emit("Reshape", means, graph.ints(0, *(d or 0 for d in state.trace.dims(x)[1:])))
    spread = graph.emit("Add", graph.emit("Mul", means, graph.scalar(alpha)), graph.scalar(bias))
    graph.emit("Div", x, graph.emit("Pow", spread, graph.scalar(beta)), out=node.outputs[0])


def _mean_variance(state: Translation, node: Node) -> None:
    """Minus the mean, divided by the standard deviation over the given axes."""
    graph, x = state.graph, node.inputs[0]
    over = {"axes": [int(a) for a in node.attrs.get("axes", [0, 2, 3])], "keepdims": 1}
    centred = graph.emit("Sub", x, graph.emit("ReduceMean", x, attrs=over))
    # The standard's definition adds 1e-9 to the deviation, not to the variance.
    deviation = graph.emit("Sqrt", graph.emit("ReduceMean", graph.emit("Mul", centred, centred), attrs=over))
    graph.emit("Div", centred, graph.emit("Add", deviation, graph.scalar(1e-9)), out=node.outputs[0])


def _dropping(*attributes: str) -> _Rule:
    """Remove attributes of later opsets."""

    def rule(state: Translation, node: Node) -> None:
        for name in attributes:
            node.attrs.pop(name, None)

    return rule


def _batch_norm(state: Translation, node: Node) -> None:
    if node.attrs.get("training_mode"):
        raise ModelError(
            f"batch normalisation {node.name} is in training mode",
            hint="Export the model in evaluation mode (module.eval()).",
        )
    node.attrs.pop("training_mode", None)
    node.attrs.pop("spatial", None)
    # A 32-bit number in a file is meant as the decimal that it prints as: 0.9, not 0.899999976.
    keep = float(str(np.float32(node.attrs.get("momentum", 0.9))))
    if not 0 <= keep <= 1:
        raise ModelError(f"momentum of batch normalisation {node.name}", expected="from 0 to 1", got=keep)
    node.attrs["momentum"] = keep
    # Further outputs are statistics of training mode.
    node.outputs = node.outputs[:1]


def _norm(state: Translation, node: Node) -> None:
    """Count the axis from the end, compute in float32, and remove unread outputs."""
    rank = len(state.trace.shapes[node.inputs[0]])
    axis = int(node.attrs.get("axis", -1))
    node.attrs["axis"] = axis - rank if axis >= 0 else axis
    node.attrs.pop("stash_type", None)
    while len(node.outputs) > 1 and node.outputs[-1] not in state.read_values:
        node.outputs.pop()


def _split(state: Translation, node: Node) -> None:
    node.attrs.pop("num_outputs", None)
    if len(node.inputs) < 2 or not node.inputs[1]:
        axis = int(node.attrs.get("axis", 0))
        if any(state.trace.batched(o)[axis] for o in node.outputs if o):
            raise ModelError(f"operator Split ({node.name}) splits the batch", hint="Split another axis.")
        total, count = state.trace.shapes[node.inputs[0]][axis], len(node.outputs)
        # All parts are equally long but the last, as opset 18 defines num_outputs.
        chunk_size = -(-total // count)
        sizes = [chunk_size] * (count - 1) + [total - chunk_size * (count - 1)]
        node.inputs = [node.inputs[0], state.graph.ints(*sizes)]


def _gather(state: Translation, node: Node) -> None:
    """Cast indices of 32 bits: the gradient's ScatterND takes only those of 64."""
    indices = node.inputs[1]
    if indices not in state.graph.initializers and state.trace.dtypes[indices] == np.int32:
        node.inputs[1] = state.graph.emit("Cast", indices, attrs={"to": onnx.TensorProto.INT64})


def _grid_sample(state: Translation, node: Node) -> None:
    mode = node.attrs.get("mode", "bilinear")
    node.attrs["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)


def _scatter(state: Translation, node: Node) -> None:
    if node.attrs.get("reduction") in ("min", "max"):
        what = f"attribute reduction of {node.op} ({node.name}) has no form in opset {NORMAL_OPSET}"
        raise ModelError(what, expected="add or mul", got=node.attrs["reduction"])


# Rules that write what stands in a node's place.
_REPLACED: dict[str, _Rule] = {
    **dict.fromkeys(("LpPool", "GlobalLpPool"), _lp_pool),
    "LRN": _local_response,
    "MeanVarianceNormalization": _mean_variance,
    "Col2Im": lambda state, node: emit_fold(state.graph, node, state.trace),
    "DFT": lambda state, node: emit_dft(state.graph, node, state.trace),
    "STFT": lambda state, node: emit_stft(state.graph, node, state.trace),
    "Pad": lambda state, node: emit_pad(state.graph, node, state.trace),
    "Resize": lambda state, node: emit_resize(state.graph, node, state.trace),
}
# Rules that change a node, which stays.
_CHANGED: dict[str, _Rule] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    "AveragePool": _average_pool,
    # These concern only types below 16 bits.
    **dict.fromkeys(("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear"), _dropping("saturate", "round_mode")),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _norm),
    **dict.fromkeys(("ScatterND", "ScatterElements"), _scatter),
    "BatchNormalization": _batch_norm,
    "Gather": _gather,
    "GridSample": _grid_sample,
    # Computed in float32. (`inlining` has replaced those of opsets 18 to 20, which scale by group.)
    "GroupNormalization": _dropping("stash_type"),
    "Reshape": _reshape,
    "Split": _split,
}

# Operators that `translate` rewrites: some only in their later forms, some always.
TRANSLATED = _REPLACED.keys() | _CHANGED.keys()

# The rewriting of operators, before any rule reads them.
REWRITTEN_AS = {
    "CastLike": "Cast",
    "Col2Im": "a transposed convolution with a constant kernel",
    "DFT": "a product with a constant matrix",
    "GlobalLpPool": "a sum of powers, and its root",
    "LpPool": "AveragePool of powers, and its root",
    "LRN": "AveragePool over channels",
    "MeanVarianceNormalization": "means and a quotient",
    "STFT": "a convolution with a constant Fourier basis",
}
