"""Translates every opset to opset 17 with composites: later forms are rewritten, earlier opsets are raised.

To support a later operator or form, add a rule to `CHANGED` or `REPLACED`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

from fedprune.core.errors import ModelError, error_reason
from fedprune_export.importing.constants import constant_input
from fedprune_export.importing.fused_operators import EARLY_NORMS, name_early_norms
from fedprune_export.importing.metadata import CONSTANTS_KEY
from fedprune_export.importing.pad_resize import emit_pad, emit_resize
from fedprune_export.importing.spectra import emit_dft, emit_fold, emit_stft
from fedprune_export.importing.value_inference import file_shapes
from fedprune_export.ir.graph import NORMAL_OPSET, Graph, Node, read_opset
from fedprune_export.ir.operators import SOFTMAXES
from fedprune_export.ir.opset_lowering import COMPOSITES, REDUCTIONS, fit_opset
from fedprune_export.ir.trace import Trace

_FLATTENED = SOFTMAXES | {"Hardmax"}  # by the converter
_MIN_OPSET = 13  # nodes of this opset and later mean the same at opset 17


def read_graph(model: onnx.ModelProto) -> Graph:
    """The graph of a file's model without functions and control flow, at opset 13 or later. Its metadata names the
    values of the file's Constant nodes.

    Raises `ModelError` if onnx can't raise the opset, or the model holds what a graph can't.
    """
    model = name_early_norms(upgrade_model(model))
    graph = Graph.from_proto(model)
    constants = [o for n in model.graph.node if n.op_type == "Constant" for o in n.output]
    if constants:
        graph.metadata[CONSTANTS_KEY] = "\n".join([*constants, *graph.metadata.get(CONSTANTS_KEY, "").split("\n")])
    return graph


def write_graph(graph: Graph) -> onnx.ModelProto:
    """What `read_graph` has read, as a model that onnxruntime runs."""
    written = graph.copy()
    for node in written.nodes:
        node.domain = "" if node.op in EARLY_NORMS else node.domain  # where the kernels are
    return written.to_unlowered_proto()


def upgrade_model(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model at opset 13 or later. Raises `ModelError` if onnx can't convert it."""
    opset = read_opset(model)
    if not opset or opset >= _MIN_OPSET:
        return model
    try:
        from onnx import version_converter

        upgraded: onnx.ModelProto = version_converter.convert_version(name_early_norms(model), NORMAL_OPSET)
    except Exception as error:
        raise ModelError(
            f"the model's opset {opset} can't be raised to {NORMAL_OPSET} ({error_reason(error)})",
            hint=f"Export it again with opset_version={NORMAL_OPSET} or later.",
        ) from error
    _restore_softmaxes(upgraded)
    return upgraded


def _restore_softmaxes(model: onnx.ModelProto) -> None:
    """Write a softmax over the last axis as one node again: the converter, which knows fewer shapes, flattens it."""
    shapes, makers = file_shapes(model), {o: n for n in model.graph.node for o in n.output}
    for node in model.graph.node:
        softmax = makers.get(node.input[0]) if node.op_type == "Reshape" else None
        flat = makers.get(softmax.input[0]) if softmax is not None and softmax.op_type in _FLATTENED else None
        shape = makers.get(node.input[1]) if flat is not None and flat.op_type == "Flatten" else None
        if softmax is None or flat is None or shape is None or shape.op_type != "Shape":
            continue
        axis = next((a.i for a in flat.attribute if a.name == "axis"), 1)
        if shape.input[0] == flat.input[0] and len(shapes.get(flat.input[0], ())) == axis + 1:
            node.CopyFrom(helper.make_node(softmax.op_type, flat.input[:1], node.output, node.name, axis=axis))


def translate(graph: Graph, trace: Trace, notes: list[str]) -> None:
    """Rewrite the operators of a graph, whose shape arithmetic is folded, in the forms of opset 17.

    `trace` is that of the graph before. Raises `ModelError` if an operator has no form in opset 17.
    """
    read = {p.name for p in graph.outputs} | {i for n in graph.nodes for i in n.inputs}
    for node in graph.nodes:
        # Means and deviations; rules read no other nodes.
        while node.op in _NORMS and len(node.outputs) > 1 and node.outputs[-1] not in read:
            node.outputs.pop()
    graph.rewrite(_RULES, trace)
    for node in graph.nodes:
        if not node.domain and node.op not in COMPOSITES and graph.opset > NORMAL_OPSET:
            fit_opset(node, NORMAL_OPSET)
    frozen_norms = [n.name for n in graph.nodes if n.op == "BatchNormalization" and n.attrs.get("momentum") == 1]
    if frozen_norms:
        notes.append(
            f"Statistics of {len(frozen_norms)} batch normalisations are never updated, {frozen_norms[0]} among them: "
            "their momentum says so (torch's 0, or None, which ONNX can't express)."
        )
    graph.opset = NORMAL_OPSET


_Rule = Callable[[Graph, Node, Trace], None]


def _changing(rule: _Rule) -> _Rule:
    """A rule that changes a node, which stays."""

    def write(graph: Graph, node: Node, trace: Trace) -> None:
        rule(graph, node, trace)
        graph.nodes.append(node)

    return write


def _reduction(graph: Graph, node: Node, trace: Trace) -> None:
    """Write axes as an attribute, those of a sum as a constant. Without axes, and with `noop_with_empty_axes` set,
    nothing is reduced."""
    nothing = node.attrs.pop("noop_with_empty_axes", 0)
    constant = constant_input(graph, node, 1, "axes")
    axes = [] if constant is None else constant.reshape(-1).tolist()
    node.inputs = node.inputs[:1]
    if axes and node.op == "ReduceSum":
        node.inputs.append(graph.ints(*axes))
    elif axes:
        node.attrs["axes"] = axes
    elif nothing:
        node.op, node.attrs = "Identity", {}


def lower_reductions(graph: Graph) -> None:
    """Write a graph of a later opset in which only reductions have other forms at opset 17."""
    graph.rewrite(dict.fromkeys(REDUCTIONS, _changing(_reduction)), None)
    graph.opset = min(graph.opset, NORMAL_OPSET)


def _local_response(graph: Graph, node: Node, trace: Trace) -> None:
    """x / (bias + alpha · mean of neighbouring channels' squares)^beta: channels become an axis of an average pool."""
    x, size = node.inputs[0], int(node.attrs["size"])
    alpha, beta, bias = (float(node.attrs.get(k, d)) for k, d in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0)))
    channels = trace.shapes[x][1]
    rows = graph.emit("Reshape", graph.emit("Mul", x, x), graph.ints(0, 1, channels, -1))
    window = {"kernel_shape": [size, 1], "pads": [(size - 1) // 2, 0, size // 2, 0], "count_include_pad": 1}
    means = graph.emit("AveragePool", rows, attrs=window)
    means = graph.emit("Reshape", means, graph.ints(0, *(d or 0 for d in trace.dims(x)[1:])))
    spread = graph.emit("Add", graph.emit("Mul", means, graph.scalar(alpha)), graph.scalar(bias))
    graph.emit("Div", x, graph.emit("Pow", spread, graph.scalar(beta)), out=node.outputs[0])


def _batch_norm(graph: Graph, node: Node, trace: Trace) -> None:
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


def _norm(graph: Graph, node: Node, trace: Trace) -> None:
    """Count the axis from the end, and compute in float32."""
    rank = len(trace.shapes[node.inputs[0]])
    axis = int(node.attrs.get("axis", -1))
    node.attrs["axis"] = axis - rank if axis >= 0 else axis
    node.attrs.pop("stash_type", None)


def _split(graph: Graph, node: Node, trace: Trace) -> None:
    node.attrs.pop("num_outputs", None)
    if len(node.inputs) < 2 or not node.inputs[1]:
        axis = int(node.attrs.get("axis", 0))
        if any(trace.batched(o)[axis] for o in node.outputs if o):
            raise ModelError(f"operator Split ({node.name}) splits the batch", hint="Split another axis.")
        total, count = trace.shapes[node.inputs[0]][axis], len(node.outputs)
        # All parts are equally long but the last, as opset 18 defines num_outputs.
        chunk_size = -(-total // count)
        sizes = [chunk_size] * (count - 1) + [total - chunk_size * (count - 1)]
        node.inputs = [node.inputs[0], graph.ints(*sizes)]


def _gather(graph: Graph, node: Node, trace: Trace) -> None:
    """Cast indices of 32 bits: the gradient's ScatterND takes only those of 64."""
    indices = node.inputs[1]
    if indices not in graph.initializers and trace.dtypes[indices] == np.int32:
        node.inputs[1] = graph.emit("Cast", indices, attrs={"to": onnx.TensorProto.INT64})


def _grid_sample(graph: Graph, node: Node, trace: Trace) -> None:
    mode = node.attrs.get("mode", "bilinear")
    node.attrs["mode"] = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)


def _scatter(graph: Graph, node: Node, trace: Trace) -> None:
    if node.attrs.get("reduction") in ("min", "max"):
        what = f"attribute reduction of {node.op} ({node.name}) has no form in opset {NORMAL_OPSET}"
        raise ModelError(what, expected="add or mul", got=node.attrs["reduction"])


_NORMS = ("LayerNormalization", "RMSNormalization")

# Rules that change a node, which stays, and rules that write what stands in its place.
CHANGED: dict[str, _Rule] = {
    **dict.fromkeys((*REDUCTIONS, "ReduceSum"), _reduction),
    **dict.fromkeys(_NORMS, _norm),
    **dict.fromkeys(("ScatterND", "ScatterElements"), _scatter),
    "BatchNormalization": _batch_norm,
    "Gather": _gather,
    "GridSample": _grid_sample,
    "Split": _split,
}
REPLACED: dict[str, _Rule] = {
    "LRN": _local_response,
    "Col2Im": emit_fold,
    "DFT": emit_dft,
    "STFT": emit_stft,
    "Pad": emit_pad,
    "Resize": emit_resize,
}
_RULES = {**{op: _changing(rule) for op, rule in CHANGED.items()}, **REPLACED}
