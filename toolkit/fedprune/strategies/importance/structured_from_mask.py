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
from fedprune.model.selection import Active, Bits, Selection, check_mask
from fedprune.strategies.importance.gradient_stats import collect

Alive = tuple[Bits, ...]
"""Per group, whether each channel is left."""

_HAIR = 1e-9

Counts = tuple[npt.NDArray[np.int64], ...]


def survivors(architecture: Architecture, mask: Active, *, share: float = 1.0) -> Alive:
    """Which channels are left.

    Raises `BundleError` if the share is not above 0 and at most 1, or the mask doesn't fit the architecture.

    Args:
        mask: Of the whole model's elements.
        share: A channel is lost where at least this share of the weights that make it is masked, or all that read it.
    """
    if not 0 < share <= 1:
        raise BundleError("masked share of a lost channel", expected="above 0 and at most 1", got=share)
    check_mask(mask, {t.name: t.shape for t in architecture.tensors})
    layers = {n.weight for n in architecture.layers if n.weight}
    weights = [t for t in architecture.tensors if t.kind is TensorKind.WEIGHT and t.name in layers]
    alive = tuple(np.ones(n, np.bool_) for n in architecture.sizes)
    while True:
        makers, readers = _counts(architecture, weights, mask, alive)
        following = []
        for g, before in enumerate(alive):
            active, whole = makers[0][g], makers[1][g]
            lost = (whole > 0) & (whole - active >= share * whole - _HAIR)
            lost |= (readers[1][g] > 0) & (readers[0][g] == 0)
            after = before & ~lost
            if not after.any():
                best = np.where(before, active, -1)
                after[int(np.argmax(best))] = True
            following.append(after)
        if all(np.array_equal(a, b) for a, b in zip(alive, following, strict=True)):
            return alive
        alive = tuple(following)


def surviving(selection: Selection, alive: Alive) -> Selection:
    """The remaining selection: its ranks with the survivors first, its widths without the others.

    A group of which it holds no survivor keeps the best channel of the new ranks.
    """
    ranks, widths = [], []
    for rank, width, left in zip(selection.ranks, selection.widths, alive, strict=True):
        ranks.append(rank[np.argsort(~left[rank], kind="stable")])
        widths.append(max(1, min(width, int(np.count_nonzero(left)))))
    return Selection.of(selection.architecture, widths, ranks)


def _counts(
    architecture: Architecture, weights: Sequence[TensorSpec], mask: Active, alive: Alive
) -> tuple[tuple[Counts, Counts], tuple[Counts, Counts]]:
    """Per channel the active weights and all weights that make it, and those that read it, of what is alive."""
    out = [tuple(np.zeros(n, np.int64) for n in architecture.sizes) for _ in range(4)]
    for spec in weights:
        made = architecture.output_axes(spec.name)
        held = [_spread(axis, alive) for axis in spec.axes]
        for i, axis in enumerate(spec.axes):
            if not axis.groups:
                continue
            others = math.prod(int(h.sum()) for j, h in enumerate(held) if j != i)
            whole = np.full(axis.length, others, np.int64)
            active = whole if spec.name not in mask else _active(mask[spec.name], held, i)
            into = out[:2] if i in made else out[2:]
            for counts, row in zip(into, (active, whole), strict=True):
                collect(counts, axis, row)
    return (out[0], out[1]), (out[2], out[3])


def _active(bits: Bits, held: Sequence[Bits], axis: int) -> npt.NDArray[np.int64]:
    """Active elements per index of an axis, over what is held of the others."""
    for j, row in enumerate(held):
        if j != axis and not row.all():
            bits = np.compress(row, bits, axis=j)
    rest = tuple(j for j in range(bits.ndim) if j != axis)
    return np.asarray(np.sum(bits, axis=rest, dtype=np.int64))


def _spread(axis: Axis, alive: Alive) -> Bits:
    """Which indices of an axis belong to channels that are alive, or to none."""
    parts = [
        np.ones(s.length, np.bool_)
        if s.group == FIXED
        else np.repeat(alive[s.group][s.start : s.start + s.count], s.inner)
        for s in axis.segments
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.bool_)
