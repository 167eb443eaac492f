"""Pad: adds elements around a value: constants, or copies of its own elements."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.scattered_gradients import scatter_picks
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Array, Node


@channel_rule("Pad")
def pad_channels(channels: Channels, node: Node) -> None:
    """Added indices stay; reflecting or repeating padding of a channel axis fixes it."""
    x = channels.input_rows(node, 0)
    pads = channels.constant_input(node, 1)
    channels.fix_inputs(node, 1)
    if pads is None:
        channels.fix(x)
        channels.fix_outputs(node)
        return
    amounts = pads.tolist()
    out = []
    for i, row in enumerate(x):
        before, after = int(amounts[i]), int(amounts[i + len(x)])
        if before < 0 or after < 0 or ((before or after) and node.attrs.get("mode", "constant") != "constant"):
            channels.atoms.fix(row)
            row = fixed_row(row.size + before + after)
            before = after = 0
        out.append(np.concatenate([fixed_row(before), row, fixed_row(after)]))
    channels.set_output(node, out)


@gradient_rule("Pad")
def pad(tape: Tape, node: Node) -> Pull:
    """A constant around any axes (negative pads cut), or fixed axes reflected or their edges repeated."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    mode = str(node.attrs.get("mode", "constant"))
    pad_counts, value, axis_numbers = (tape.required_constant(node, i) for i in (1, 2, 3))
    if pad_counts is None:
        raise ModelError(f"{describe(node)}: no pads")
    axes = [int(axis) % len(shape) for axis in axis_numbers] if axis_numbers is not None else list(range(len(shape)))
    half = len(pad_counts) // 2
    pads = np.zeros((2, len(shape)), np.int64)
    for position, axis in enumerate(axes):
        pads[0, axis], pads[1, axis] = pad_counts[position], pad_counts[half + position]
    if mode != "constant":
        return _pad_by_copies(tape, node, pads, mode)
    for axis in range(len(shape)):
        if (pads[:, axis] < 0).any():
            tape.static(node, [shape[axis]])
    out = tuple(tape.total([d, int(pads[:, axis].sum())]) for axis, d in enumerate(shape))
    g = tape.graph
    fill = [g.scalar(float(value.reshape(-1)[0]))] if value is not None and value.size else []
    y = g.emit("Pad", x, g.ints(*pads.reshape(-1).tolist()), *fill)
    tape.enter(node.outputs[0], y, out)
    return lambda dy: tape.add_gradient(name, g.emit("Pad", dy, g.ints(*(-pads).reshape(-1).tolist())))


_COPYING_MODES = ("reflect", "edge", "wrap")  # those of numpy's `pad`


def _pad_by_copies(tape: Tape, node: Node, pads: Array, mode: str) -> Pull:
    """Padding with elements of the value itself: axis by axis they are picked."""
    name = node.inputs[0]
    x, shape = tape.value(name), tape.shape(name)
    if mode not in _COPYING_MODES:
        raise ModelError(f"{describe(node)}: padding mode", expected=["constant", *_COPYING_MODES], got=mode)
    padded = [axis for axis in range(len(shape)) if pads[:, axis].any()]
    picks = {}
    for axis in padded:
        (size,) = tape.static(node, [shape[axis]])
        picks[axis] = _padded_indices(node, np.arange(size), int(pads[0, axis]), int(pads[1, axis]), mode)
    g = tape.graph
    steps: list[tuple[int, Shape]] = []
    sizes, y = list(shape), x
    for axis in padded:
        y = g.emit("Gather", y, g.constant(picks[axis], np.int64), attrs={"axis": axis})
        sizes[axis] = len(picks[axis])
        steps.append((axis, tuple(sizes)))
    tape.enter(node.outputs[0], y, tuple(sizes))

    def pull(dy: str) -> None:
        for axis, after in reversed(steps):
            dy = scatter_picks(tape, dy, after, axis, picks[axis], tape.extent(shape[axis]))
        tape.add_gradient(name, dy)

    return pull


def _padded_indices(node: Node, indices: Array, before: int, after: int, mode: str) -> Array:
    # Negative pads cut before positive ones copy.
    cropped = indices[max(0, -before) : len(indices) - max(0, -after)]
    before, after = max(0, before), max(0, after)
    if mode == "reflect" and max(before, after) >= len(cropped):
        wrong = max(before, after)
        raise ModelError(f"{describe(node)} reflects more than there is", expected=f"under {len(cropped)}", got=wrong)
    return np.pad(cropped, (before, after), mode=cast(Any, mode))
