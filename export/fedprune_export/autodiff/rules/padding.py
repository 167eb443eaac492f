"""Gradient rules of padding."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.indexing import scattered
from fedprune_export.autodiff.tape import Pull, Shape, Tape, describe, rule
from fedprune_export.ir.graph import Node

Array = npt.NDArray[Any]


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
        raise ModelError(f"{describe(node)} reflects more than there is", expected=f"under {len(kept)}", got=before)
    picked: Array = np.pad(kept, (before, after), mode=mode)
    return picked
