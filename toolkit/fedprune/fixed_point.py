"""Sums of floating-point numbers whose bits don't depend on the order of the additions.

A term n·v becomes the whole number round(n·v·2^s), and whole numbers add up exactly: in any order, in any grouping,
on any machine. n·v itself is exact in float64, because n has at most 24 bits and v, a float32, has 24. With |v| ≤
2^k, a total weight of at most 2^24 and s = 38 − k, a sum stays below 2^62 plus half a unit per term, so int64 can't
overflow; the unit is 2^-38 of the bound. Where 2^-38 of the bound is too coarse (batch-norm statistics, which have no
natural bound), further *limbs* hold what rounding left over, each 2^38 times finer.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.errors import ProtocolError

MAX_WEIGHT = 2**24
"""The largest total weight of a sum."""

VALUE_BITS = 38
_BLOCK = 131_072  # float64s, 1 MiB: few enough for the cache, enough to hide numpy's cost per call
_CHECKED = 16_384  # few enough that the squares of usual weights don't add up to the bound's
# Adding 1.5·2^52 to a float64 of magnitude below 2^51 leaves it, rounded to a whole number (ties to even, as np.rint
# does), in the low bits of the mantissa: cheaper than a conversion, which has no vector instruction on most CPUs.
_MAGIC = 1.5 * 2.0**52
_MAGIC_BITS = int(np.array(_MAGIC).view(np.int64))
_MAGIC_WEIGHT = 2 ** (50 - VALUE_BITS)

Index = tuple[Any, ...]

_OWN = threading.local()


@dataclass(frozen=True)
class Range:
    """What a sum accepts, and how finely it keeps it.

    Attributes:
        exponent: Values are at most 2^exponent in magnitude.
        limbs: 1 keeps 2^-38 of the bound, every further limb 38 bits more.
    """

    exponent: int
    limbs: int = 1

    @property
    def bound(self) -> float:
        """The largest magnitude of a value."""
        return 2.0**self.exponent

    @property
    def unit(self) -> float:
        """What a term may lose at most twice of."""
        return math.ldexp(1.0, self.exponent - VALUE_BITS * self.limbs)

    @classmethod
    def around(cls, reference: npt.NDArray[Any], *, least: int = 3, headroom: int = 3, limbs: int = 1) -> Range:
        """A range with room above the largest magnitude of `reference`, the same wherever it is computed.

        Args:
            reference: Finite values that all parties agree on, such as the round's base tensor.
            least: The exponent isn't smaller than this.
            headroom: Doublings above the reference's largest magnitude.
            limbs: As in the class.
        """
        top = magnitude(reference)
        return cls(max(least, math.frexp(top)[1] + headroom) if math.isfinite(top) else least, limbs)


def magnitude(values: npt.NDArray[Any]) -> float:
    """The largest |value|; NaN or infinite where a value is."""
    if not values.size:
        return 0.0
    low, high = float(values.min()), float(values.max())
    return max(-low, high) if low == low else low


def check_range(name: str, values: npt.NDArray[Any], bound: float) -> None:
    """Check that all values are finite and within a bound.

    Raises:
        ProtocolError: One isn't; the message names the tensor, the bound and what was found.
    """
    flat = values.reshape(-1)
    # The sum of squares bounds every square and costs half of what minimum and maximum do; only where it is large (or
    # not finite) do we look closer. The tenth leaves room for its own rounding.
    limit = 0.9 * bound * bound
    single = flat.dtype == np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, flat.size, _CHECKED):
            block = flat[start : start + _CHECKED]
            if not (single and float(np.dot(block, block)) <= limit):
                _check_block(name, block, bound)


def _check_block(name: str, block: npt.NDArray[Any], bound: float) -> None:
    top = magnitude(block)
    if not top <= bound:
        raise ProtocolError(
            f"values of {name}",
            expected=f"finite numbers of magnitude up to {bound:g}",
            got="a number that is not finite" if not math.isfinite(top) else f"{top:g}",
        )


class FixedSum:
    """A tensor of order-free sums of weighted values.

    Args:
        shape: The tensor's shape.
        span: What values it accepts; callers check them with `check_range` first.
    """

    __slots__ = ("limbs", "span")

    def __init__(self, shape: tuple[int, ...], span: Range) -> None:
        self.span = span
        self.limbs: tuple[npt.NDArray[np.int64], ...] = tuple(np.zeros(shape, np.int64) for _ in range(span.limbs))

    def add(self, values: npt.NDArray[Any], weight: int, at: Index = (...,)) -> None:
        """Add weight·values at an index.

        Args:
            values: Finite values within the bound, of the indexed part's shape.
            weight: A whole number from 1 up; all weights together must stay within `MAX_WEIGHT`.
            at: Slices, or an open mesh of index arrays in which no index comes twice.
        """
        if self.span.limbs > 1:
            self._add_limbs(values, weight, at)
            return
        total = self.limbs[0]
        factor = math.ldexp(float(weight), VALUE_BITS - self.span.exponent)
        part = total[at]
        if not np.may_share_memory(part, total):  # an open mesh gives a copy
            add_blocks(part, values, factor, weight)
            total[at] = part
        else:
            add_blocks(part, values, factor, weight)

    def _add_limbs(self, values: npt.NDArray[Any], weight: int, at: Index) -> None:
        rest = values.astype(np.float64) * weight
        for i, limb in enumerate(self.limbs, start=1):
            scale = VALUE_BITS * i - self.span.exponent
            whole = np.rint(np.ldexp(rest, scale))
            limb[at] += whole.astype(np.int64)
            rest -= np.ldexp(whole, -scale)

    def merge(self, other: FixedSum) -> None:
        """Add another sum of the same shape and range."""
        for mine, theirs in zip(self.limbs, other.limbs, strict=True):
            mine += theirs

    def value(self, at: Index = (...,)) -> npt.NDArray[np.float64]:
        """The sums as float64, rounded once per limb."""
        out: npt.NDArray[np.float64] = self.limbs[0][at].astype(np.float64)
        if self.span.limbs == 1:
            out *= self.span.unit
            return out
        out = np.zeros(out.shape)
        for i in range(self.span.limbs, 0, -1):
            out += np.ldexp(self.limbs[i - 1][at].astype(np.float64), self.span.exponent - VALUE_BITS * i)
        return out


def add_blocks(total: npt.NDArray[np.int64], values: npt.NDArray[Any], factor: float, weight: int) -> None:
    """Add round(values · factor) to `total` in place, in blocks that stay in the cache.

    Args:
        total: A view on the sums.
        values: Values of the same shape.
        factor: weight · 2^s.
        weight: Decides which of two ways of rounding is used; both give the same numbers.
    """
    if total.flags.c_contiguous and values.flags.c_contiguous:
        total, values = total.reshape(-1), values.reshape(-1)
    if not total.size:
        return
    if not total.ndim:
        total, values = total.reshape(1), values.reshape(1)
    row = total.size // total.shape[0]
    if row > _BLOCK:
        for i in range(total.shape[0]):
            add_blocks(total[i], values[i], factor, weight)
        return
    rows = min(total.shape[0], max(1, _BLOCK // row))
    scratch = _scratch()[: rows * row].reshape(rows, *total.shape[1:])
    for start in range(0, total.shape[0], rows):
        into = total[start : start + rows]
        block = scratch[: len(into)]
        block[...] = values[start : start + rows]
        block *= factor
        if weight <= _MAGIC_WEIGHT:
            block += _MAGIC
            whole = block.view(np.int64)
            whole -= _MAGIC_BITS
            into += whole
        else:
            into += np.rint(block).astype(np.int64)


def _scratch() -> npt.NDArray[np.float64]:
    """A block of this thread's own: fresh memory would cost a page fault per 512 numbers."""
    block: npt.NDArray[np.float64] | None = getattr(_OWN, "block", None)
    if block is None:
        block = _OWN.block = np.empty(_BLOCK, np.float64)
    return block


def run_all(tasks: list[Any], threads: int) -> None:
    """Run callables, on several threads where asked: order-free sums don't care which is first."""
    if threads <= 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(task) for task in tasks]:
            future.result()
