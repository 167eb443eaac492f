"""Sums of floating-point numbers whose bits don't depend on the order of the additions.

A value v becomes the whole number q = round(v·2^s), and n·q is added in int64: whole numbers add up exactly, in any
order, in any grouping, on any machine. With |v| ≤ 2^k, a total weight of at most 2^24 and s = 38 − k, a sum stays below
2^62, so that int64 can't overflow; the unit is 2^-38 of the bound, and a mean is off by half of it at most. Where that
is too coarse (batch-norm statistics, which have no natural bound), a sum has further *limbs*: the first holds
q = round(v·2^s), the second round((v − q·2^-s)·2^(s + 38)), and so on.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.core.errors import OutOfRangeError, ProtocolError

# The largest total weight of a sum: with it int64 can't overflow.
MAX_WEIGHT = 2**24

# Doublings above today's largest magnitude: devices agree on a range before they train, and weights grow meanwhile.
_HEADROOM_DOUBLINGS = 3

# Numbers of a dot product at once. Of more than 10,000 numbers OpenBLAS gives a part to each of its threads, which spin
# while they wait for one another: on busy cores that took a thousand times as long.
DOT_NUMBERS = 8_192

Index = tuple[Any, ...]


# Bits of a value as a whole number. 38 and the 24 of `MAX_WEIGHT` stay below the 63 of an int64.
VALUE_BITS = 38

# float64s of all rows together, 2 MiB: they stay in the cache, and hide what numpy costs per call.
_BLOCK_NUMBERS = 262_144
_MAX_ROW_NUMBERS = 32_768  # numbers of one row at once
_MAX_PRODUCT_WEIGHT = 2 ** (53 - VALUE_BITS)  # of several rows: float64 has every whole number up to 2^53


@dataclass(frozen=True)
class Range:
    """The range and the resolution of a sum.

    Attributes:
        exponent: Values are at most 2^exponent in magnitude.
        limbs: 1 keeps 2^-38 of the bound, every further limb 38 bits more.
    """

    exponent: int
    limbs: int = 1

    @property
    def bound(self) -> float:
        return 2.0**self.exponent

    @property
    def unit(self) -> float:
        """Twice the largest rounding error of a term."""
        return math.ldexp(1.0, self.exponent - VALUE_BITS * self.limbs)

    @classmethod
    def around(cls, reference: npt.NDArray[Any], *, min_exponent: int = 3, limbs: int = 1) -> Range:
        """A range with room above the largest magnitude of `reference`: finite values that all parties agree on, such
        as the round's base tensor. The exponent is at least `min_exponent`."""
        largest = largest_magnitude(reference)
        exponent = math.frexp(largest)[1] + _HEADROOM_DOUBLINGS if math.isfinite(largest) else min_exponent
        return cls(max(min_exponent, exponent), limbs)


def weight_in_round(samples: int, total: int, devices: int) -> int:
    """A device's weight in a round with these totals of devices and samples, whose sums hold at most `MAX_WEIGHT`."""
    return max(1, samples) if total <= MAX_WEIGHT else max(1, samples * (MAX_WEIGHT - devices) // total)


def largest_magnitude(values: npt.NDArray[Any]) -> float:
    """The largest |value|; NaN or infinite where a value is."""
    if not values.size:
        return 0.0
    compiled = compiled_kernels.compiled_magnitude(values)
    if compiled is not None:
        return compiled
    low, high = float(values.min()), float(values.max())
    # Only NaN differs from itself: minimum and maximum of values with a NaN are NaN.
    return abs(max(-low, high)) if low == low else low


def check_range(name: str, values: npt.NDArray[Any], bound: float) -> None:
    """Check that all values are finite and within a bound. Raises `ProtocolError`, which names the tensor, the bound
    and the value."""
    compiled = compiled_kernels.compiled_magnitude(values)
    if compiled is not None and compiled <= bound:
        return
    flat = values.reshape(-1)
    # The sum of squares bounds every square and costs half of what minimum and maximum do; only where it is large (or
    # not finite) do we look closer. The tenth leaves room for its own rounding.
    limit = 0.9 * bound * bound
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, DOT_NUMBERS):
            block = flat[start : start + DOT_NUMBERS]
            if not float(np.dot(block, block)) <= limit:
                largest = largest_magnitude(block)
                if not largest <= bound:
                    error_class = OutOfRangeError if math.isfinite(largest) else ProtocolError
                    raise error_class(
                        f"values of {name}",
                        expected=f"finite numbers of magnitude up to {bound:g}",
                        got="a number that is not finite" if not math.isfinite(largest) else f"{largest:g}",
                    )


def sum_of_squares(values: npt.NDArray[Any]) -> float:
    """The sum of all squares; NaN or infinite where a value is, or a sum of some squares too large for their type."""
    flat = values.reshape(-1)
    blocks = (flat[start : start + DOT_NUMBERS] for start in range(0, flat.size, DOT_NUMBERS))
    return sum((float(np.dot(block, block)) for block in blocks), 0.0)


class FixedSum:
    """A tensor of order-free sums of weighted values; callers check them with `check_range` first."""

    __slots__ = ("limbs", "span")

    def __init__(self, shape: tuple[int, ...], span: Range) -> None:
        self.span = span
        self.limbs = tuple(np.zeros(shape, np.int64) for _ in range(span.limbs))

    def add(self, values: npt.NDArray[Any], weight: int, index: Index = (...,)) -> None:
        """Add weight·values, which are finite and within the bound, at an index: slices, or an open mesh of index
        arrays in which no index comes twice. All weights together must stay within `MAX_WEIGHT`."""
        self.add_rows([values], [weight], index)

    def add_rows(self, rows: Sequence[npt.NDArray[Any]], weights: Sequence[int], index: Index = (...,)) -> None:
        """Add several weights·values, all of one type, at one index, which reads and writes the sums once."""
        if self.span.limbs > 1:
            self._add_to_limbs(rows, weights, index)
            return
        total = self.limbs[0]
        target = total[index]
        add_in_blocks(target, rows, weights, VALUE_BITS - self.span.exponent)
        if not np.may_share_memory(target, total):  # an open mesh gives a copy
            total[index] = target

    def _add_to_limbs(self, rows: Sequence[npt.NDArray[Any]], weights: Sequence[int], index: Index) -> None:
        remainder = np.stack([values.astype(np.float64) for values in rows])
        remainder *= np.array(weights, np.float64).reshape(-1, *[1] * rows[0].ndim)
        for i, limb in enumerate(self.limbs, start=1):
            scale = VALUE_BITS * i - self.span.exponent
            rounded = np.rint(remainder * math.ldexp(1.0, scale))
            limb[index] += rounded.astype(np.int64).sum(axis=0)
            remainder -= rounded * math.ldexp(1.0, -scale)

    def scatter(self, scattered: Sequence[compiled_kernels.ScatteredRows], inner: int) -> bool:
        """Add weights·values at rows and columns of `inner` numbers. Returns False if this isn't compiled."""
        total = self.limbs[0]
        if self.span.limbs > 1 or not total.size:
            return False
        shaped = total.reshape(total.shape[0], -1, inner)
        return compiled_kernels.scatter_rows(shaped, scattered, VALUE_BITS - self.span.exponent)

    def close_to(
        self,
        out: npt.NDArray[np.float32],
        base: npt.NDArray[np.float32],
        share: npt.NDArray[np.float64],
        rows: npt.NDArray[np.int64],
        columns: npt.NDArray[np.int64],
        inner: int,
    ) -> bool:
        """Write the means of a closed round to `out`: sum · unit · share, or `base` where the share is 0, each row and
        column (of `inner` numbers) at its place in `rows` and `columns`. Returns False if this isn't compiled."""
        if self.span.limbs > 1 or not out.size:
            return False
        shape = (rows.size, columns.size, inner)
        shaped = (array.reshape(shape) for array in (base, out))
        return compiled_kernels.close_sums(self.limbs[0].reshape(shape), share, self.span.unit, rows, columns, *shaped)

    def round_to(self, out: npt.NDArray[np.float32], factor: float) -> bool:
        """Put `value(factor)`, rounded to float32, into `out`. Returns False if this isn't compiled."""
        return self.span.limbs == 1 and compiled_kernels.scale_sums(self.limbs[0], self.span.unit * factor, out)

    def value(
        self, index: Index = (...,), factor: float = 1.0, out: npt.NDArray[np.float64] | None = None
    ) -> npt.NDArray[np.float64]:
        """The sums at an index times a factor as float64, rounded once per limb and by the factor; `out` is where they
        may be put."""
        if self.span.limbs == 1:
            # The unit is a power of two, so that this is one rounding.
            scaled: npt.NDArray[np.float64] = np.multiply(self.limbs[0][index], self.span.unit * factor, out=out)
            return scaled
        total = np.zeros(self.limbs[0][index].shape)
        for i in range(self.span.limbs, 0, -1):
            total += np.ldexp(self.limbs[i - 1][index].astype(np.float64), self.span.exponent - VALUE_BITS * i)
        total *= factor
        return total


class _Scratch(threading.local):
    """A thread's own memory: fresh one would cost a page fault per 512 numbers."""

    def __init__(self) -> None:
        self.scaled = np.empty(_BLOCK_NUMBERS, np.float32)
        self.rounded = np.empty(_BLOCK_NUMBERS, np.float64)
        self.weighted = np.empty(_MAX_ROW_NUMBERS, np.float64)


_SCRATCH = _Scratch()


# Several values at one coordinate are added by one product of their weights with them, in float64: all intermediate
# results are whole numbers of magnitude up to 2^53, so that this is exact, too, however a library orders it.
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
