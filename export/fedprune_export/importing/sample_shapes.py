"""Fixes the sizes that a file leaves free, by one sample's shape, and refuses those that stay free."""

from __future__ import annotations

import json
from collections.abc import Sequence

import onnx

from fedprune.core.errors import ModelError, shape_text, value_text
from fedprune.model.lengths import Lengths, Shape, free_axis, upper_shape
from fedprune_export.importing import metadata
from fedprune_export.importing.batches.layout import batch_axis
from fedprune_export.importing.lengths import FREE_INPUT_KEY, LENGTHS, MASK
from fedprune_export.ir.graph import Dim, Graph, read_dims
from fedprune_export.ir.sample_inputs import sample_input


def bind_shape(proto: onnx.ModelProto, shape: Shape) -> None:
    """Set the free axes of a model's inputs to one sample's sizes. Of a length between bounds it is the upper one, and
    the bounds are noted in the metadata.

    Raises `ModelError` if no input with free axes takes such samples, or several have the axis whose length varies.
    """
    initializer_names = {t.name for t in proto.graph.initializer}
    inputs = [i for i in proto.graph.input if i.name not in initializer_names]
    length_axis, sizes = free_axis(shape), [int(size or 0) for size in upper_shape(shape)]
    # mask and lengths are computed from the samples whose length varies.
    given = [i for i in inputs if length_axis is None or i.name not in (MASK, LENGTHS)]
    dims = {i.name: read_dims(i) for i in inputs}
    free = {i.name: axes for i in given if (axes := _free_axes(dims[i.name]))}
    bound = [name for name in free if _fits(dims[name], sizes, length_axis)]
    if not bound and not free and length_axis is None:
        return  # the file has its own sizes, with which the shape is compared later
    if not bound or (length_axis is not None and len(bound) > 1):
        what = "the shape of one sample" if length_axis is None else "the input whose length varies"
        where = "" if length_axis is None else f" with a free axis {length_axis + 1}"
        raise ModelError(
            what,
            expected=f"one input {shape_text('n', *shape)}{where}" if bound or where else shape_text("n", *shape),
            got=", ".join(f"{value_text(i.name)} {_dims_text(dims[i.name])}" for i in given),
        )
    symbols = {
        dims[name][a]: size for name in bound for a, size in _sizes_by_axis(dims[name], sizes) if a in free[name]
    }
    for value in inputs:
        own = dict(_sizes_by_axis(dims[value.name], sizes)) if value.name in bound else {}
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            before = dims[value.name][axis]
            if isinstance(before, int) or axis == batch_axis(dims[value.name]):
                continue
            # A symbol is one size in all shapes, and a mask is as long as the samples even under another symbol.
            is_mask = value.name == MASK and axis == 1 and length_axis is not None
            size = own.get(axis) or (symbols.get(before) if before else None)
            if size is None and is_mask and length_axis is not None:
                size = sizes[length_axis]
            if size is not None:
                dim.dim_value = size
    # Shapes of inner values may contain the axis, too; they are inferred again.
    del proto.graph.value_info[:]
    _squeeze_frame_lengths(proto.graph)
    if length_axis is not None:
        bounds = shape[length_axis]
        min_length = bounds.lower if isinstance(bounds, Lengths) else 1
        metadata.write_properties(proto, {FREE_INPUT_KEY: json.dumps([bound[0], length_axis, min_length])})


def _squeeze_frame_lengths(graph: onnx.GraphProto) -> None:
    """Let frame lengths of STFTs be scalars: onnxruntime takes them with an axis, too, but only at free sizes."""
    for i, node in reversed([*enumerate(graph.node)]):
        if node.op_type == "STFT" and len(node.input) > 3 and node.input[3]:
            scalar = f"{node.input[3]}~{i}"
            graph.node.insert(i, onnx.helper.make_node("Squeeze", [node.input[3]], [scalar]))
            graph.node[i + 1].input[3] = scalar


def check_sizes(graph: Graph) -> None:
    """Refuse inputs without a batch, with free sizes behind it, or with sizes that no sample has (`ModelError`)."""
    for port in graph.inputs:
        name = value_text(port.name)
        if not port.shape:
            hint = "Export the model with a first dimension for the batch."
            raise ModelError(f"input {name} has no axis for the batch", expected="[n, ...]", got=[], hint=hint)
        free = _free_axes(port.shape)
        if free:
            named = [f"axis {a}" + (f" ({value_text(port.shape[a])})" if port.shape[a] else "") for a in free]
            sample = [d or f"SIZE{a}" for a, d in enumerate(port.shape) if a != batch_axis(port.shape)]
            raise ModelError(
                f"sizes of input {name} are free: {', '.join(named)}",
                expected="fixed sizes of one sample",
                got=_dims_text(port.shape),
                hint=f"Give numbers for them with --input-shape {','.join(map(str, sample))} (input_shape). One may be "
                "the bounds of a length, such as 400:16000.",
            )
        sizes = [d for a, d in enumerate(port.shape) if a != batch_axis(port.shape)]
        first = [d for d in port.shape[:1] if isinstance(d, int)]
        if any(d < 1 for d in first):
            raise ModelError(f"size of input {port.name}", expected="1 or more", got=list(port.shape))
        sample_input(type(port)(port.name, port.dtype, ("N", *sizes)), 1)


def _free_axes(dims: Sequence[Dim]) -> list[int]:
    """The axes without a size, besides the batch."""
    return [a for a, d in enumerate(dims) if not isinstance(d, int) and a != batch_axis(dims)]


def _sizes_by_axis(dims: Sequence[Dim], sizes: Sequence[int]) -> list[tuple[int, int]]:
    axes = [a for a in range(len(dims)) if a != batch_axis(dims)]
    return [(a, size) for a, size in zip(axes, sizes, strict=False)]


def _fits(dims: Sequence[Dim], sizes: Sequence[int], length_axis: int | None) -> bool:
    """Whether an input takes samples of these sizes; the axis whose length varies has to be free."""
    if len(dims) != len(sizes) + 1:
        return False
    pairs = [(dims[a], size) for a, size in _sizes_by_axis(dims, sizes)]
    is_free = length_axis is None or not isinstance(pairs[length_axis][0], int)
    return is_free and all(not isinstance(dim, int) or dim == size for dim, size in pairs)


def _dims_text(dims: Sequence[Dim]) -> str:
    return shape_text(*(d or "?" for d in dims))
