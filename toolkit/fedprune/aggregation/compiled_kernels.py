"""What a fold spends its time with, done by loops that `fedprune.aggregation.kernel_compiler` has compiled.

They do what `fedprune.aggregation.fixed_point` does with numpy, bit for bit, in one pass over the memory instead of
five. All of them say whether it could be done: without loops, or where a tensor lies in memory as none expects it,
numpy does it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_CACHED = 131_072
"""Sums that are worked on at once where numbers lie apart: 1 MiB."""
_EXACT = 2**53
"""float64 holds every whole number up to this magnitude."""

SIZES = (2, 4, 8)
"""How many updates a loop of `add` takes at once."""

Loop = Callable[..., Any]

_compiled: dict[str, Loop] = {}


def use(loops: Mapping[str, Loop]) -> None:
    """Work with these loops from now on; none for numpy alone."""
    global _compiled
    _compiled = dict(loops)


def loops() -> Mapping[str, Loop]:
    """What `use` was given."""
    return _compiled


def in_use() -> bool:
    """Whether there are loops to work with."""
    return bool(_compiled)


def magnitude(values: npt.NDArray[Any]) -> float | None:
    """The largest |value| of some float32s, NaN where one is; None where no loop can tell."""
    loop = _compiled.get("largest")
    if loop is None or values.dtype != np.float32 or not values.flags.c_contiguous:
        return None
    return float(loop(values.reshape(-1).view(np.int32)))


def scale(total: npt.NDArray[Any], factor: float, out: npt.NDArray[np.float32]) -> bool:
    """Put sums times a factor, rounded once to float64 and once to float32, into `out`, and say whether that was done.

    Args:
        total: Sums, float64 or int64.
        factor: What they are multiplied with.
        out: Of the same shape.
    """
    loop = _compiled.get(f"scale {total.dtype.kind}")
    if loop is None or total.shape != out.shape or not (total.flags.c_contiguous and out.flags.c_contiguous):
        return False
    loop(total.reshape(-1), factor, out.reshape(-1))
    return True


def add(
    total: npt.NDArray[Any], rows: Sequence[npt.NDArray[Any]], weights: Sequence[int], scale: int, bits: int
) -> bool:
    """Add Σ weight · round(values · 2^scale) to `total` in place, and say whether that was done.

    Args:
        total: A view on sums, float64 or int64; float64s hold whole numbers up to 2^53, also after this.
        rows: Arrays of its shape.
        weights: One per array.
        scale: Of the values.
        bits: Scaled values are at most 2^bits in magnitude.
    """
    if not _compiled or not total.size or any(r.dtype != np.float32 or r.shape != total.shape for r in rows):
        return False
    lines = _lines([total, *rows])
    if lines is None:
        return False
    count, width, (stride, step, *steps) = lines
    if any(other != step for other in steps):
        return False
    into, *flat = (
        _memory(part, count, width, by) for part, by in zip((total, *rows), (stride, step, *steps), strict=True)
    )
    kind, factor = total.dtype.kind, np.float32(math.ldexp(1.0, scale))
    most = _EXACT >> bits if kind == "i" else max(_EXACT, sum(weights))
    for first, several in runs(weights, most, SIZES[-1]):
        sent = flat[first : first + len(several)]
        if several[0] > most:
            _compiled["heavy"](into, stride, tuple(sent), step, count, width, several[0], factor)
            continue
        size = next(n for n in SIZES if n >= len(several))
        # What a loop takes more than there is counts nothing, and is in the cache.
        sent += sent[:1] * (size - len(several))
        padded = np.array([*several, *[0] * (size - len(several))], np.float64)
        _compiled[f"{size} {kind}"](into, stride, tuple(sent), step, count, width, padded, factor)
    return True


class Apart(NamedTuple):
    """Numbers that belong to rows and columns of sums.

    Attributes:
        rows: By row of the values, the sums'; none comes twice.
        columns: The same by column.
        values: Of these rows and columns, and of what lies side by side there.
        weight: What they are multiplied with.
    """

    rows: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int64]
    values: npt.NDArray[Any]
    weight: int


def scatter(total: npt.NDArray[Any], several: Sequence[Apart], scale: int) -> bool:
    """Add weight · round(values · 2^scale) to sums that lie apart, in place, and say whether that was done.

    Args:
        total: Sums [rows, columns, numbers side by side], float64 or int64.
        several: What is added.
        scale: As in `add`.
    """
    loop = _compiled.get(f"scatter {total.dtype.kind}")
    _, across, beside = total.shape
    if loop is None or not total.size:
        return False
    if not all(p.flags.c_contiguous for p in (total, *(one.values for one in several))):
        return False
    for one in several:
        fits = one.values.size == one.rows.size * one.columns.size * beside
        if one.values.dtype != np.float32 or not fits:
            return False
    factor, into = np.float32(math.ldexp(1.0, scale)), total.reshape(-1)
    # Sums are gone through as they lie, and some of them with all values while they are in the cache.
    orders = [(np.argsort(one.rows), np.argsort(one.columns)) for one in several]
    ordered = [(one.rows[r], one.columns[c]) for one, (r, c) in zip(several, orders, strict=True)]
    if not all(_inside(rows, len(total)) and _inside(columns, across) for rows, columns in ordered):
        return False
    step = max(1, _CACHED // (across * beside))
    for start in range(0, total.shape[0], step):
        for one, (by_row, by_column), (rows, columns) in zip(several, orders, ordered, strict=True):
            first, last = np.searchsorted(rows, (start, start + step))
            if first < last:
                which = (rows[first:last], by_row[first:last], columns, by_column)
                loop(into, across, beside, *which, one.values.reshape(-1), one.weight, factor)
    return True


def _inside(places: npt.NDArray[np.int64], length: int) -> bool:
    """Whether ascending places lie within an axis: a loop doesn't look."""
    return not places.size or 0 <= int(places[0]) <= int(places[-1]) < length


def close(
    total: npt.NDArray[Any],
    share: npt.NDArray[np.float64],
    factor: float,
    rows: npt.NDArray[np.int64],
    columns: npt.NDArray[np.int64],
    base: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> bool:
    """Put total · factor · share into `out` in another order, or the base where that is 0; say whether it was done.

    Args:
        total: Sums [rows, columns, numbers side by side], float64 or int64.
        share: By row and column what sums are multiplied with after the factor; 0 where there are none.
        factor: The sums' unit.
        rows: By row of the sums, where it is in `base` and `out`.
        columns: The same by column.
        base: Of `total`'s shape.
        out: Of `total`'s shape.
    """
    loop = _compiled.get(f"close {total.dtype.kind}")
    alike = base.shape == out.shape == total.shape and share.shape == total.shape[:2] == (rows.size, columns.size)
    if loop is None or not alike or not all(part.flags.c_contiguous for part in (total, share, base, out)):
        return False
    if not (_inside(np.sort(rows), len(total)) and _inside(np.sort(columns), total.shape[1])):
        return False
    loop(total.reshape(-1), share, factor, total.shape[2], rows, columns, base.reshape(-1), out.reshape(-1))
    return True


def runs(weights: Sequence[int], most: int, together: int) -> Iterator[tuple[int, list[int]]]:
    """Runs of weights that are added at once: where they begin, and they. One that is over `most` is alone.

    Args:
        weights: In the order of what they belong to.
        most: What the weights of a run add up to at most.
        together: How many a run has at most.
    """
    first = 0
    for i in range(1, len(weights) + 1):
        if i == len(weights) or i - first == together or sum(weights[first : i + 1]) > most:
            yield first, list(weights[first:i])
            first = i


def _lines(parts: Sequence[npt.NDArray[Any]]) -> tuple[int, int, list[int]] | None:
    """How arrays of one shape lie in memory, as lines of neighbours.

    Returns:
        How many lines, how long they are, and by array how far it is from one to the next, in numbers; None where it
        is not so simple.
    """
    shape, width = parts[0].shape, 1
    axis = len(shape)
    while axis and all(shape[axis - 1] == 1 or p.strides[axis - 1] == width * p.itemsize for p in parts):
        axis -= 1
        width *= shape[axis]
    if not axis:
        return 1, width, [width] * len(parts)
    steps = [p.strides[0] // p.itemsize for p in parts]
    if axis > 1 or any(s < width or p.strides[0] % p.itemsize for s, p in zip(steps, parts, strict=True)):
        return None
    return shape[0], width, steps


def _memory(part: npt.NDArray[Any], count: int, width: int, step: int) -> npt.NDArray[Any]:
    """An array's memory from its first number to its last."""
    if part.flags.c_contiguous:
        return part.reshape(-1)
    return np.lib.stride_tricks.as_strided(part, ((count - 1) * step + width,), (part.itemsize,))
