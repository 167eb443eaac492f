"""Gradient rules of operators that pick elements by index, or put others around them: slices, gathers, padding."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.errors import ModelError
from fedprune_export.gradients.tape import Dim, Pull, Shape, Tape, describe, rule
from fedprune_export.graph import Node

Array = npt.NDArray[Any]

_FEW = 4
"""Up to this many picks of one element its gradient is a sum of gathers; beyond, a product with a 0/1 matrix."""


@rule("Slice")
def cut_out(tape: Tape, node: Node) -> Pull:
    """Ranges with any step along fixed axes, and whole runs of channels; the gradient is put back among zeros."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    starts, ends, chosen, strides = (tape.number(node, i) for i in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise ModelError(f"{describe(node)}: no range")
    axes = [int(a) % len(shape) for a in chosen] if chosen is not None else list(range(len(starts)))
    steps = [int(s) for s in strides] if strides is not None else [1] * len(axes)
    g = tape.graph
    out = list(shape)
    runs: list[tuple[int, Dim, Dim]] = []
    picks: list[tuple[int, range]] = []
    for a, start, end, step in zip(axes, starts, ends, steps, strict=True):
        size = tape.extent(shape[a])
        picked = range(size)[int(start) : int(end) : step]
        if not picked:
            raise ModelError(f"{describe(node)} cuts out nothing", got=f"{start}:{end}:{step} of {shape[a]}")
        if picked == range(size):
            continue
        if step == 1:
            begin, stop = _run(tape, node, a, picked)
            runs.append((a, begin, stop))
            out[a] = tape.dims.difference(stop, begin)
        else:
            tape.static(node, [shape[a]])
            picks.append((a, picked))
            out[a] = len(picked)
    y = x
    if runs:
        where = g.ints(*[r[0] for r in runs])
        y = g.emit("Slice", y, tape.sizes([r[1] for r in runs]), tape.sizes([r[2] for r in runs]), where)
    for a, picked in picks:
        last = picked.stop if picked.stop >= 0 else -(2**31)
        y = g.emit("Slice", y, g.ints(picked.start), g.ints(last), g.ints(a), g.ints(picked.step))
    tape.enter(node.outputs[0], y, tuple(out))

    def pull(dy: str) -> None:
        now = list(out)
        for a, picked in picks:
            dy = scattered(tape, dy, tuple(now), a, np.array(picked), tape.extent(shape[a]))
            now[a] = shape[a]
        if runs:
            pads: list[list[Dim]] = [[0] * len(shape), [0] * len(shape)]
            for a, begin, stop in runs:
                pads[0][a], pads[1][a] = begin, tape.dims.difference(shape[a], stop)
            dy = g.emit("Pad", dy, tape.sizes(pads[0] + pads[1]))
        tape.add(name, dy)

    return pull


def _run(tape: Tape, node: Node, axis: int, picked: range) -> tuple[Dim, Dim]:
    """Where a run of indices begins and stops at every width."""
    name = node.inputs[0]
    if isinstance(tape.shape(name)[axis], int):
        return picked.start, picked.stop
    found = tape.axis(name, axis)
    ends = [tape.prefix(found, n) if found is not None else None for n in (picked.start, picked.stop)]
    if ends[0] is None or ends[1] is None:
        raise ModelError(
            f"{describe(node)} cuts a run of channels, or the batch",
            expected="bounds between channel groups",
            got=f"{picked.start} to {picked.stop} of {tape.shape(name)[axis]}",
        )
    return ends[0], ends[1]


def scattered(tape: Tape, dy: str, shape: Shape, axis: int, picked: Array, size: int) -> str:
    """The gradient of a value of which elements were picked along an axis.

    Args:
        tape: The tape.
        dy: The gradient of what was picked.
        shape: Its shape.
        axis: The axis.
        picked: Which indices were picked, in order; some maybe several times or never.
        size: How many indices the axis had before.
    """
    g, count = tape.graph, len(picked)
    if np.array_equal(picked, np.arange(picked[0], picked[0] + count)):
        pads = [0] * (2 * len(shape))
        pads[axis], pads[len(shape) + axis] = int(picked[0]), size - int(picked[-1]) - 1
        return g.emit("Pad", dy, g.ints(*pads)) if any(pads) else dy
    uses = np.bincount(picked, minlength=size)
    if uses.max() > _FEW:
        last = len(shape) - 1
        order = [*(i for i in range(len(shape)) if i != axis), axis]
        moved = g.emit("Transpose", dy, attrs={"perm": order}) if axis != last else dy
        matrix = (picked[:, None] == np.arange(size)).astype(np.float32)
        spread = g.emit("MatMul", moved, g.constant(matrix, np.float32))
        return g.emit("Transpose", spread, attrs={"perm": np.argsort(order).tolist()}) if axis != last else spread
    whole = dy
    if uses.min() < uses.max():
        pads = [0] * (2 * len(shape))
        pads[len(shape) + axis] = 1  # an index of a zero, for elements that were picked less often
        whole = g.emit("Pad", dy, g.ints(*pads))
    total = ""
    places = np.argsort(picked, kind="stable")
    first = np.concatenate([[0], np.cumsum(uses)])[:-1]
    for turn in range(int(uses.max())):
        at = np.where(uses > turn, places[np.minimum(first + turn, count - 1)], count)
        part = g.emit("Gather", whole, g.constant(at, np.int64), attrs={"axis": axis})
        total = g.emit("Add", total, part) if total else part
    return total


@rule("Gather")
def gather(tape: Tape, node: Node) -> Pull:
    """Rows by constant indices, or an embedding by data; the gradients of equal indices add up."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    constant = tape.constant(node, 1)
    (size,) = tape.static(node, [shape[axis]])
    if constant is None:
        return _embedding(tape, node, axis)
    picked = np.where(constant < 0, constant + size, constant).astype(np.int64)
    g = tape.graph
    out = (*shape[:axis], *picked.shape, *shape[axis + 1 :])
    y = g.emit("Gather", x, g.constant(picked, np.int64), attrs={"axis": axis})
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        flat = (*shape[:axis], picked.size, *shape[axis + 1 :])
        dy = g.emit("Unsqueeze", dy, g.ints(axis)) if picked.ndim == 0 else tape.reshape(dy, out, flat)
        tape.add(name, scattered(tape, dy, flat, axis, picked.reshape(-1), size))

    return pull


def _embedding(tape: Tape, node: Node, axis: int) -> Pull:
    """Rows by indices that are data."""
    name, index = node.inputs
    x, shape, places = tape.value(name), tape.shape(name), tape.value(index)
    where = tape.shape(index)
    g = tape.graph
    out = (*shape[:axis], *where, *shape[axis + 1 :])
    tape.enter(node.outputs[0], g.emit("Gather", x, places, attrs={"axis": axis}), out)

    def pull(dy: str) -> None:
        # With the indexed axis first, rows are added to zeros where they came from.
        inner = list(range(axis, axis + len(where)))
        order = inner + [i for i in range(len(out)) if i not in inner]
        rows = g.emit("Transpose", dy, attrs={"perm": order}) if axis else dy
        first = [axis, *(i for i in range(len(shape)) if i != axis)]
        zeros = g.emit("ConstantOfShape", tape.sizes([shape[i] for i in first]))
        at = g.emit("Unsqueeze", places, g.ints(-1))
        total = g.emit("ScatterND", zeros, at, rows, attrs={"reduction": "add"})
        tape.add(name, g.emit("Transpose", total, attrs={"perm": np.argsort(first).tolist()}) if axis else total)

    return pull


@rule("GatherElements")
def gather_elements(tape: Tape, node: Node) -> Pull:
    """One element per index along a fixed axis; the gradients of equal indices add up."""
    name, index = node.inputs
    x, shape, places = tape.value(name), tape.shape(name), tape.value(index)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    tape.static(node, [shape[axis]])
    g = tape.graph
    y = g.emit("GatherElements", x, places, attrs={"axis": axis})
    tape.enter(node.outputs[0], y, tape.shape(index))
    return lambda dy: tape.add(name, _added(tape, x, places, dy, axis))


def _added(tape: Tape, x: str, places: str, dy: str, axis: int) -> str:
    """Zeros like a value, with gradients added where they came from along an axis."""
    g = tape.graph
    zeros = g.emit("ConstantOfShape", tape.shape_of(x))
    return g.emit("ScatterElements", zeros, places, dy, attrs={"axis": axis, "reduction": "add"})


@rule("GatherND")
def gather_nd(tape: Tape, node: Node) -> Pull:
    """Slices by tuples of indices into the leading axes; the gradients of equal tuples add up."""
    name, index = node.inputs
    x, shape, places = tape.value(name), tape.shape(name), tape.value(index)
    where = tape.shape(index)
    batches = int(node.attrs.get("batch_dims", 0))
    depth = where[-1]
    if not isinstance(depth, int):
        raise ModelError(f"{describe(node)}: length of an index", expected="a number", got=depth)
    tape.static(node, shape[batches : batches + depth])
    g = tape.graph
    out = (*where[:-1], *shape[batches + depth :])
    tape.enter(node.outputs[0], g.emit("GatherND", x, places, attrs={"batch_dims": batches}), out)

    def pull(dy: str) -> None:
        at = places
        for axis in reversed(range(batches)):
            # Scattering knows no batches: an index says its place in them, too.
            numbers = _counted(tape, shape[axis])
            ones = [1] * len(where)
            ones[axis] = -1
            column = g.emit("Reshape", numbers, g.ints(*ones))
            head = tape.sizes([*where[:-1], 1])
            at = g.emit("Concat", g.emit("Expand", column, head), at, attrs={"axis": -1})
        zeros = g.emit("ConstantOfShape", tape.shape_of(x))
        tape.add(name, g.emit("ScatterND", zeros, at, dy, attrs={"reduction": "add"}))

    return pull


def _counted(tape: Tape, dim: Dim) -> str:
    """0, 1, 2 and so on up to a dimension's size."""
    g = tape.graph
    if isinstance(dim, int):
        return g.ints(*range(dim))
    ones = g.emit("ConstantOfShape", tape.size(dim), attrs={"value": np.ones(1, np.int64)})
    return g.emit("CumSum", ones, g.constant(0, np.int64), attrs={"exclusive": 1})


@rule("TopK")
def largest(tape: Tape, node: Node) -> Pull:
    """The largest or smallest elements along a fixed axis; each one's gradient goes back to its place."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", -1)) % len(shape)
    count = tape.number(node, 1)
    if count is None:
        raise ModelError(f"{describe(node)}: no count")
    tape.static(node, [shape[axis]])
    g, k = tape.graph, int(count.reshape(-1)[0])
    values, places = g.emit_many("TopK", x, g.ints(k), outputs=2, attrs=node.attrs)
    out = (*shape[:axis], k, *shape[axis + 1 :])
    for output, value in zip(node.outputs, (values, places), strict=False):
        if output:
            tape.enter(output, value, out)

    def pull(dy: str | None, *_: object) -> None:
        if dy:
            tape.add(name, _added(tape, x, places, dy, axis))

    return pull


@rule("Pad")
def pad(tape: Tape, node: Node) -> Pull:
    """A constant around any axes (negative pads cut), or fixed axes reflected or their edges repeated."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    mode = str(node.attrs.get("mode", "constant"))
    given, value, chosen = (tape.number(node, i) for i in (1, 2, 3))
    if given is None:
        raise ModelError(f"{describe(node)}: no pads")
    axes = [int(a) % len(shape) for a in chosen] if chosen is not None else list(range(len(shape)))
    half = len(given) // 2
    pads = np.zeros((2, len(shape)), np.int64)
    for k, a in enumerate(axes):
        pads[0, a], pads[1, a] = given[k], given[half + k]
    if mode != "constant":
        return _mirrored(tape, node, pads, mode)
    for a in range(len(shape)):
        if (pads[:, a] < 0).any():
            tape.static(node, [shape[a]])
    out = tuple(tape.total([d, int(pads[:, a].sum())]) for a, d in enumerate(shape))
    g = tape.graph
    fill = [g.scalar(float(value.reshape(-1)[0]))] if value is not None and value.size else []
    y = g.emit("Pad", x, g.ints(*pads.reshape(-1).tolist()), *fill)
    tape.enter(node.outputs[0], y, out)
    return lambda dy: tape.add(name, g.emit("Pad", dy, g.ints(*(-pads).reshape(-1).tolist())))


_MIRRORS: tuple[Literal["reflect", "edge", "wrap"], ...] = ("reflect", "edge", "wrap")


def _mirrored(tape: Tape, node: Node, pads: Array, mode: str) -> Pull:
    """Padding with elements of the value itself: axis by axis they are picked."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    how = next((m for m in _MIRRORS if m == mode), None)
    if how is None:
        raise ModelError(f"{describe(node)}: padding mode", expected=["constant", *_MIRRORS], got=mode)
    padded = [a for a in range(len(shape)) if pads[:, a].any()]
    picks = {}
    for a in padded:
        (size,) = tape.static(node, [shape[a]])
        picks[a] = _indices(node, np.arange(size), int(pads[0, a]), int(pads[1, a]), how)
    g = tape.graph
    steps: list[tuple[int, Shape]] = []
    now, y = list(shape), x
    for a in padded:
        y = g.emit("Gather", y, g.constant(picks[a], np.int64), attrs={"axis": a})
        now[a] = len(picks[a])
        steps.append((a, tuple(now)))
    tape.enter(node.outputs[0], y, tuple(now))

    def pull(dy: str) -> None:
        for a, after in reversed(steps):
            dy = scattered(tape, dy, after, a, picks[a], tape.extent(shape[a]))
        tape.add(name, dy)

    return pull


def _indices(node: Node, own: Array, before: int, after: int, mode: Literal["reflect", "edge", "wrap"]) -> Array:
    """Which elements a padded axis consists of."""
    kept = own[max(0, -before) : len(own) - max(0, -after)]
    before, after = max(0, before), max(0, after)
    if mode == "reflect" and max(before, after) >= len(kept):
        raise ModelError(f"{describe(node)} reflects more than there is", expected=f"under {len(kept)}", got=before)
    picked: Array = np.pad(kept, (before, after), mode=mode)
    return picked
