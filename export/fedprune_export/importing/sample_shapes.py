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
from fedprune_export.ir.graph import Dim, Graph, Port, read_dims
from fedprune_export.ir.sample_inputs import sample_input


def bind_shape(proto: onnx.ModelProto, shape: Shape) -> None:
    """Set the free axes of a model's inputs to one sample's sizes. Of a length between bounds it is the upper one, and
    the bounds are noted in the metadata.

    Raises `ModelError` if no input with free axes takes such samples, or several have the axis whose length varies.
    """
    tensors = {t.name for t in proto.graph.initializer}
    inputs = {i.name: i for i in proto.graph.input if i.name not in tensors}
    length_axis, sizes = free_axis(shape), [int(size or 0) for size in upper_shape(shape)]
    dims = {name: read_dims(value) for name, value in inputs.items()}
    # mask and lengths are computed from the samples whose length varies.
    given = [name for name in inputs if length_axis is None or name not in (MASK, LENGTHS)]
    free = [name for name in given if _free_axes(dims[name])]
    bound = [name for name in free if _fits(dims[name], sizes, length_axis)]
    if not bound and not free and length_axis is None:
        return  # the file has its own sizes, with which the shape is compared later
    if not bound or (length_axis is not None and len(bound) > 1):
        where = "" if length_axis is None else f" with a free axis {length_axis + 1}"
        raise ModelError(
            "the input whose length varies" if where else "the shape of one sample",
            expected=f"one input {shape_text('n', *shape)}{where}",
            got=", ".join(f"{value_text(name)} {_dims_text(dims[name])}" for name in given),
        )
    sizes_of = {name: dict(zip(_sample_axes(dims[name]), sizes, strict=True)) for name in bound}
    # A symbol is one size in all shapes, and a mask is as long as the samples even under another symbol.
    symbols = {dims[name][axis]: size for name in bound for axis, size in sizes_of[name].items() if dims[name][axis]}
    if length_axis is not None:
        sizes_of.setdefault(MASK, {1: sizes[length_axis]})
    for name, value in inputs.items():
        for axis in _free_axes(dims[name]):
            size = sizes_of.get(name, {}).get(axis) or symbols.get(dims[name][axis])
            if size is not None:
                value.type.tensor_type.shape.dim[axis].dim_value = size
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
        axes, free = _sample_axes(port.shape), _free_axes(port.shape)
        if free:
            named = [f"axis {a}" + (f" ({value_text(port.shape[a])})" if port.shape[a] else "") for a in free]
            sample = ",".join(str(port.shape[a] or f"SIZE{a}") for a in axes)
            raise ModelError(
                f"sizes of input {name} are free: {', '.join(named)}",
                expected="fixed sizes of one sample",
                got=_dims_text(port.shape),
                hint=f"Give numbers for them with --input-shape {sample} (input_shape). One may be the bounds of a "
                "length, such as 400:16000.",
            )
        if isinstance(port.shape[0], int) and port.shape[0] < 1:
            raise ModelError(f"size of input {port.name}", expected="1 or more", got=list(port.shape))
        sample_input(Port(port.name, port.dtype, ("N", *(port.shape[a] for a in axes))), 1)


def _sample_axes(dims: Sequence[Dim]) -> list[int]:
    return [axis for axis in range(len(dims)) if axis != batch_axis(dims)]


def _free_axes(dims: Sequence[Dim]) -> list[int]:
    """The axes of a sample without a size."""
    return [axis for axis in _sample_axes(dims) if not isinstance(dims[axis], int)]


def _fits(dims: Sequence[Dim], sizes: Sequence[int], length_axis: int | None) -> bool:
    """Whether an input takes samples of these sizes; the axis whose length varies has to be free."""
    sample_dims = [dims[axis] for axis in _sample_axes(dims)]
    return (
        len(sample_dims) == len(sizes)
        and (length_axis is None or not isinstance(sample_dims[length_axis], int))
        and all(not isinstance(dim, int) or dim == size for dim, size in zip(sample_dims, sizes, strict=True))
    )


def _dims_text(dims: Sequence[Dim]) -> str:
    return shape_text(*(d or "?" for d in dims))
