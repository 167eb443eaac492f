"""Gradient rules of operators that move elements about: reshape, transpose, concat, pad, slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.errors import ModelError
from fedprune_export.gradients.tape import BATCH, Dim, Pull, Shape, Tape, describe, rule
from fedprune_export.graph import Node


def _restored(tape: Tape, node: Node) -> Pull:
    """The pull-back of everything that only changes the shape: the input's shape is given back."""
    name = node.inputs[0]
    x = tape.value(name)

    def pull(dy: str) -> None:
        tape.add(name, tape.graph.emit("Reshape", dy, tape.shape_of(x)))

    return pull


@rule("Flatten")
def flatten(tape: Tape, node: Node) -> Pull:
    """Two axes out of many."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 1)) % (len(shape) + 1)
    out = (tape.product(shape[:axis]), tape.product(shape[axis:]))
    tape.enter(node.outputs[0], tape.graph.emit("Flatten", x, attrs={"axis": axis}), out)
    return _restored(tape, node)


@rule("Reshape")
def reshape(tape: Tape, node: Node) -> Pull:
    """Any reshape that leaves channel dimensions whole, or merges them."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    target = tape.target_shape(node, 1)
    if target is None:
        raise ModelError(f"{describe(node)}: no target shape")
    out = reshaped(tape, node, shape, [int(t) for t in target.reshape(-1)])
    entries = [d if isinstance(d, int) else 0 if i < len(shape) and shape[i] == d else -1 for i, d in enumerate(out)]
    if entries.count(-1) > 1:
        raise ModelError(
            f"{describe(node)} merges two varying dimensions apart from each other",
            got=list(out),
            hint="Use Flatten, or reshape in two steps.",
        )
    if any(d == 0 for d in out):
        raise ModelError(f"{describe(node)}: an empty dimension", got=list(out))
    tape.enter(node.outputs[0], tape.graph.emit("Reshape", x, tape.graph.ints(*entries)), out)
    return _restored(tape, node)


def reshaped(tape: Tape, node: Node, shape: Shape, target: Sequence[int]) -> Shape:
    """The symbolic shape that a reshape of `shape` to `target` (at full width, with 0 and -1) gives.

    Raises:
        ModelError: A channel or batch dimension would be split.
    """
    sizes = [tape.extent(d) for d in shape]
    whole = 1
    for s in sizes:
        whole *= s
    if int(node.attrs.get("allowzero", 0)) == 0:
        wanted = [sizes[i] if t == 0 else int(t) for i, t in enumerate(target)]
    else:
        wanted = [int(t) for t in target]
    rest = 1
    for w in wanted:
        rest *= w if w != -1 else 1
    wanted = [whole // rest if w == -1 else w for w in wanted]
    out: list[Dim] = []
    i = 0
    j = 0
    while j < len(wanted) or i < len(sizes):
        if i < len(sizes) and j < len(wanted) and sizes[i] == wanted[j]:
            out.append(shape[i])
            i, j = i + 1, j + 1
            continue
        start, first = i, j
        left = right = 1
        while True:
            if left <= right and i < len(sizes) and (left < right or i == start):
                left *= sizes[i]
                i += 1
            elif j < len(wanted) and (right < left or j == first):
                right *= wanted[j]
                j += 1
            else:
                break
            if left == right and (i > start or j > first) and (i == len(sizes) or j > first):
                break
        block = shape[start:i]
        if left != right:
            raise ModelError(f"{describe(node)}: shapes don't fit", expected=list(shape), got=list(target))
        if j - first == 1:
            out.append(tape.product(block))
        elif all(isinstance(d, int) for d in block):
            out.extend(wanted[first:j])
        else:
            # Ones around a whole dimension (C -> 1, C, 1) leave it whole.
            large = [d for d in block if d != 1]
            if len(large) != 1 or [w for w in wanted[first:j] if w != 1] != [tape.extent(large[0])]:
                raise ModelError(
                    f"{describe(node)} splits a dimension whose size varies",
                    got=f"{list(shape)} to {list(target)}",
                    hint="A training graph for all widths can't do that.",
                )
            out.extend(large[0] if w != 1 else 1 for w in wanted[first:j])
    return tuple(out)


def _axes(tape: Tape, node: Node) -> list[int]:
    """Axes of Squeeze and Unsqueeze: an input since opset 13, an attribute before."""
    values = tape.number(node, 1)
    raw = node.attrs.get("axes", []) if values is None else values.reshape(-1)
    return [int(a) for a in raw]


@rule("Squeeze")
def squeeze(tape: Tape, node: Node) -> Pull:
    """Axes of size 1 out."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axes = [a % len(shape) for a in _axes(tape, node)] or [i for i, d in enumerate(shape) if d == 1]
    if any(shape[a] != 1 for a in axes):
        raise ModelError(f"{describe(node)}: an axis isn't 1", got=list(shape))
    out = tuple(d for i, d in enumerate(shape) if i not in axes)
    tape.enter(node.outputs[0], tape.graph.emit("Squeeze", x, tape.graph.ints(*axes)), out)
    return lambda dy: tape.add(name, tape.graph.emit("Unsqueeze", dy, tape.graph.ints(*axes)))


@rule("Unsqueeze")
def unsqueeze(tape: Tape, node: Node) -> Pull:
    """Axes of size 1 in."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axes = _axes(tape, node)
    rank = len(shape) + len(axes)
    axes = sorted(a % rank for a in axes)
    rest = iter(shape)
    out: Shape = tuple(1 if i in axes else next(rest) for i in range(rank))
    tape.enter(node.outputs[0], tape.graph.emit("Unsqueeze", x, tape.graph.ints(*axes)), out)
    return lambda dy: tape.add(name, tape.graph.emit("Squeeze", dy, tape.graph.ints(*axes)))


@rule("Transpose")
def transpose(tape: Tape, node: Node) -> Pull:
    """A permutation of axes; the gradient takes the inverse one."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    perm = [int(p) for p in node.attrs.get("perm", range(len(shape))[::-1])]
    back = [perm.index(i) for i in range(len(perm))]
    out = tuple(shape[p] for p in perm)
    tape.enter(node.outputs[0], tape.graph.emit("Transpose", x, attrs={"perm": perm}), out)
    return lambda dy: tape.add(name, tape.graph.emit("Transpose", dy, attrs={"perm": back}))


@rule("Concat")
def concat(tape: Tape, node: Node) -> Pull:
    """Pieces side by side; the gradient is cut where they meet, at run time where widths vary."""
    shapes = [tape.shape(i) for i in node.inputs]
    values = [tape.value(i) for i in node.inputs]
    axis = int(node.attrs["axis"]) % len(shapes[0])
    g = tape.graph
    out = list(shapes[0])
    out[axis] = tape.total([s[axis] for s in shapes])
    for i in range(len(out)):
        if i != axis:
            out[i] = tape.broadcast(node, *[(s[i],) for s in shapes])[0]
    tape.enter(node.outputs[0], g.emit("Concat", *values, attrs={"axis": axis}), tuple(out))

    def pull(dy: str) -> None:
        lengths = [
            g.ints(d) if isinstance(d, int) else g.emit("Gather", tape.shape_of(v), g.ints(axis))
            for v, d in zip(values, (s[axis] for s in shapes), strict=True)
        ]
        split = g.emit("Concat", *lengths, attrs={"axis": 0})
        parts = g.emit_many("Split", dy, split, outputs=len(values), attrs={"axis": axis})
        for name, part in zip(node.inputs, parts, strict=True):
            if tape.wants(name):
                tape.add(name, part)

    return pull


@rule("Pad")
def pad(tape: Tape, node: Node) -> Pull:
    """Constant padding of fixed axes; negative pads cut."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    if node.attrs.get("mode", "constant") != "constant":
        raise ModelError(f"{describe(node)}: padding mode", expected="constant", got=node.attrs["mode"])
    given, value, chosen = (tape.number(node, i) for i in (1, 2, 3))
    if given is None:
        raise ModelError(f"{describe(node)}: no pads")
    axes = [int(a) % len(shape) for a in chosen] if chosen is not None else list(range(len(shape)))
    half = len(given) // 2
    pads = np.zeros((2, len(shape)), np.int64)
    for k, a in enumerate(axes):
        pads[0, a], pads[1, a] = given[k], given[half + k]
    out = list(shape)
    for a in range(len(shape)):
        if pads[:, a].any():
            (size,) = tape.static(node, shape[a : a + 1])
            out[a] = size + int(pads[:, a].sum())
    g = tape.graph
    fill = [g.scalar(float(value.reshape(-1)[0]))] if value is not None and value.size else []
    y = g.emit("Pad", x, g.ints(*pads.reshape(-1).tolist()), *fill)
    tape.enter(node.outputs[0], y, tuple(out))

    def pull(dy: str) -> None:
        tape.add(name, g.emit("Pad", dy, g.ints(*(-pads).reshape(-1).tolist())))

    return pull


@rule("Slice")
def cut_out(tape: Tape, node: Node) -> Pull:
    """Ranges of fixed axes with step 1; the gradient is padded with zeros."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    starts, ends, chosen, strides = (tape.number(node, i) for i in (1, 2, 3, 4))
    if starts is None or ends is None:
        raise ModelError(f"{describe(node)}: no range")
    axes = [int(a) % len(shape) for a in chosen] if chosen is not None else list(range(len(starts)))
    steps = [int(s) for s in strides] if strides is not None else [1] * len(axes)
    g = tape.graph
    pads = np.zeros((2, len(shape)), np.int64)
    out = list(shape)
    ranges: list[tuple[int, int, int]] = []
    for a, start, end, stride in zip(axes, starts, ends, steps, strict=True):
        (size,) = tape.static(node, shape[a : a + 1])
        if stride != 1:
            raise ModelError(f"{describe(node)}: step of a slice", expected=1, got=stride)
        picked = range(size)[int(start) : int(end)]
        if not picked:
            raise ModelError(f"{describe(node)} cuts out nothing", got=f"{start}:{end} of {size}")
        ranges.append((a, picked.start, picked.stop))
        pads[0, a], pads[1, a] = picked.start, size - picked.stop
        out[a] = len(picked)
    begin, stop, where = (g.ints(*[r[k] for r in ranges]) for k in (1, 2, 0))
    tape.enter(node.outputs[0], g.emit("Slice", x, begin, stop, where), tuple(out))
    return lambda dy: tape.add(name, g.emit("Pad", dy, g.ints(*pads.reshape(-1).tolist())))


@rule("ReduceMean", "GlobalAveragePool")
def mean(tape: Tape, node: Node) -> Pull:
    """The mean over fixed axes; the gradient is spread evenly."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    g = tape.graph
    rank = len(shape)
    if node.op == "GlobalAveragePool":
        axes, keep = list(range(2, rank)), True
    else:
        values = tape.number(node, 1)
        raw = node.attrs.get("axes") if values is None else values.reshape(-1)
        axes = sorted(int(a) % rank for a in raw) if raw is not None else list(range(rank))
        keep = bool(node.attrs.get("keepdims", 1))
    if BATCH in [shape[a] for a in axes]:
        raise ModelError(f"{describe(node)} averages over the batch")
    count = 1
    for size in tape.static(node, [shape[a] for a in axes]):
        count *= size
    y = g.emit("ReduceMean", x, attrs={"axes": axes, "keepdims": int(keep)})
    out = tuple(1 if i in axes else d for i, d in enumerate(shape) if keep or i not in axes)
    tape.enter(node.outputs[0], y, out)

    def pull(dy: str) -> None:
        small = g.emit("Mul", dy, g.scalar(1 / count))
        if not keep:
            small = g.emit("Unsqueeze", small, g.ints(*axes))
        tape.add(name, g.emit("Expand", small, tape.shape_of(x)))

    return pull
