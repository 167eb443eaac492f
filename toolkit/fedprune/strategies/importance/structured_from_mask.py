"""Channels that a mask of elements leaves alive: structure that emerges from single weights.

A channel is lost where the weights that make it (a filter, a row of a linear layer, in every layer that writes to its
group) are masked, all of them or a share of them, or where all that read it are (AutoFLIP, arXiv 2405.10271, Fig. 3).
What reads a lost channel is lost with it, which may cost further channels; every group keeps at least one.

Cutting a channel whose making weights are all masked loses its constant, which is its bias, or what its norm makes of
0. Where there are none, or where nothing reads the channel, the cut network computes what the masked one did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import FIXED, Architecture, Axis, TensorKind, TensorSpec
from fedprune.model.selection import BoolArray, ElementMask, Selection, check_mask
from fedprune.strategies.importance.gradient_stats import add_to_channels

# Per group, whether each channel is left.
Alive = tuple[BoolArray, ...]

_ROUNDING_TOLERANCE = 1e-9

Counts = tuple[npt.NDArray[np.int64], ...]


def survivors(architecture: Architecture, mask: ElementMask, *, share: float = 1.0) -> Alive:
    """The channels that a mask of the whole model's elements leaves alive. A channel is lost where at least `share` of
    the weights that make it is masked, or all that read it. Raises `BundleError` if the share is not above 0 and at
    most 1, or the mask doesn't fit the architecture."""
    if not 0 < share <= 1:
        raise BundleError("masked share of a lost channel", expected="above 0 and at most 1", got=share)
    check_mask(mask, {t.name: t.shape for t in architecture.tensors})
    layers = {n.weight for n in architecture.layers if n.weight}
    weights = [t for t in architecture.tensors if t.kind is TensorKind.WEIGHT and t.name in layers]
    alive = tuple(np.ones(n, np.bool_) for n in architecture.sizes)
    # A channel that is lost takes weights from the next layer's channels, so the search goes on until nothing changes.
    # It ends, since channels are only lost.
    while True:
        makers, readers = _weight_counts(architecture, weights, mask, alive)
        alive_after = []
        for g, alive_before in enumerate(alive):
            active_makers, all_makers = makers[0][g], makers[1][g]
            is_lost = (all_makers > 0) & (all_makers - active_makers >= share * all_makers - _ROUNDING_TOLERANCE)
            is_lost |= (readers[1][g] > 0) & (readers[0][g] == 0)
            still_alive = alive_before & ~is_lost
            if not still_alive.any():
                # A group without channels would cut the network in two: the one with most active weights stays.
                candidates = np.where(alive_before, active_makers, -1)
                still_alive[int(np.argmax(candidates))] = True
            alive_after.append(still_alive)
        if all(np.array_equal(a, b) for a, b in zip(alive, alive_after, strict=True)):
            return alive
        alive = tuple(alive_after)


def surviving_selection(selection: Selection, alive: Alive) -> Selection:
    """A selection without lost channels: survivors come first in its ranks, and widths count them alone. A group of
    which it holds no survivor keeps the best channel of the new ranks."""
    ranks, widths = [], []
    for rank, width, is_alive in zip(selection.ranks, selection.widths, alive, strict=True):
        ranks.append(rank[np.argsort(~is_alive[rank], kind="stable")])
        widths.append(max(1, min(width, int(np.count_nonzero(is_alive)))))
    return Selection.of(selection.architecture, widths, ranks)


def _weight_counts(
    architecture: Architecture, weights: Sequence[TensorSpec], mask: ElementMask, alive: Alive
) -> tuple[tuple[Counts, Counts], tuple[Counts, Counts]]:
    """Per channel, the active and all weights that make it, and that read it, among what is alive."""
    totals = [tuple(np.zeros(n, np.int64) for n in architecture.sizes) for _ in range(4)]
    for spec in weights:
        output_axes = architecture.output_axes(spec.name)
        alive_indices = [_alive_indices(axis, alive) for axis in spec.axes]
        for i, axis in enumerate(spec.axes):
            if not axis.groups:
                continue
            # Weights of an index of this axis, over what is alive of the other axes.
            combinations = math.prod(int(flags.sum()) for j, flags in enumerate(alive_indices) if j != i)
            all_weights = np.full(axis.length, combinations, np.int64)
            active_weights = all_weights if spec.name not in mask else _active_counts(mask[spec.name], alive_indices, i)
            targets = totals[:2] if i in output_axes else totals[2:]
            for counts, row in zip(targets, (active_weights, all_weights), strict=True):
                add_to_channels(counts, axis, row)
    return (totals[0], totals[1]), (totals[2], totals[3])


def _active_counts(bits: BoolArray, alive_indices: Sequence[BoolArray], axis: int) -> npt.NDArray[np.int64]:
    """Active elements per index of an axis, over the alive indices of the other axes."""
    for j, row in enumerate(alive_indices):
        if j != axis and not row.all():
            bits = np.compress(row, bits, axis=j)
    other_axes = tuple(j for j in range(bits.ndim) if j != axis)
    return np.asarray(np.sum(bits, axis=other_axes, dtype=np.int64))


def _alive_indices(axis: Axis, alive: Alive) -> BoolArray:
    """Which indices of an axis belong to channels that are alive, or to none."""
    segments = [
        np.ones(s.length, np.bool_)
        if s.group == FIXED
        else np.repeat(alive[s.group][s.start : s.start + s.count], s.inner)
        for s in axis.segments
    ]
    return np.concatenate(segments) if segments else np.zeros(0, np.bool_)
