"""Gradient rules of operators that move elements about: reshape, transpose, concat, pad, slice."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import BATCH, Dim, Pull, Shape, Tape, describe, rule
from fedprune_export.ir.graph import Node


@rule("Flatten")
def flatten(tape: Tape, node: Node) -> Pull:
    """Two axes out of many."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 1))
    axis = axis + len(shape) if axis < 0 else axis
    out = (tape.product(shape[:axis]), tape.product(shape[axis:]))
    tape.enter(node.outputs[0], tape.graph.emit("Flatten", x, attrs={"axis": axis}), out)
    return lambda dy: tape.add(name, tape.reshape(dy, out, shape))


@rule("Reshape")
def reshape(tape: Tape, node: Node) -> Pull:
    """Any reshape; sizes that vary are computed at run time where 0 and -1 can't express them."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    known = tape.known(node.outputs[0])
    if known is not None:
        out = _filled(tape, node, known, shape)
    else:
        target = tape.target_shape(node, 1)
        if target is None:
            raise ModelError(f"{describe(node)}: no target shape")
        out = reshaped(tape, node, shape, [int(t) for t in target.reshape(-1)])
    if any(d == 0 for d in out):
        raise ModelError(f"{describe(node)}: an empty dimension", got=list(out))
    if tape.product(out) != tape.product(shape):
        raise ModelError(f"{describe(node)} splits a dimension whose size varies", got=f"{list(shape)} to {list(out)}")
    tape.enter(node.outputs[0], tape.reshape(x, shape, out), out)
    return lambda dy: tape.add(name, tape.reshape(dy, out, shape))


def _filled(tape: Tape, node: Node, known: Sequence[Dim | None], shape: Shape) -> Shape:
    """The analysed shape of a reshape's output with the axes that follow the batch filled in."""
    free = [i for i, d in enumerate(known) if d is None]
    if not free:
        return tuple(d for d in known if d is not None)
    if len(free) == 1:
        rest = tape.quotient(tape.product(shape), tape.product([d for d in known if d is not None]))
        if rest is None:
            raise ModelError(
                f"{describe(node)} splits a dimension whose size varies", got=f"{list(shape)} to {list(known)}"
            )
        return tuple(rest if d is None else d for d in known)
    traced = tape.traced_shape(node.outputs[0])
    return tuple(t if d is None else d for d, t in zip(known, traced, strict=True))


def reshaped(tape: Tape, node: Node, shape: Shape, target: Sequence[int]) -> Shape:
    """The symbolic shape that a reshape of `shape` to `target` (at full width, with 0 and -1) gives.

    Raises `ModelError` if a channel or batch dimension would be split.
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
        elif (rest_of_block := _rest(tape, block, target[first:j])) is not None:
            out.extend(rest_of_block if t == -1 else w for t, w in zip(target[first:j], wanted[first:j], strict=True))
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


def _rest(tape: Tape, block: Shape, target: Sequence[int]) -> Dim | None:
    """The value of -1 if the other sizes divide a block at every width, else None."""
    others = [t for t in target if t != -1]
    if len(others) != len(target) - 1 or 0 in others:
        return None
    return tape.quotient(tape.product(block), tape.product(others))


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


@rule("Expand")
def expand(tape: Tape, node: Node) -> Pull:
    """Repeated along axes of 1; the gradient is summed over them."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    out = _expanded(tape, node, shape)
    padded = (1,) * (len(out) - len(shape)) + shape
    # An axis that isn't repeated keeps its size whatever the target is, if that is 1.
    target = tape.sizes([1 if d == p else d for d, p in zip(out, padded, strict=True)])
    tape.enter(node.outputs[0], tape.graph.emit("Expand", x, target), out)
    return lambda dy: tape.add(name, tape.reduced(dy, out, shape))


def _expanded(tape: Tape, node: Node, shape: Shape) -> Shape:
    """The shape that an Expand gives."""
    known = tape.known(node.outputs[0])
    if known is None:
        target = tape.target_shape(node, 1)
        if target is None:
            raise ModelError(f"{describe(node)}: no target shape")
        wanted: list[Dim | None] = [multiple_of_batch(tape, int(t)) for t in target.reshape(-1)]
    else:
        wanted = list(known)
    rank = max(len(wanted), len(shape))
    wanted[:0] = [1] * (rank - len(wanted))
    padded = (1,) * (rank - len(shape)) + shape
    out: list[Dim] = []
    for i, (before, after) in enumerate(zip(padded, wanted, strict=True)):
        if before != 1:
            if known is None and isinstance(before, str) and after == tape.extent(before):
                after = before
            if after not in (None, 1, before):
                raise ModelError(f"{describe(node)}: sizes don't fit each other", expected=before, got=after)
            out.append(before)
        else:
            out.append(tape.traced_shape(node.outputs[0])[i] if after is None else after)
    return tuple(out)


def multiple_of_batch(tape: Tape, size: int) -> Dim:
    """A size in which the batch is replaced by its extent."""
    times, rest = divmod(size, tape.extent(BATCH))
    return tape.product([BATCH, times]) if times and not rest else size


@rule("ConstantOfShape")
def constant_of_shape(tape: Tape, node: Node) -> None:
    """Equal numbers, as many as there are channels: no gradient passes."""
    known = tape.known(node.outputs[0])
    out: list[Dim] = []
    if known is None:
        target = tape.target_shape(node, 0)
        out += [multiple_of_batch(tape, int(t)) for t in target.reshape(-1)] if target is not None else []
    else:
        for i, d in enumerate(known):
            out.append(tape.traced_shape(node.outputs[0])[i] if d is None else d)
    y = tape.graph.emit("ConstantOfShape", tape.sizes(out), attrs=node.attrs)
    tape.enter(node.outputs[0], y, tuple(out))


@rule("Tile")
def tile(tape: Tape, node: Node) -> Pull:
    """Repeated whole along axes; the gradient is summed over the repetitions."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    given = tape.target_shape(node, 1)
    if given is None:
        raise ModelError(f"{describe(node)}: no repetitions")
    repeats = [multiple_of_batch(tape, int(r)) for r in given.reshape(-1)]
    out = tuple(tape.product([r, d]) for r, d in zip(repeats, shape, strict=True))
    g = tape.graph
    tape.enter(node.outputs[0], g.emit("Tile", x, tape.sizes(repeats)), out)

    def pull(dy: str) -> None:
        apart: list[Dim] = []
        axes = []
        for r, d in zip(repeats, shape, strict=True):
            if r != 1:
                axes.append(len(apart))
                apart.append(r)
            apart.append(d)
        if not axes:
            tape.add(name, dy)
            return
        parts = tape.reshape(dy, out, tuple(apart))
        tape.add(name, g.emit("ReduceSum", parts, g.ints(*axes), attrs={"keepdims": 0}))

    return pull


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
        if i != axis and len({s[i] for s in shapes}) > 1:
            sizes = [s[i] for s in shapes]
            raise ModelError(f"{describe(node)}: sizes don't fit each other at every width", got=sizes)
    tape.enter(node.outputs[0], g.emit("Concat", *values, attrs={"axis": axis}), tuple(out))

    def pull(dy: str) -> None:
        lengths = tape.sizes([s[axis] for s in shapes])
        parts = g.emit_many("Split", dy, lengths, outputs=len(values), attrs={"axis": axis})
        for name, part in zip(node.inputs, parts, strict=True):
            if tape.wants(name):
                tape.add(name, part)

    return pull


@rule("Split")
def split(tape: Tape, node: Node) -> Pull:
    """Pieces apart, along channels, too; the gradient joins theirs, with zeros for pieces that nothing reads."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    lengths = _lengths(tape, node, shape[axis], axis)
    if tape.total(lengths) != shape[axis]:
        raise ModelError(f"{describe(node)}: its pieces don't make up the whole", expected=shape[axis], got=lengths)
    g = tape.graph
    values = g.emit_many("Split", x, tape.sizes(lengths), outputs=len(lengths), attrs={"axis": axis})
    for output, value, length in zip(node.outputs, values, lengths, strict=True):
        if output:
            tape.enter(output, value, (*shape[:axis], length, *shape[axis + 1 :]))

    def pull(*gradients: str | None) -> None:
        parts = [
            dy or g.emit("ConstantOfShape", tape.shape_of(value)) for dy, value in zip(gradients, values, strict=True)
        ]
        tape.add(name, g.emit("Concat", *parts, attrs={"axis": axis}))

    return pull


def _lengths(tape: Tape, node: Node, whole: Dim, axis: int) -> list[Dim]:
    """How long the pieces of a split are."""
    count = len(node.outputs)
    given = tape.number(node, 1)
    if isinstance(whole, int):
        each = -(-whole // count)
        even = [each] * (count - 1) + [whole - each * (count - 1)]
        return [int(n) for n in (even if given is None else given)]
    on_axis = tape.axis(node.inputs[0], axis)
    full = tape.extent(whole)
    if given is None:
        given = np.full(count, -(-full // count))
        given[-1] = full - given[:-1].sum()
    ends = [tape.prefix(on_axis, int(n)) if on_axis is not None else None for n in np.cumsum(given)]
    out: list[Dim] = []
    before: Dim = 0
    for end in ends:
        if end is None:
            raise ModelError(f"{describe(node)} cuts a run of channels", got=f"{given.tolist()} of {whole}")
        out.append(tape.difference(end, before))
        before = end
    return out
