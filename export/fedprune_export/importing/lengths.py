"""Handles an input whose length varies between bounds: the graph computes mask and lengths from the padding."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx

from fedprune.core.errors import ModelError, shape_text, value_text
from fedprune.core.validation import check_instance, check_whole
from fedprune.model.lengths import LENGTH_METADATA, Lengths, Shape, free_axis, padding_value
from fedprune_export.importing import metadata
from fedprune_export.ir.graph import Graph, Port, decode_metadata

# Key of a file's metadata that holds [name, axis of one sample, least length] of the input whose length varies.
FREE_INPUT_KEY = "fedprune.free_input"

# Inputs that the graph computes: 1 at positions of a sample and 0 in its padding [N, length], and lengths [N].
MASK, LENGTHS = "mask", "lengths"


def read_shape(sizes: object, where: str = "input_shape") -> Shape:
    """One sample's shape from sizes, of which one may be the bounds of a length, such as `400:16000`.

    Raises `ModelError` if it is something else.
    """
    check_instance(where, sizes, (list, tuple), "a list of sizes", error=ModelError)
    shape = tuple(
        Lengths.parse(size, ModelError)
        if isinstance(size, str)
        else size
        if isinstance(size, Lengths)
        else check_whole(f"{where}: a size", size, 1, error=ModelError)
        for size in (sizes if isinstance(sizes, (list, tuple)) else ())
    )
    if sum(isinstance(size, Lengths) for size in shape) > 1:
        raise ModelError(where, expected="at most one length between bounds", got=shape_text(*shape))
    return shape


class FreeInput(NamedTuple):
    """The input whose length varies: its name, the axis of one sample, and the least length."""

    name: str
    axis: int
    min_length: int


def free_input(shapes: Mapping[str, Shape]) -> FreeInput | None:
    """The input whose length varies; None if all are fixed.

    Raises `ModelError` if several do.
    """
    free = [(name, axis) for name, shape in shapes.items() if (axis := free_axis(shape)) is not None]
    if len(free) > 1:
        raise ModelError("inputs whose length varies", expected="one", got=metadata.shown_names([n for n, _ in free]))
    for name, axis in free:
        bounds = shapes[name][axis]
        if isinstance(bounds, Lengths):
            return FreeInput(name, axis, bounds.lower)
    return None


def compute_lengths(graph: Graph, notes: list[str]) -> None:
    """Compute the inputs `mask` and `lengths` from the padding of samples, and replace the padding by zeros.

    Raises `ModelError` if the metadata, or an input, isn't as expected.
    """
    free = decode_metadata(graph.metadata, FREE_INPUT_KEY, FreeInput, "[name, axis, length]")
    if free is None:
        return
    del graph.metadata[FREE_INPUT_KEY]
    port, axis, min_length = _check_free_input(graph, free)
    max_length = port.shape[axis + 1]
    first = len(graph.nodes)
    real = _zero_padding(graph, port, axis)
    computed_ports = [p for p in graph.inputs if p.name in (MASK, LENGTHS) and p is not port]
    for computed_port in computed_ports:
        shape = (max_length,) if computed_port.name == MASK else ()
        dtype = computed_port.dtype
        if dtype is None or tuple(computed_port.shape[1:]) != shape or dtype.kind not in "fib":
            got = f"{dtype} {shape_text(*computed_port.shape)}"
            raise ModelError(f"input {computed_port.name}", expected=f"numbers {shape_text('n', *shape)}", got=got)
        value = real
        if computed_port.name == LENGTHS:
            ones = graph.emit("Cast", real, attrs={"to": onnx.TensorProto.INT64})
            value = graph.emit("ReduceSum", ones, graph.ints(1), attrs={"keepdims": 0})
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        graph.emit("Cast", value, attrs={"to": kind}, out=computed_port.name)
    graph.inputs[:] = [p for p in graph.inputs if p not in computed_ports]
    if len(graph.inputs) > 1:
        got = metadata.shown_names([p.name for p in graph.inputs])
        raise ModelError("inputs next to one whose length varies", expected=f"{MASK} or {LENGTHS} alone", got=got)
    # The added nodes compute the inputs of all others, so they go first.
    graph.nodes[:] = [*graph.nodes[first:], *graph.nodes[:first]]
    graph.metadata[LENGTH_METADATA] = json.dumps([axis, min_length])
    computed = " and ".join(p.name for p in computed_ports)
    rest = f"the graph computes {computed}" if computed else "the model reads neither mask nor lengths"
    notes.append(f"Samples of input {port.name} are {min_length:,} to {max_length:,} long; {rest}.")


def _zero_padding(graph: Graph, port: Port, axis: int) -> str:
    """Let all nodes read the input with zeros in place of the padding.

    Returns the name of a mask [N, length], true where a sample has data.
    """
    zero = graph.constant(0, port.dtype)
    # Samples are padded with a number larger than any that they hold (`model.lengths.mark`).
    real = graph.emit("Less", port.name, graph.constant(padding_value(port.dtype), port.dtype))
    cleaned = graph.emit("Where", real, port.name, zero)
    for node in graph.nodes[:-2]:
        node.inputs = [cleaned if name == port.name else name for name in node.inputs]
    other_axes = [a for a in range(1, len(port.shape)) if a != axis + 1]
    if not other_axes:
        return real
    count = len(other_axes)
    ends = graph.ints(*[0] * count), graph.ints(*[1] * count), graph.ints(*other_axes)
    return graph.emit("Squeeze", graph.emit("Slice", real, *ends), graph.ints(*other_axes))


def _check_free_input(graph: Graph, free: FreeInput) -> tuple[Port, int, int]:
    name, axis, min_length = free
    port = next((p for p in graph.inputs if p.name == name), None)
    if port is None or port.dtype not in (np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32)):
        got = value_text(name) if port is None else f"{value_text(name)} of {port.dtype}"
        raise ModelError("the input whose length varies", expected="an input of float32 or int64", got=got)
    axis = check_whole(f"metadata {FREE_INPUT_KEY}: axis", axis, 0, len(port.shape) - 2, error=ModelError)
    max_length = check_whole("size of the axis whose length varies", port.shape[axis + 1], 1, error=ModelError)
    return port, axis, check_whole(f"metadata {FREE_INPUT_KEY}: length", min_length, 1, max_length, error=ModelError)
