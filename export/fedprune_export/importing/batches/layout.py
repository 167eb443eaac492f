"""Finds the axis of each input that holds the batch, and moves it to the front."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from fedprune.core.errors import ModelError, shape_text, value_text
from fedprune_export.importing.raw_file import BatchLayout
from fedprune_export.ir.graph import Dim, Graph, Port

_BATCH_NAME = re.compile(r"n|b|bs|.*batch.*|(num_?)?samples?", re.IGNORECASE)
_LENGTH_NAME = re.compile(r"[tlshw]|.*(seq|len|time|step|frame|token|height|width).*", re.IGNORECASE)


def batch_axis(shape: Sequence[Dim]) -> int:
    """The axis of an input that holds the batch, 0 or 1, by the names of its free axes."""
    if len(shape) < 2 or isinstance(shape[1], int):
        return 0
    first, second = shape[:2]
    if _is_name(_BATCH_NAME, second) and not _is_name(_BATCH_NAME, first):
        return 1
    # With one sample first, a free second axis is more likely a length.
    is_second_only = isinstance(first, int) and first > 1 and all(isinstance(size, int) for size in shape[2:])
    return 1 if is_second_only and not _is_name(_LENGTH_NAME, second) else 0


def possible_layouts(graph: Graph) -> Iterator[BatchLayout]:
    """Layouts that the inputs' shapes allow, the most likely first.

    Raises `ModelError` if the inputs have no batch of the same size.
    """
    ports = {port.name: port.shape for port in graph.inputs}
    axes = {name: batch_axis(shape) for name, shape in ports.items()}
    if all(not isinstance(shape[axes[name]], int) for name, shape in ports.items()):
        yield BatchLayout(None, axes)
        return
    if len(ports) == 1:
        ((name, shape),) = ports.items()
        # [T, 1, features] is most likely a series of one sample, as torch's recurrent layers take it.
        second = len(shape) > 2 and isinstance(shape[1], int) and axes[name] == 0
        axis_order = [axes[name]] if not second else [1, 0] if shape[1] == 1 and len(shape) == 3 else [0, 1]
        for axis in axis_order:
            size = shape[axis]
            if isinstance(size, int):
                yield BatchLayout(size, {name: axis})
        return
    # Initial states of recurrent layers are [layers, n, features], next to inputs [n, ...]. An input whose batch is
    # free takes any.
    fixed = {name: shape for name, shape in ports.items() if isinstance(shape[axes[name]], int)}
    common = set.intersection(*({d for d in shape[:2] if isinstance(d, int)} for shape in fixed.values()))
    firsts = [shape[0] for shape in fixed.values()]
    for size in sorted(common, key=lambda size: (-firsts.count(size), size)):
        yield BatchLayout(size, axes | {name: shape[:2].index(size) for name, shape in fixed.items()})
    if not common:
        raise ModelError(
            "the batch of the inputs",
            expected="the same number of samples on the first or second axis of each input",
            got=", ".join(
                f"{value_text(name)} {shape_text(*(d or '?' for d in shape))}" for name, shape in ports.items()
            ),
            hint="Export the model with a dynamic batch.",
        )


def move_batch_first(graph: Graph, layout: BatchLayout) -> Graph:
    """A graph whose inputs have the batch as their first axis, of the layout's size or free."""
    moved = graph.copy()
    for index, port in enumerate(graph.inputs):
        axis = layout.inputs[port.name]
        shape = [d for a, d in enumerate(port.shape) if a != axis]
        size: Dim = layout.size if layout.size is not None else "N"
        moved.inputs[index] = Port(port.name, port.dtype, (size, *shape))
        if axis:
            value = moved.fresh(port.name)
            moved.rename({port.name: value})
            moved.emit("Transpose", port.name, attrs={"perm": [1, 0, *range(2, len(port.shape))]}, out=value)
            moved.nodes.insert(0, moved.nodes.pop())
    return moved


def move_outputs_first(graph: Graph, axes: Mapping[str, int]) -> None:
    """Move the batch of outputs from the axes that hold it to the front; the graph is changed."""
    for port in graph.outputs:
        if axis := axes[port.name]:
            value = graph.fresh(port.name)
            graph.rename({port.name: value})
            order = [axis, *(a for a in range(len(port.shape)) if a != axis)]
            graph.emit("Transpose", value, attrs={"perm": order}, out=port.name)
            graph.nodes[-1].name = graph.fresh("Transpose")  # the node before may be named after the output


def _is_name(pattern: re.Pattern[str], dim: Dim) -> bool:
    return isinstance(dim, str) and pattern.fullmatch(dim) is not None
