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

_BLOCK = 131_072  # float32s of all devices together, 512 KiB: they stay in the cache
_NETWORK = 256  # devices


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
    taken = 0
    batch: list[Slab] = []
    for spec in specs:
        rows = spec.shape[0] if spec.axes else 1
        row = max(1, math.prod(spec.shape[1:]))
        step = max(1, room // row)
        for start in range(0, rows, step):
            stop = min(rows, start + step)
            if batch and taken + (stop - start) * row > room:
                yield batch
                taken, batch = 0, []
            batch.append(Slab(spec, start, stop) if spec.axes else Slab(spec, 0, 0))
            taken += (stop - start) * row
    if batch:
        yield batch


def rows_of(slab: Slab, addition: ClientUpdate, base: Tensors, whole: Selection) -> npt.NDArray[np.float32]:
    """An update's values w_t + Δ_k in a slab: infinite where it holds none. `base` is the fold's, `whole` the model in
    its own order."""
    spec, selection = slab.spec, addition.selection
    value = addition.tensors[spec.name]
    if spec.kind.trainable:
        if addition.sent is not None:
            now = base[spec.name][mesh(selection.maps(spec.name))]
            value = (value.astype(np.float64) - addition.sent[spec.name] + now).astype(np.float32)
        if spec.name in addition.mask:
            value = np.where(addition.mask[spec.name], value, np.float32(np.inf))
    if not spec.axes:
        return value
    return Expansion(whole, spec, selection, value, np.inf).rows(slab.start, slab.stop)


def centre(values: npt.NDArray[np.float32], kind: Centre, trim: float = 0.0) -> npt.NDArray[np.float32]:
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
    step = max(64, _BLOCK // devices)
    for start in range(0, flat.shape[1], step):
        block = flat[:, start : start + step]
        if block.max(initial=0) < np.inf:
            counts, held = [devices], None
        else:
            held = np.add.reduce(np.isfinite(block), axis=0, dtype=np.int32)
            counts = np.flatnonzero(np.bincount(held)).tolist()
        rows = _ordered(block, devices if kind != "median" else counts[-1] // 2 + 1)
        into = out[start : start + step]
        for count in counts:
            at: Any = ... if held is None else np.flatnonzero(held == count)
            into[at] = np.inf if not count else _middle([rows[i][at] for i in _counted(count, kind, trim)])
    return out.reshape(values.shape[1:])


def _counted(count: int, kind: Centre, trim: float) -> range:
    """The ordered values that are averaged."""
    if kind == "median":
        return range((count - 1) // 2, count // 2 + 1)
    cut = math.floor(trim * count + 1e-9)
    return range(cut, count - cut)


def _middle(rows: list[npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
    total = rows[0].astype(np.float64)
    for row in rows[1:]:
        total += row
    total /= len(rows)
    return total


def _ordered(block: npt.NDArray[np.float32], wanted: int) -> list[npt.NDArray[np.float32]]:
    """The columns of [devices, numbers] in ascending order: the rows from the lowest on, as many as are wanted.

    A network of exchanges (Batcher 1968) does whole rows at a time, in the cache; from many devices on, sorting takes
    fewer steps.
    """
    if len(block) > _NETWORK:
        return list(np.sort(block, axis=0))
    rows, spare = list(block), np.empty(block.shape[1], np.float32)
    for i, j in _exchanges(len(block), wanted):
        low, high = rows[i], rows[j]
        np.minimum(low, high, out=spare)
        np.maximum(low, high, out=high)
        rows[i], spare = spare, low
    return rows


@lru_cache(maxsize=256)
def _exchanges(size: int, wanted: int) -> tuple[tuple[int, int], ...]:
    """Batcher's odd-even merge sort, without the exchanges that the lowest `wanted` values don't depend on."""
    pairs = []
    run = 1
    while run < size:
        step = run
        while step:
            for first in range(step % run, size - step, 2 * step):
                places = range(first, min(first + step, size - step))
                pairs += [(i, i + step) for i in places if i // (2 * run) == (i + step) // (2 * run)]
            step //= 2
        run *= 2
    needed, kept = set(range(wanted)), []
    for pair in reversed(pairs):
        if needed & set(pair):
            needed |= set(pair)
            kept.append(pair)
    return tuple(reversed(kept))
