"""Means that single updates can't pull away: per coordinate the median or the trimmed mean of the devices that hold it
(Yin et al. 2018, Def. 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import ClientUpdate
from fedprune.aggregation.layout import Expansion
from fedprune.model.architecture import TensorSpec
from fedprune.model.selection import Selection, Tensors, mesh

Centre = Literal["median", "trimmed"]

_BLOCK_NUMBERS = 131_072  # float32s of all devices together, 512 KiB: they stay in the cache
# Devices up to which a network of exchanges is faster than sorting: it has more steps, but vector instructions.
_MAX_NETWORK_DEVICES = 256


@dataclass(frozen=True)
class Slab:
    """Rows from `start` to before `stop` of a tensor (both 0 without axes), of which all updates are looked at
    together."""

    spec: TensorSpec
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.stop - self.start, *self.spec.shape[1:]) if self.spec.axes else ()


def slabs(specs: Sequence[TensorSpec], updates: int, budget: int) -> Iterator[list[Slab]]:
    """Parts of a model that fit into a memory budget in bytes together, for a number of float32 updates; a single row
    may be more."""
    room = max(1, budget // (4 * max(1, updates)))
    numbers = 0
    batch: list[Slab] = []
    for spec in specs:
        rows = spec.shape[0] if spec.axes else 1
        row_size = max(1, math.prod(spec.shape[1:]))
        step = max(1, room // row_size)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            if batch and numbers + (stop - start) * row_size > room:
                yield batch
                numbers, batch = 0, []
            batch.append(Slab(spec, start, stop) if spec.axes else Slab(spec, 0, 0))
            numbers += (stop - start) * row_size
    if batch:
        yield batch


def update_rows(slab: Slab, update: ClientUpdate, base: Tensors, full_selection: Selection) -> npt.NDArray[np.float32]:
    """An update's values w_t + Δ_k in a slab (`base` is w_t): infinite where it holds none.

    `full_selection` is the whole model, in its own order of channels.
    """
    spec, selection = slab.spec, update.selection
    value = update.tensors[spec.name]
    if spec.kind.is_trainable:
        if update.sent is not None:
            base_value = base[spec.name][mesh(selection.maps(spec.name))]
            value = (value.astype(np.float64) - update.sent[spec.name] + base_value).astype(np.float32)
        if spec.name in update.mask:
            value = np.where(update.mask[spec.name], value, np.float32(np.inf))
    if not spec.axes:
        return value
    return Expansion(full_selection, spec, selection, value, np.inf).rows(slab.start, slab.stop)


def robust_mean(values: npt.NDArray[np.float32], kind: Centre, trim: float = 0.0) -> npt.NDArray[np.float32]:
    """The median or the trimmed mean of devices' values, per coordinate over those that hold it; infinite where none
    does.

    Args:
        values: [devices, ...], infinite where a device doesn't hold a coordinate; used up.
        kind: `median`: of an even number the mean of the middle two. `trimmed`: the mean without the floor(trim·h)
            lowest and as many highest of h.
        trim: Below 0.5.
    """
    devices = len(values)
    flat = values.reshape(devices, -1)
    out = np.empty(flat.shape[1], np.float32)
    step = max(64, _BLOCK_NUMBERS // devices)
    for start in range(0, flat.shape[1], step):
        block = flat[:, start : start + step]
        # Where all devices hold all coordinates, none needs to be counted.
        if block.max(initial=0) < np.inf:
            counts, holders = [devices], None
        else:
            holders = np.add.reduce(np.isfinite(block), axis=0, dtype=np.int32)
            counts = np.flatnonzero(np.bincount(holders)).tolist()
        rows = _sorted_rows(block, devices if kind != "median" else counts[-1] // 2 + 1)
        target = out[start : start + step]
        for count in counts:
            indices: Any = ... if holders is None else np.flatnonzero(holders == count)
            averaged = [rows[i][indices] for i in _averaged_indices(count, kind, trim)]
            target[indices] = np.mean(averaged, axis=0, dtype=np.float64) if count else np.inf
    return out.reshape(values.shape[1:])


def _averaged_indices(count: int, kind: Centre, trim: float) -> range:
    """Indices of the ordered values that are averaged, of `count` devices."""
    if kind == "median":
        return range((count - 1) // 2, count // 2 + 1)
    # 1e-9: trim · count may be a whole number but for a floating-point error, and must not lose it.
    cut = math.floor(trim * count + 1e-9)
    return range(cut, count - cut)


def _sorted_rows(block: npt.NDArray[np.float32], count: int) -> list[npt.NDArray[np.float32]]:
    """The columns of [devices, numbers] in ascending order, as rows from the lowest on: at least the first `count`.

    A network of exchanges (Batcher 1968) does whole rows at a time, in the cache; from many devices on, sorting takes
    fewer steps.
    """
    if len(block) > _MAX_NETWORK_DEVICES:
        return list(np.sort(block, axis=0))
    rows, buffer = list(block), np.empty(block.shape[1], np.float32)
    for i, j in _exchange_pairs(len(block), count):
        low, high = rows[i], rows[j]
        np.minimum(low, high, out=buffer)
        np.maximum(low, high, out=high)
        rows[i], buffer = buffer, low
    return rows


@lru_cache(maxsize=256)
def _exchange_pairs(size: int, count: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort, without exchanges on which the lowest `count` values don't depend."""
    pairs = []
    run_length = 1
    while run_length < size:
        step = run_length
        while step:
            for first in range(step % run_length, size - step, 2 * step):
                positions = range(first, min(first + step, size - step))
                pairs += [(i, i + step) for i in positions if i // (2 * run_length) == (i + step) // (2 * run_length)]
            step //= 2
        run_length *= 2
    needed, kept_pairs = set(range(count)), []
    for pair in reversed(pairs):
        if needed & set(pair):
            needed |= set(pair)
            kept_pairs.append(pair)
    return tuple(reversed(kept_pairs))
