"""Squared distances between all pairs of rows of two matrices."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

# Squared distances below this share of ‖a‖² + ‖b‖² are recomputed: cancellation leaves them too few digits.
_NEAR_SHARE = 1e-4

_BLOCK_SIZE = 1 << 20


def squared_distances(a: Floats, b: Floats, products: Floats | None = None) -> Floats:
    """‖a_j − b_k‖² [n, m] for all pairs of rows of a [n, f] and b [m, f], from one matrix product. `products` are a·bᵀ,
    if known; they are overwritten. Distances are exactly 0 for equal rows. Others have a relative error below 1 %, and
    far less for rows that differ by more than 1 %."""
    squared_norms_a, squared_norms_b = _squared_norms(a), _squared_norms(b)
    out: Floats = a @ b.T if products is None else products
    out *= -2
    out += squared_norms_a[:, None]
    out += squared_norms_b
    # Rows are usually far apart: checking the smallest distance first avoids comparing each with its own bound.
    if out.size and float(out.min()) < _NEAR_SHARE * float(squared_norms_a.max() + squared_norms_b.max()):
        near = np.flatnonzero((out < _NEAR_SHARE * (squared_norms_a[:, None] + squared_norms_b)).reshape(-1))
        _recompute(out, a, b, near)
    return out


def _squared_norms(a: Floats) -> Floats:
    """‖a_j‖² of all rows, as batched row × column products, which in BLAS are bound by memory bandwidth."""
    norms: Floats = np.matmul(a[:, None], a[:, :, None]).reshape(-1)
    return norms


def _recompute(out: Floats, a: Floats, b: Floats, pairs: npt.NDArray[np.int64]) -> None:
    """Recompute squared distances: of a few pairs from differences, of many by a product in float64."""
    if pairs.size > 4 * (a.shape[0] + b.shape[0]):
        middle = b.mean(0, dtype=np.float64)
        centred_a, centred_b = a - middle, b - middle
        exact = (
            np.einsum("ij,ij->i", centred_a, centred_a)[:, None]
            + np.einsum("ij,ij->i", centred_b, centred_b)
            - 2 * (centred_a @ centred_b.T)
        )
        out[...] = np.maximum(exact, 0)
        pairs = np.flatnonzero((exact < 1e-12 * np.abs(exact).max()).reshape(-1))
    flat = out.reshape(-1)
    chunk_size = max(1, _BLOCK_SIZE // max(1, a.shape[1]))
    for start in range(0, pairs.size, chunk_size):
        chunk = pairs[start : start + chunk_size]
        differences = a[chunk // b.shape[0]] - b[chunk % b.shape[0]]
        flat[chunk] = np.einsum("ij,ij->i", differences, differences)
