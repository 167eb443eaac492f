"""Gradient rules of operators that pick or write elements by index: slices, gathers, scatters, masks, one-hot, pads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune.model.architecture import FIXED
from fedprune_export.autodiff.tape import BATCH, Dim, Pull, Shape, Tape, describe, rule
from fedprune_export.ir.graph import Node

Array = npt.NDArray[Any]


@rule("ScatterND", "ScatterElements")
def scatter(tape: Tape, node: Node) -> Pull:
    """Updates written or added at places; they get dy from there, the data gets it elsewhere, or everywhere."""
    data, index, updates = node.inputs
    x, places, new = (tape.value(n) for n in node.inputs)
    reduction = str(node.attrs.get("reduction", "none"))
    if reduction not in ("none", "add"):
        raise ModelError(f"{describe(node)}: how it scatters", expected=["none", "add"], got=reduction)
    if node.op == "ScatterElements":
        axis = int(node.attrs.get("axis", 0)) % len(tape.shape(data))
        tape.static(node, [tape.shape(data)[axis]])
        where = {"axis": axis}
    else:
        depth = tape.shape(index)[-1]
        looked = tape.shape(data)[: depth if isinstance(depth, int) else 0]
        tape.static(node, [depth, *(d for d in looked if d != BATCH)])
        where = {}
    g = tape.graph
    tape.enter(node.outputs[0], g.emit(node.op, x, places, new, attrs=node.attrs), tape.shape(data))

    def pull(dy: str) -> None:
        if tape.wants(data):
            zeros = g.emit("ConstantOfShape", tape.shape_of(new))
            tape.add(data, dy if reduction == "add" else g.emit(node.op, dy, places, zeros, attrs=where))
        if tape.wants(updates):
            read = "GatherElements" if node.op == "ScatterElements" else "GatherND"
            tape.add(updates, g.emit(read, dy, places, attrs=where))

    return pull


@rule("Trilu")
def triangle(tape: Tape, node: Node) -> Pull:
    """A triangle of each matrix, zeros elsewhere; dy in the same triangle."""
    name, g = node.inputs[0], tape.graph
    offset = [tape.value(i) for i in node.inputs[1:] if i]
    tape.enter(node.outputs[0], g.emit("Trilu", tape.value(name), *offset, attrs=node.attrs), tape.shape(name))
    return lambda dy: tape.add(name, g.emit("Trilu", dy, *offset, attrs=node.attrs))


@rule("OneHot")
def one_hot(tape: Tape, node: Node) -> None:
    """A vector per place: no gradient passes."""
    name = node.inputs[0]
    depth = tape.number(node, 1)
    if depth is None:
        raise ModelError(f"{describe(node)}: no depth")
    shape = tape.shape(name)
    axis = int(node.attrs.get("axis", -1)) % (len(shape) + 1)
    y = tape.graph.emit("OneHot", *[tape.value(i) for i in node.inputs], attrs={"axis": axis})
    tape.enter(node.outputs[0], y, (*shape[:axis], int(depth.reshape(-1)[0]), *shape[axis:]))


_FEW = 4  # up to this many picks of one element its gradient is a sum of gathers; beyond, a product with a 0/1 matrix


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
    regular: list[tuple[int, range]] = []
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
            out[a] = tape.difference(stop, begin)
        elif isinstance(shape[a], int):
            picks.append((a, picked))
            out[a] = len(picked)
        else:
            regular.append((a, picked))
            out[a] = _every(tape, node, a, picked)
    y = x
    if runs:
        where = g.ints(*[r[0] for r in runs])
        y = g.emit("Slice", y, tape.sizes([r[1] for r in runs]), tape.sizes([r[2] for r in runs]), where)
    for a, picked in picks:
        last = picked.stop if picked.stop >= 0 else -(2**31)
        y = g.emit("Slice", y, g.ints(picked.start), g.ints(last), g.ints(a), g.ints(picked.step))
    for a, picked in regular:
        y = g.emit("Slice", y, g.ints(picked.start), g.ints(2**62), g.ints(a), g.ints(picked.step))
    tape.enter(node.outputs[0], y, tuple(out))

    def pull(dy: str) -> None:
        now = list(out)
        for a, picked in regular:
            apart = g.emit("Unsqueeze", dy, g.ints(a + 1))
            pads = [0] * (2 * len(shape) + 2)
            pads[a + 1], pads[a + len(shape) + 2] = picked.start, picked.step - picked.start - 1
            between = (*now[: a + 1], picked.step, *now[a + 1 :])
            now[a] = shape[a]
            dy = tape.reshape(g.emit("Pad", apart, g.ints(*pads)), between, tuple(now))
        for a, picked in picks:
            dy = scattered(tape, dy, tuple(now), a, np.array(picked), tape.extent(shape[a]))
            now[a] = shape[a]
        if runs:
            dy = _put_back(tape, dy, shape, runs)
        tape.add(name, dy)

    return pull


def _put_back(tape: Tape, dy: str, shape: Shape, runs: Sequence[tuple[int, Dim, Dim]]) -> str:
    """The gradient of runs along some axes, among zeros."""
    before: list[Dim] = [0] * len(shape)
    after: list[Dim] = [0] * len(shape)
    for a, begin, stop in runs:
        before[a], after[a] = begin, tape.difference(shape[a], stop)
    return tape.graph.emit("Pad", dy, tape.sizes(before + after))


def _every(tape: Tape, node: Node, axis: int, picked: range) -> Dim:
    """How many elements a step along channels takes, where each channel has as many indices as several steps."""
    name = node.inputs[0]
    whole, found = tape.shape(name)[axis], tape.axis(name, axis)
    size, step = tape.extent(whole), picked.step
    count = tape.quotient(whole, step) if step > 0 else None
    even = found is not None and all((s.length if s.group == FIXED else s.inner) % step == 0 for s in found.segments)
    if count is None or not even or picked.start >= step or len(picked) != size // step:
        raise ModelError(
            f"{describe(node)}: a step that is not within each channel", expected="a run of channels", got=picked
        )
    return count


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
    if constant is None:
        tape.static(node, [shape[axis]])
        return _embedding(tape, node, axis)
    size = tape.extent(shape[axis])
    if not isinstance(shape[axis], int):
        return _channels(tape, node, axis, np.where(constant < 0, constant + size, constant))
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


def _channels(tape: Tape, node: Node, axis: int, picked: Array) -> Pull:
    """Runs of channels in another order, or fixed indices among channels: as slices side by side."""
    name, g = node.inputs[0], tape.graph
    x, shape = tape.value(name), tape.shape(name)
    runs = _runs(tape, node, axis, picked.reshape(-1).tolist())
    where = g.ints(axis)
    parts = [g.emit("Slice", x, tape.size(begin), tape.size(stop), where) for begin, stop in runs]
    lengths = [tape.difference(stop, begin) for begin, stop in runs]
    y = g.emit("Concat", *parts, attrs={"axis": axis}) if len(parts) > 1 else parts[0]
    out: Shape = (*shape[:axis], tape.total(lengths), *shape[axis + 1 :])
    if picked.ndim == 0:
        y, out = g.emit("Squeeze", y, where), (*shape[:axis], *shape[axis + 1 :])
    elif picked.ndim > 1:
        raise ModelError(f"{describe(node)}: indices into channels", expected="a vector", got=picked.shape)
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        dy = g.emit("Unsqueeze", dy, where) if picked.ndim == 0 else dy
        own = [dy]
        if len(runs) > 1:
            own = g.emit_many("Split", dy, tape.sizes(lengths), outputs=len(runs), attrs={"axis": axis})
        for part, (begin, stop) in zip(own, runs, strict=True):
            tape.add(name, _put_back(tape, part, shape, [(axis, begin, stop)]))

    return pull


def _runs(tape: Tape, node: Node, axis: int, picked: list[int]) -> list[tuple[Dim, Dim]]:
    """Indices as runs that begin and stop between channel groups."""
    found = tape.axis(node.inputs[0], axis)
    out: list[tuple[Dim, Dim]] = []
    at = 0
    while at < len(picked):
        length = 1
        while at + length < len(picked) and picked[at + length] == picked[at] + length:
            length += 1
        begin = tape.prefix(found, picked[at]) if found is not None else None
        stop = None
        while found is not None and length and stop is None:
            stop = tape.prefix(found, picked[at] + length)
            length -= stop is None
        if begin is None or stop is None or not length:
            raise ModelError(
                f"{describe(node)} picks single channels", expected="whole channel groups", got=f"index {picked[at]}"
            )
        out.append((begin, stop))
        at += length
    return out


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
    tape.static(node, [d for d in shape[batches : batches + depth] if d != BATCH])
    g = tape.graph
    out = (*where[:-1], *shape[batches + depth :])
    tape.enter(node.outputs[0], g.emit("GatherND", x, places, attrs={"batch_dims": batches}), out)

    def pull(dy: str) -> None:
        at = places
        for axis in reversed(range(batches)):
            # Scattering has no batch axes: an index includes its place in them, too.
            numbers = counted(tape, shape[axis])
            ones = [1] * len(where)
            ones[axis] = -1
            column = g.emit("Reshape", numbers, g.ints(*ones))
            head = tape.sizes([*where[:-1], 1])
            at = g.emit("Concat", g.emit("Expand", column, head), at, attrs={"axis": -1})
        zeros = g.emit("ConstantOfShape", tape.shape_of(x))
        tape.add(name, g.emit("ScatterND", zeros, at, dy, attrs={"reduction": "add"}))

    return pull


def counted(tape: Tape, dim: Dim) -> str:
    """0, 1, 2 and so on up to a dimension's size."""
    g = tape.graph
    if isinstance(dim, int):
        return g.ints(*range(dim))
    ones = g.emit("ConstantOfShape", tape.size(dim), attrs={"value": np.ones(1, np.int64)})
    return g.emit("CumSum", ones, g.constant(0, np.int64), attrs={"exclusive": 1})


_KEPT = 100_003  # stands for how many boxes are kept: a prime, which no other size is by chance


@rule("NonMaxSuppression")
def suppression(tape: Tape, node: Node) -> None:
    """Places of the boxes that are kept: no gradient passes."""
    inputs = [tape.value(i) if i else "" for i in node.inputs]
    kept = tape.symbol(node.outputs[0], _KEPT)
    tape.enter(node.outputs[0], tape.graph.emit("NonMaxSuppression", *inputs, attrs=node.attrs), (kept, 3))


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
    kept = own[max(0, -before) : len(own) - max(0, -after)]
    before, after = max(0, before), max(0, after)
    if mode == "reflect" and max(before, after) >= len(kept):
        wrong = max(before, after)
        raise ModelError(f"{describe(node)} reflects more than there is", expected=f"under {len(kept)}", got=wrong)
    picked: Array = np.pad(kept, (before, after), mode=mode)
    return picked
