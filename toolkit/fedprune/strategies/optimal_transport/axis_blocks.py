"""The blocks of an axis that belong to one channel group, in a model and in a submodel; a coupling transports them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.model.architecture import FIXED, Axis
from fedprune.model.selection import Selection
from fedprune.strategies.optimal_transport.coupling import SCRATCH, Coupling

Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]


class Block(NamedTuple):
    """A part of an axis that belongs to one group.

    Attributes:
        group: The channel group, or FIXED.
        inner: Indices per channel.
        start: Its first index.
        stop: The index after its last one, if it is contiguous.
        at: Its indices, channel by channel, if it isn't contiguous.
    """

    group: int
    inner: int
    start: int
    stop: int
    at: Indices | None = None


def blocks(axis: Axis, selection: Selection) -> tuple[Block, ...]:
    """The stretches of an axis of a submodel.

    A segment that holds all channels of a group is a run, with the channels in the order of the selection. Segments
    with some channels each (a shuffled or divided stream) are one block: a channel's indices in all of them, in order.
    """
    out: list[Block] = []
    pieces: dict[int, list[list[Indices]]] = {}
    places: dict[int, int] = {}
    offset = 0
    for s in axis.segments:
        size = s.length
        if s.group == FIXED:
            out.append(Block(FIXED, 1, offset, offset + size))
        elif s.start == 0 and s.count == selection.architecture.sizes[s.group]:
            size = selection.widths[s.group] * s.inner
            out.append(Block(s.group, s.inner, offset, offset + size))
        else:
            width = selection.widths[s.group]
            ranks = selection.ranks[s.group][:width]
            held = np.flatnonzero((ranks >= s.start) & (ranks < s.start + s.count))
            size = held.size * s.inner
            if s.group not in pieces:
                places[s.group] = len(out)
                out.append(Block(s.group, 0, 0, 0))
            own = pieces.setdefault(s.group, [[] for _ in range(width)])
            for k, channel in enumerate(held):
                own[channel].append(np.arange(offset + k * s.inner, offset + (k + 1) * s.inner))
        offset += size
    for group, own in pieces.items():
        rows = [np.concatenate(channel) for channel in own]
        out[places[group]] = Block(group, rows[0].size, 0, 0, np.concatenate(rows))
    return tuple(out)


def part_of(values: Floats, axis: int, block: Block) -> Floats:
    """A block of an array's axis, channel by channel."""
    if block.at is not None:
        return values.take(block.at, axis=axis)
    if block.start == 0 and block.stop == values.shape[axis]:
        return values
    return values[(slice(None),) * axis + (slice(block.start, block.stop),)]


def channel_rows(values: Floats, axis: int, own: Sequence[Block], group: int) -> Floats:
    """A row per channel of a group: all that an array holds for it [channels, features]."""
    rows = []
    for block in own:
        if block.group == group:
            front = np.moveaxis(part_of(values, axis, block), axis, 0)
            rows.append(front.reshape(front.shape[0] // block.inner, -1))
    return np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1))


def carried(
    values: Floats,
    axis: int,
    before: Sequence[Block],
    after: Sequence[Block],
    couplings: Mapping[int, Coupling],
    *,
    adjoint: bool = False,
    room: str = "",
) -> Floats:
    """An array with one axis led from one model's channels to another's.

    Args:
        axis: Which of its axes.
        before: The axis's blocks in the array.
        after: Its blocks in the result.
        couplings: Per group on the axis, how (from the couplings' sources to their targets).
        adjoint: Go from the couplings' targets to their sources instead.
        room: A name of scratch memory for the result, which then is good until the name comes again.
    """
    length = sum(b.stop - b.start if b.at is None else b.at.size for b in after)
    shape = (*values.shape[:axis], length, *values.shape[axis + 1 :])
    out = SCRATCH.array(room, shape) if room else None

    def run(old: Block, into: Floats | None) -> Floats:
        part = part_of(values, axis, old)
        if old.group == FIXED:
            return part
        coupling = couplings[old.group]
        ahead = prod(part.shape[:axis])
        behind = prod(part.shape[axis + 1 :]) * old.inner
        flat = part.reshape(ahead, part.shape[axis] // old.inner, behind)
        size = coupling.sources if adjoint else coupling.targets
        step: Callable[[Floats, Floats | None], Floats] = coupling.backward if adjoint else coupling.forward
        led = step(flat, None if into is None else into.reshape(ahead, size, behind))
        return led.reshape(*part.shape[:axis], size * old.inner, *part.shape[axis + 1 :])

    if len(before) == 1 and before[0].group != FIXED and after[0].at is None:
        return run(before[0], out)
    if out is None:
        out = np.empty(shape, np.float32)
    lead = (slice(None),) * axis
    for old, new in zip(before, after, strict=True):
        where = (*lead, slice(new.start, new.stop) if new.at is None else new.at)
        out[where] = run(old, None)
    return out
