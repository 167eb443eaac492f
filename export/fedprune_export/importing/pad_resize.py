"""Writes Pad and Resize in one form each: later defaults become explicit, sizes become scales where that is exact."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.importing.constants import constant_input
from fedprune_export.ir.axis_matrix import axis_matrix
from fedprune_export.ir.graph import NORMAL_OPSET, Array, Graph, Node
from fedprune_export.ir.trace import Trace


def emit_pad(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a Pad with pads of all axes; mode "wrap" becomes a concatenation.

    Raises `ModelError` if pads of some axes, or of "wrap", are computed.
    """
    x, pads, value, _ = [*node.inputs, "", "", ""][:4]
    axes = constant_input(graph, node, 3, "axes")
    if axes is not None:
        listed_pads = constant_input(graph, node, 1, "pads of some axes")
        full = np.zeros((2, len(trace.shapes[x])), np.int64)
        full[:, axes.reshape(-1).tolist()] = 0 if listed_pads is None else listed_pads.reshape(2, -1)
        pads = graph.ints(*full.reshape(-1).tolist())
        node.inputs = [x, pads, value] if value else [x, pads]
    if node.attrs.get("mode") == "wrap":
        _emit_wrap(graph, node, x, pads, trace)
        return
    graph.nodes.append(node)


def _emit_wrap(graph: Graph, node: Node, x: str, pads: str, trace: Trace) -> None:
    if pads not in graph.initializers:
        raise ModelError(f"operator Pad ({node.name}) takes computed pads", expected="constant pads")
    table = graph.initializers[pads].reshape(2, -1)
    for axis, (before, after) in enumerate(table.T.tolist()):
        if not before and not after:
            continue
        if trace.batched(x)[axis] if x in trace.shapes else axis == 0:
            raise ModelError(f"operator Pad ({node.name}) wraps the batch")
        size = trace.shapes[node.inputs[0]][axis]
        # A pad longer than the axis would need the value several times.
        if not (0 <= before <= size and 0 <= after <= size):
            raise ModelError(f"operator Pad ({node.name}) wraps more than once", expected=f"pads up to {size}")
        segments = [x]
        if before:
            segments.insert(0, graph.emit("Slice", x, graph.ints(size - before), graph.ints(size), graph.ints(axis)))
        if after:
            segments.append(graph.emit("Slice", x, graph.ints(0), graph.ints(after), graph.ints(axis)))
        x = graph.emit("Concat", *segments, attrs={"axis": axis})
    graph.emit("Identity", x, out=node.outputs[0])


def drop_empty_scales(graph: Graph) -> None:
    """Leave out arguments of a Resize without numbers: files of opsets 11 and 12 have empty scales beside sizes."""
    for node in graph.nodes:
        if node.op == "Resize" and not node.domain:
            empty = {i for i in node.inputs[1:] if i in graph.initializers and not graph.initializers[i].size}
            node.inputs = ["" if i in empty else i for i in node.inputs]


def emit_resize(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a Resize with one scale per axis if scales give the same values, else with its own sizes.

    Raises `ModelError` if it uses what opset 17 doesn't have.
    """
    attrs: dict[str, Any] = node.attrs
    positions = attrs.get("coordinate_transformation_mode")
    if attrs.get("antialias", 0) or positions == "half_pixel_symmetric":
        _emit_products(graph, node, trace)
        return
    attrs.pop("keep_aspect_ratio_policy", None)
    if positions != "tf_crop_and_resize":
        _write_amounts(graph, node, trace, attrs.pop("axes", None))
    graph.nodes.append(node)


def _write_amounts(graph: Graph, node: Node, trace: Trace, axes: Sequence[int] | None) -> None:
    """Write scales of all axes, or sizes behind those of x, since opset 17 has none of some axes."""
    before, after = trace.dims(node.inputs[0]), trace.dims(node.outputs[0])
    scales = graph.initializers.get(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    if scales is None:
        scales = _exact_scales(before, after)
    elif axes is not None:
        full = np.ones(len(before), np.float32)
        full[list(axes)] = scales
        scales = full
    if scales is not None:
        node.inputs = [node.inputs[0], "", graph.constant(scales, np.float32)]
        return
    sizes = node.inputs[3]
    if axes is None and sizes in graph.initializers:
        # The batch and the channels, which may be cut, keep their sizes.
        axes, sizes = range(2, len(before)), graph.ints(*graph.initializers[sizes].tolist()[2:])
    if axes is not None:
        first = len(before) - len(axes)
        if [a % len(before) for a in axes] != list(range(first, len(before))):
            raise _no_form(node, "sizes of some axes", "those of the last axes")
        leading = graph.emit("Shape", node.inputs[0], attrs={"start": 0, "end": first})
        node.inputs[3] = graph.emit("Concat", leading, sizes, attrs={"axis": 0})


def _emit_products(graph: Graph, node: Node, trace: Trace) -> None:
    """Write a form of resizing that opset 17 lacks as products with one matrix for each of the last two axes.

    Raises `ModelError` if other axes are resized, or sizes are computed.
    """
    x, before, after = node.inputs[0], trace.dims(node.inputs[0]), trace.dims(node.outputs[0])
    rank = len(before)
    attrs = {k: v for k, v in node.attrs.items() if k not in ("axes", "keep_aspect_ratio_policy")}
    axes = [a % rank for a in node.attrs.get("axes", range(rank))]
    scales = graph.initializers.get(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    by_axis = dict(zip(axes, scales.reshape(-1).tolist(), strict=True)) if scales is not None else {}
    keeps_leading = all(b == a for b, a in zip(before[: rank - 2], after[: rank - 2], strict=True))
    if not keeps_leading or node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise _no_form(node, "antialias or half_pixel_symmetric", "resizing of the last two axes")
    for axis in range(rank - 2, rank):
        old, new = before[axis], after[axis]
        if old is None or new is None:
            raise _no_form(node, "antialias or half_pixel_symmetric", "constant sizes")
        matrix = axis_matrix(attrs, old, by_axis.get(axis), new, graph.opset)
        if axis == rank - 2:
            x = graph.emit("MatMul", graph.constant(matrix, np.float32), x)
        else:
            graph.emit("MatMul", x, graph.constant(matrix.T, np.float32), out=node.outputs[0])


def _exact_scales(before: Sequence[int | None], after: Sequence[int | None]) -> Array | None:
    """The scales that give these sizes; None if rounding makes one too small, or an axis depends on the batch."""
    scales = np.ones(len(before), np.float32)
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if old is not None and new is not None:
            scales[axis] = np.float32(new) / np.float32(old)
            if int(old * float(scales[axis])) != new:
                return None
        elif axis:  # the batch itself keeps its size
            return None
    return scales


def _no_form(node: Node, what: str, expected: str) -> ModelError:
    return ModelError(
        f"{what} of operator {node.op} ({node.name}) has no form in opset {NORMAL_OPSET}",
        expected=expected,
        hint=f"Export the model with opset_version={NORMAL_OPSET}, and resize the last axes to constant sizes.",
    )
