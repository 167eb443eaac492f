"""The shapes that Reshape, Expand and ConstantOfShape give, at every width and for every batch.

Each has a target shape as an input: numbers that were traced at full width. The channel analysis knows the output's
shape at every width (`tape.analysed_shape`), except along axes that follow the batch, for which it has None. Values
that were not analysed follow the batch only: their shape is found from the target's numbers. A size (`Dim`) is a number
or a symbol (a group's width, the batch, a formula of them); `tape.extent` is its number at full width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import BATCH, Dim, Shape, Tape, describe
from fedprune_export.channels.factors import axis_runs
from fedprune_export.ir.graph import Node


def reshaped_shape(tape: Tape, node: Node, shape: Shape) -> Shape:
    """The output's shape of a Reshape of a value with this shape.

    Raises `ModelError` if a channel or batch dimension would be split.
    """
    analysed = tape.analysed_shape(node.outputs[0])
    if analysed is None:
        return _symbolic_target(tape, node, shape, _target_sizes(tape, node, 1))
    if analysed.count(None) == 1:
        rest = tape.quotient(tape.product(shape), tape.product([d for d in analysed if d is not None]))
        if rest is None:
            raise ModelError(
                f"{describe(node)} splits a dimension whose size varies", got=f"{list(shape)} to {list(analysed)}"
            )
        return tuple(rest if d is None else d for d in analysed)
    return _fill_from_trace(tape, node, analysed)


def _symbolic_target(tape: Tape, node: Node, shape: Shape, target: Sequence[int]) -> Shape:
    """The symbolic shape that a reshape of `shape` to `target` (at full width, with 0 and -1) gives."""
    sizes = [tape.extent(d) for d in shape]
    target_sizes = list(target)
    if int(node.attrs.get("allowzero", 0)) == 0:
        target_sizes = [sizes[i] if t == 0 else t for i, t in enumerate(target)]
    rest = math.prod(w for w in target_sizes if w != -1)
    target_sizes = [math.prod(sizes) // rest if w == -1 else w for w in target_sizes]
    if math.prod(target_sizes) != math.prod(sizes):
        raise ModelError(f"{describe(node)}: shapes don't fit", expected=list(shape), got=list(target))
    out: list[Dim] = []
    # A block: consecutive axes that hold the same elements before and after.
    for old_axes, new_axes in axis_runs(sizes, target_sizes):
        block = [shape[i] for i in old_axes]
        new_sizes, requested = [target_sizes[j] for j in new_axes], [target[j] for j in new_axes]
        large = [d for d in block if d != 1]
        if len(new_axes) == 1:
            out.append(tape.product(block))
        elif all(isinstance(d, int) for d in block):
            out.extend(new_sizes)
        elif (rest_of_block := _inferred_size(tape, block, requested)) is not None:
            out.extend(rest_of_block if t == -1 else w for t, w in zip(requested, new_sizes, strict=True))
        elif len(large) == 1 and [w for w in new_sizes if w != 1] == [tape.extent(large[0])]:
            # Ones around a whole dimension (C -> 1, C, 1) leave it whole.
            out.extend(large[0] if w != 1 else 1 for w in new_sizes)
        else:
            raise ModelError(
                f"{describe(node)} splits a dimension whose size varies",
                got=f"{list(shape)} to {list(target)}",
                hint="A training graph for all widths can't do that.",
            )
    return tuple(out)


def _inferred_size(tape: Tape, block: Sequence[Dim], target: Sequence[int]) -> Dim | None:
    """The size that −1 stands for, if the other sizes divide a block at every width; else None."""
    other_sizes = [t for t in target if t != -1]
    if len(other_sizes) != len(target) - 1 or 0 in other_sizes:
        return None
    return tape.quotient(tape.product(block), tape.product(other_sizes))


def expanded_shape(tape: Tape, node: Node, shape: Shape) -> Shape:
    """The output's shape of an Expand of a value with this shape."""
    analysed = tape.analysed_shape(node.outputs[0])
    if analysed is None:
        target_sizes: list[Dim | None] = [multiple_of_batch(tape, t) for t in _target_sizes(tape, node, 1)]
    else:
        target_sizes = list(analysed)
    rank = max(len(target_sizes), len(shape))
    target_sizes[:0] = [1] * (rank - len(target_sizes))
    padded = (1,) * (rank - len(shape)) + shape
    out: list[Dim] = []
    for i, (before, after) in enumerate(zip(padded, target_sizes, strict=True)):
        if before != 1:
            if analysed is None and isinstance(before, str) and after == tape.extent(before):
                after = before
            if after not in (None, 1, before):
                raise ModelError(f"{describe(node)}: sizes don't fit each other", expected=before, got=after)
            out.append(before)
        else:
            out.append(tape.traced_shape(node.outputs[0])[i] if after is None else after)
    return tuple(out)


def constant_shape(tape: Tape, node: Node) -> Shape:
    """The output's shape of a ConstantOfShape."""
    analysed = tape.analysed_shape(node.outputs[0])
    if analysed is None:
        return tuple(multiple_of_batch(tape, t) for t in _target_sizes(tape, node, 0))
    return _fill_from_trace(tape, node, analysed)


def _target_sizes(tape: Tape, node: Node, index: int) -> list[int]:
    """The numbers of a node's target shape at full width."""
    target = tape.target_shape(node, index)
    if target is None:
        raise ModelError(f"{describe(node)}: no target shape")
    return [int(t) for t in target.reshape(-1)]


def _fill_from_trace(tape: Tape, node: Node, analysed: Sequence[Dim | None]) -> Shape:
    """The analysed shape of a node's output; the trace gives the axes that follow the batch."""
    traced_shape = tape.traced_shape(node.outputs[0]) if None in analysed else ()
    return tuple(traced_shape[i] if d is None else d for i, d in enumerate(analysed))


def multiple_of_batch(tape: Tape, size: int) -> Dim:
    """A number of a target shape as a size: a multiple of the prime `BATCH_EXTENT` follows the batch."""
    times, rest = divmod(size, tape.extent(BATCH))
    return tape.product([BATCH, times]) if times and not rest else size
