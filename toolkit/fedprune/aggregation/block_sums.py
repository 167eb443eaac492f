"""Adds weighted rows of values to int64 sums, in blocks that stay in the cache: the inner loop of `fixed_point`.

Several values at one coordinate are added by one product of their weights with them, in float64: all intermediate
results are whole numbers of magnitude up to 2^53, so that this is exact, too, however a library orders it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels

# Bits of a value as a whole number. 38 and the 24 of `MAX_WEIGHT` stay below the 63 of an int64.
VALUE_BITS = 38

# float64s of all rows together, 2 MiB: they stay in the cache, and hide what numpy costs per call.
_BLOCK_NUMBERS = 262_144
_MAX_ROW_NUMBERS = 32_768  # numbers of one row at once
_MAX_PRODUCT_WEIGHT = 2 ** (53 - VALUE_BITS)  # of several rows: float64 has every whole number up to 2^53


class _Scratch(threading.local):
    """A thread's own memory: fresh one would cost a page fault per 512 numbers."""

    def __init__(self) -> None:
        self.scaled = np.empty(_BLOCK_NUMBERS, np.float32)
        self.rounded = np.empty(_BLOCK_NUMBERS, np.float64)
        self.weighted = np.empty(_MAX_ROW_NUMBERS, np.float64)


_SCRATCH = _Scratch()


def add_in_blocks(
    total: npt.NDArray[np.int64], rows: Sequence[npt.NDArray[Any]], weights: Sequence[int], scale: int
) -> None:
    """Add Σ weight · round(values · 2^scale) to `total` in place, in blocks that stay in the cache.

    Rows are of its shape, all float32 or all float64, of magnitude up to 2^(38 − scale).
    """
    if compiled_kernels.add_rows(total, rows, weights, scale, VALUE_BITS):
        return
    if total.flags.c_contiguous and all(r.flags.c_contiguous for r in rows):
        total, rows = total.reshape(-1), [r.reshape(-1) for r in rows]
    if not total.size:
        return
    width = total.size // total.shape[0]
    max_width = min(_MAX_ROW_NUMBERS, _BLOCK_NUMBERS // len(rows))
    if not max_width:
        # More rows than a block has room for: the order of additions is free.
        half = len(rows) // 2
        add_in_blocks(total, rows[:half], weights[:half], scale)
        add_in_blocks(total, rows[half:], weights[half:], scale)
    elif width > max_width and total.ndim > 1:
        for i in range(total.shape[0]):
            add_in_blocks(total[i], [r[i] for r in rows], weights, scale)
    else:
        step = max(1, max_width // width)
        weight_runs = compiled_kernels.weight_runs(weights, _MAX_PRODUCT_WEIGHT, len(rows))
        groups = [(first, np.array(run, np.float64)) for first, run in weight_runs]
        for start in range(0, total.shape[0], step):
            target = total[start : start + step]
            rounded = _round_rows([r[start : start + step] for r in rows], scale)
            for first, group in groups:
                target += _weigh_rows(rounded[first : first + group.size], group).reshape(target.shape)


def _round_rows(rows: Sequence[npt.NDArray[Any]], scale: int) -> npt.NDArray[np.float64]:
    """Values times 2^scale as whole numbers [rows, values], in this thread's scratch memory."""
    shape, size = rows[0].shape, rows[0].size
    rounded = _SCRATCH.rounded[: len(rows) * size].reshape(len(rows), size)
    # Scaling by a power of two and rounding to whole numbers are exact in float32, too, at half the cost.
    narrow = rows[0].dtype == np.float32
    scaled: npt.NDArray[Any] = _SCRATCH.scaled[: len(rows) * size].reshape(len(rows), size) if narrow else rounded
    factor = scaled.dtype.type(math.ldexp(1.0, scale))
    for values, row in zip(rows, scaled, strict=True):
        np.multiply(values, factor, out=row.reshape(shape))
    np.rint(scaled, out=scaled)
    if narrow:
        np.copyto(rounded, scaled)
    return rounded


def _weigh_rows(rounded: npt.NDArray[np.float64], weights: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Σ weight · rounded [values], in this thread's scratch memory."""
    if weights.sum() > _MAX_PRODUCT_WEIGHT:  # a single weight
        product: npt.NDArray[np.int64] = rounded[0].astype(np.int64) * int(weights[0])
        return product
    total = _SCRATCH.weighted[: rounded.shape[1]]
    if len(weights) == 1:
        np.multiply(rounded[0], weights[0], out=total)
    else:
        np.dot(weights, rounded, out=total)
    counts = total.view(np.int64)
    np.copyto(counts, total, casting="unsafe")  # in its own memory, which is in the cache
    return counts
