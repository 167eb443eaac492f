"""Transports one axis of a tensor from one model's channels to another's, block by block.

A block is the part of an axis that belongs to one channel group. A coupling (`coupling.Coupling`) says how the group's
channels become those of the other model.
"""

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
        indices: Its indices, channel by channel, if it isn't contiguous.
    """

    group: int
    inner: int
    start: int
    stop: int
    indices: Indices | None = None


def blocks_of_axis(axis: Axis, selection: Selection) -> tuple[Block, ...]:
    """Split an axis of a submodel into its blocks. A segment that holds all channels of a group is a run, with the
    channels in the order of the selection. Segments with some channels each (a shuffled or divided stream) are one
    block: a channel's indices in all of them, in order."""
    axis_blocks: list[Block] = []
    channel_runs: dict[int, list[list[Indices]]] = {}
    block_positions: dict[int, int] = {}
    offset = 0
    for segment in axis.segments:
        size = segment.length
        if segment.group == FIXED:
            axis_blocks.append(Block(FIXED, 1, offset, offset + size))
        elif segment.start == 0 and segment.count == selection.architecture.sizes[segment.group]:
            size = selection.widths[segment.group] * segment.inner
            axis_blocks.append(Block(segment.group, segment.inner, offset, offset + size))
        else:
            width = selection.widths[segment.group]
            ranks = selection.ranks[segment.group][:width]
            present_channels = np.flatnonzero((ranks >= segment.start) & (ranks < segment.start + segment.count))
            size = present_channels.size * segment.inner
            if segment.group not in channel_runs:
                block_positions[segment.group] = len(axis_blocks)
                axis_blocks.append(Block(segment.group, 0, 0, 0))
            runs_by_channel = channel_runs.setdefault(segment.group, [[] for _ in range(width)])
            for k, channel in enumerate(present_channels):
                runs_by_channel[channel].append(np.arange(offset + k * segment.inner, offset + (k + 1) * segment.inner))
        offset += size
    for group, runs_by_channel in channel_runs.items():
        rows = [np.concatenate(channel) for channel in runs_by_channel]
        axis_blocks[block_positions[group]] = Block(group, rows[0].size, 0, 0, np.concatenate(rows))
    return tuple(axis_blocks)


def block_values(values: Floats, axis: int, block: Block) -> Floats:
    """A block of an array's axis, channel by channel."""
    if block.indices is not None:
        return values.take(block.indices, axis=axis)
    if block.start == 0 and block.stop == values.shape[axis]:
        return values
    return values[(slice(None),) * axis + (slice(block.start, block.stop),)]


def channel_rows(values: Floats, axis: int, axis_blocks: Sequence[Block], group: int) -> Floats:
    """A row per channel of a group: all that an array holds for it [channels, features]."""
    rows = []
    for block in axis_blocks:
        if block.group == group:
            front = np.moveaxis(block_values(values, axis, block), axis, 0)
            rows.append(front.reshape(front.shape[0] // block.inner, -1))
    return np.ascontiguousarray(rows[0] if len(rows) == 1 else np.concatenate(rows, axis=1))


def transport_axis(
    values: Floats,
    axis: int,
    before: Sequence[Block],
    after: Sequence[Block],
    couplings: Mapping[int, Coupling],
    *,
    adjoint: bool = False,
    buffer_name: str = "",
) -> Floats:
    """Transport one axis of an array from one model's channels to another's.

    Args:
        before: The axis's blocks in the array.
        after: Its blocks in the result.
        couplings: Per group on the axis, how (from the couplings' sources to their targets).
        adjoint: Go from the couplings' targets to their sources instead.
        buffer_name: Scratch memory for the result, which is valid until the name is used again; empty for new memory.
    """
    length = sum(b.stop - b.start if b.indices is None else b.indices.size for b in after)
    shape = (*values.shape[:axis], length, *values.shape[axis + 1 :])
    result = SCRATCH.array(buffer_name, shape) if buffer_name else None

    def run(old_block: Block, block_out: Floats | None) -> Floats:
        array = block_values(values, axis, old_block)
        if old_block.group == FIXED:
            return array
        coupling = couplings[old_block.group]
        leading_size = prod(array.shape[:axis])
        trailing_size = prod(array.shape[axis + 1 :]) * old_block.inner
        flat = array.reshape(leading_size, array.shape[axis] // old_block.inner, trailing_size)
        size = coupling.sources if adjoint else coupling.targets
        step: Callable[[Floats, Floats | None], Floats] = coupling.backward if adjoint else coupling.forward
        transported = step(flat, None if block_out is None else block_out.reshape(leading_size, size, trailing_size))
        return transported.reshape(*array.shape[:axis], size * old_block.inner, *array.shape[axis + 1 :])

    # One block is the whole axis: the coupling writes into the result, without a copy of its own.
    if len(before) == 1 and before[0].group != FIXED and after[0].indices is None:
        return run(before[0], result)
    if result is None:
        result = np.empty(shape, np.float32)
    leading = (slice(None),) * axis
    for old_block, new_block in zip(before, after, strict=True):
        target = slice(new_block.start, new_block.stop) if new_block.indices is None else new_block.indices
        index = (*leading, target)
        result[index] = run(old_block, None)
    return result
