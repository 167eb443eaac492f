"""How large numbers are, and whether they are numbers at all."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation import compiled_kernels
from fedprune.core.errors import ProtocolError

_CHECKED = 131_072  # squares added at once at most: many hide what a call costs
_CHECKED_LEAST = 8_192  # few enough that the squares of usual weights don't add up to the bound's


def magnitude(values: npt.NDArray[Any]) -> float:
    """The largest |value|; NaN or infinite where a value is."""
    if not values.size:
        return 0.0
    quickly = compiled_kernels.magnitude(values)
    if quickly is not None:
        return quickly
    low, high = float(values.min()), float(values.max())
    return abs(max(-low, high)) if low == low else low


def check_range(name: str, values: npt.NDArray[Any], bound: float) -> None:
    """Check that all values are finite and within a bound.

    Raises:
        ProtocolError: One isn't; the message names the tensor, the bound and what was found.
    """
    quickly = compiled_kernels.magnitude(values)
    if quickly is not None and quickly <= bound:
        return
    flat = values.reshape(-1)
    if flat.dtype != np.float32:
        _check_block(name, flat, bound)
        return
    # The sum of squares bounds every square and costs half of what minimum and maximum do; only where it is large (or
    # not finite) do we look closer, and take fewer at a time from there on. The tenth leaves room for its own rounding.
    limit = 0.9 * bound * bound
    start, step = 0, _CHECKED_LEAST
    with np.errstate(over="ignore", invalid="ignore"):
        while start < flat.size:
            block = flat[start : start + step]
            square = float(np.dot(block, block))
            if not square <= limit and step > _CHECKED_LEAST:
                step //= 2
                continue
            if not square <= limit:
                _check_block(name, block, bound)
            start += step
            if square <= 0.45 * limit:
                step = min(2 * step, _CHECKED)


def _check_block(name: str, block: npt.NDArray[Any], bound: float) -> None:
    top = magnitude(block)
    if not top <= bound:
        raise ProtocolError(
            f"values of {name}",
            expected=f"finite numbers of magnitude up to {bound:g}",
            got="a number that is not finite" if not math.isfinite(top) else f"{top:g}",
        )
