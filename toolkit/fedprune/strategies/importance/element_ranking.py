"""Element masks by importance: one order of all elements, of which every density keeps a prefix.

All masks of one order are prefixes of it, so that a sparser one lies inside a denser one (PR-FL, arXiv 2403.15439;
`docs/strategies/pr-fl.md`). Elements of equal importance come in the order of tensor names and positions, so that masks
have exactly as many elements as was asked for. +∞ marks what every mask keeps, −∞ what none does.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture, TensorKind
from fedprune.model.selection import ElementMask, Tensors

Floats = npt.NDArray[np.float32]

# Tolerance in rounding the product of a density and a number of elements to a whole number.
_ROUNDING_TOLERANCE = 1e-6


def prunable(architecture: Architecture, extra_kinds: Collection[TensorKind] = ()) -> tuple[str, ...]:
    """Names of the tensors whose elements can be masked: the weights of layers, and tensors of `extra_kinds`."""
    layers = {n.weight for n in architecture.layers if n.weight}
    return tuple(
        t.name
        for t in architecture.trainable
        if t.kind in extra_kinds or (t.kind is TensorKind.WEIGHT and t.name in layers)
    )


def magnitudes(tensors: Mapping[str, Floats], names: Iterable[str]) -> Tensors:
    """|w|: the importance of every element of these tensors by its size."""
    return {n: np.abs(tensors[n]) for n in names}


def with_floors(importance: Mapping[str, Floats], weights: Mapping[str, Floats], share: float) -> Tensors:
    """Importance by which every mask keeps a share of each tensor: its largest weights. PR-FL's floor
    (`config.min_density`): floor(share · n) elements of a tensor of n and at least one, so that no layer is cut off; 0
    for no floors. Raises `BundleError` if the share is not from 0 to 1."""
    if not 0 <= share <= 1:
        raise BundleError("floor of element masks", expected="from 0 to 1", got=share)
    floored: Tensors = {}
    for name, value in importance.items():
        floored[name] = value.astype(np.float32)
        if share and value.size:
            is_kept = _largest_mask(
                np.abs(weights[name]).reshape(-1), max(1, int(share * value.size + _ROUNDING_TOLERANCE))
            )
            floored[name][is_kept.reshape(value.shape)] = np.inf
    return floored


def top_mask(importance: Mapping[str, Floats], density: float) -> ElementMask:
    """The mask that keeps the most important elements of all tensors together.

    It has floor(density · n) of the n elements, and at least one; fewer only where more than the rest is marked by −∞,
    more only where more is marked by +∞. Raises `BundleError` if the density is not above 0 and at most 1, or an
    importance is not a number.
    """
    if not 0 < density <= 1:
        raise BundleError("density of an element mask", expected="above 0 and at most 1", got=density)
    # Sorted, so that ties fall alike on every machine, whatever order a dict was read in.
    names = sorted(importance)
    flat = np.concatenate(
        [np.asarray(importance[n], np.float32).reshape(-1) for n in names] or [np.zeros(0, np.float32)]
    )
    if np.isnan(flat).any():
        bad = next(n for n in names if np.isnan(importance[n]).any())
        raise BundleError(f"importance of the elements of {bad}", expected="numbers", got="NaN")
    always, never = int(np.count_nonzero(flat == np.inf)), int(np.count_nonzero(flat == -np.inf))
    count = max(1, int(density * flat.size + _ROUNDING_TOLERANCE)) if flat.size else 0
    bits = _largest_mask(flat, max(always, min(count, flat.size - never)))
    active, offset = {}, 0
    for name in names:
        size = importance[name].size
        active[name] = bits[offset : offset + size].reshape(importance[name].shape)
        offset += size
    return active


def mask_threshold(importance: Mapping[str, Floats], mask: ElementMask) -> float:
    """The least importance of an active element; 0 if no element or every element is active. For |w| and `top_mask`, it
    is FIARSE's θ: the k-th largest |w| of the model (`docs/strategies/fiarse.md`)."""
    # A threshold of the smallest weight would drop it as soon as it shrinks; at 0 the graph computes an ordinary step.
    if all(bits.all() for bits in mask.values()):
        return 0.0
    smallest_active = [float(importance[n][m].min()) for n, m in mask.items() if m.any()]
    return min(smallest_active, default=0.0)


def quantile(value_arrays: Iterable[npt.NDArray[np.floating]], q: float) -> float:
    """The q-quantile of all values together, linear between neighbours, for any number of values. Raises `BundleError`
    if q is not from 0 to 1, or there is no value."""
    if not 0 <= q <= 1:
        raise BundleError("quantile", expected="from 0 to 1", got=q)
    arrays = [np.asarray(p).reshape(-1) for p in value_arrays]
    flat = np.concatenate(arrays) if arrays else np.zeros(0)
    if not flat.size:
        raise BundleError("quantile of nothing")
    position = q * (flat.size - 1)
    low = min(int(position), flat.size - 1)
    high = min(low + 1, flat.size - 1)
    flat.partition((low, high))
    # Equal neighbours are returned as they are: interpolation would add a rounding, and ±∞ would become NaN.
    below, above = float(flat[low]), float(flat[high])
    return below if below == above else below + (position - low) * (above - below)


def _largest_mask(values: Floats, count: int) -> npt.NDArray[np.bool_]:
    """Which of the values are the `count` largest; of equal ones the first."""
    if count <= 0:
        return np.zeros(values.shape, np.bool_)
    if count >= values.size:
        return np.ones(values.shape, np.bool_)
    smallest_kept = np.partition(values, values.size - count)[values.size - count]
    is_kept: npt.NDArray[np.bool_] = values > smallest_kept
    ties = np.flatnonzero(values == smallest_kept)
    is_kept[ties[: count - int(np.count_nonzero(is_kept))]] = True
    return is_kept
