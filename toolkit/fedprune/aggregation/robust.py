"""Means that single updates can't pull away: clipping, medians, trimmed means, and outliers.

All of it works under coverage: a coordinate's median is taken over the devices that hold it.

- Clipping (Sun et al. 2019, "Can you really backdoor federated learning?", Sec. 4): Δ ← Δ·min(1, c/‖Δ‖).
- Coordinate-wise median and trimmed mean (Yin et al. 2018, Def. 1 and 2).
- Outliers by the median absolute deviation (Iglewicz and Hoaglin 1993): |x − median| > tolerance · 1.4826 · MAD.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.client_update import ClientUpdate, norm
from fedprune.aggregation.fold import Fold
from fedprune.aggregation.layout import Expansion
from fedprune.model.architecture import Architecture, TensorSpec
from fedprune.model.selection import Selection, Tensors, mesh

Centre = Literal["median", "trimmed"]

_NORMAL = 1.4826
"""Makes the median absolute deviation the standard deviation of normal numbers."""
_LEAST_SPREAD = 0.05
"""Deviations count as at least this share of the median: devices that nearly agree don't single each other out."""

_BLOCK = 131_072  # float32s of all devices together, 512 KiB: they stay in the cache
_NETWORK = 256  # devices


def clipped(addition: ClientUpdate, base: Tensors, limit: float, left_out: Collection[str] = ()) -> ClientUpdate:
    """An update whose move, Δ over all trained tensors, is at most `limit` long; one that is not longer keeps its
    bits."""
    length = norm(addition.moves(base, left_out))
    return addition if length <= limit else addition.shortened(base, limit / length)


def standing_out(values: Mapping[str, float], tolerance: float, *, low: bool, what: str) -> dict[str, str]:
    """Devices that are too far from the median of all, and why; none if there are fewer than three.

    Args:
        tolerance: In standard deviations.
        low: Whether being low is what stands out, or being high.
        what: What the numbers are, for the reason.
    """
    if len(values) < 3:
        return {}
    numbers = np.array([values[name] for name in sorted(values)])
    middle = float(np.median(numbers))
    least = _LEAST_SPREAD * (1.0 if low else abs(middle))
    spread = max(_NORMAL * float(np.median(np.abs(numbers - middle))), least, 1e-300)
    out = {}
    for name in sorted(values):
        off = (middle - values[name] if low else values[name] - middle) / spread
        if off > tolerance:
            side = "below" if low else "above"
            out[name] = f"{what} {values[name]:.3g} lies {off:.1f} deviations {side} the median, {middle:.3g}"
    return out


class Direction:
    """Where all updates together are heading, every one of them with the same length."""

    def __init__(self, architecture: Architecture, base: Tensors, left_out: Collection[str] = ()) -> None:
        self._base = base
        self._left_out = frozenset(left_out)
        zero = {t.name: np.zeros(t.shape, np.float32) for t in architecture.tensors}
        self._fold = Fold(architecture, zero, rule="zero", excluded=self._left_out)
        self._sum: Tensors | None = None

    def add(self, addition: ClientUpdate) -> None:
        unit = self._unit(addition)
        shapes = addition.selection.shapes()
        tensors = {n: np.asarray(unit.get(n, np.zeros(s)), np.float32) for n, s in shapes.items()}
        self._fold.add(addition.selection, tensors, 1)
        self._sum = None

    def cosine(self, addition: ClientUpdate) -> float:
        """Between an update that was added and the sum of all others, where it holds coordinates."""
        if self._sum is None:
            self._sum = self._fold.close()[0]
        unit = self._unit(addition)
        dot = square = 0.0
        for name, mine in unit.items():
            at = mesh(addition.selection.maps(name))
            others = self._fold.updates * self._sum[name][at].astype(np.float64) - mine
            dot += float(np.vdot(mine, others))
            square += float(np.vdot(others, others))
        return dot / math.sqrt(square) if square > 0 else 0.0

    def _unit(self, addition: ClientUpdate) -> dict[str, npt.NDArray[np.float64]]:
        moves = addition.moves(self._base, self._left_out)
        length = norm(moves)
        return {n: v / length if length > 0 else v for n, v in moves.items()}


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
