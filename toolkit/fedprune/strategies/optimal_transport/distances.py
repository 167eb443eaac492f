"""Euclidean distances between the rows of two matrices, which are what transporting a channel costs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]

_NEAR = 1e-4
"""Squared distances below this share of ‖a‖² + ‖b‖² are computed anew: the product leaves too few of their digits."""

_BLOCK = 1 << 20


def squared_distances(
    a: Floats, b: Floats, products: Floats | None = None, norms: npt.NDArray[np.float32] | None = None
) -> Floats:
    """‖a_j − b_k‖² for all pairs of rows, from one matrix product.

    Args:
        a: Rows [n, f].
        b: Rows [m, f].
        products: a·bᵀ [n, m], where it is known (it is overwritten).
        norms: ‖a_j‖², where known.

    Returns:
        [n, m]; 0 for equal rows, and elsewhere with a relative error below 1%, far below that for rows that are not
        within a hundredth of each other.
    """
    first = _norms(a) if norms is None else norms
    second = _norms(b)
    out: Floats = a @ b.T if products is None else products
    out *= -2
    out += first[:, None]
    out += second
    # Rows far apart are the rule, so that one look at the smallest saves comparing them all with their own bound.
    if out.size and float(out.min()) < _NEAR * float(first.max() + second.max()):
        near = np.flatnonzero((out < _NEAR * (first[:, None] + second)).reshape(-1))
        _anew(out, a, b, near)
    return out


def _norms(a: Floats) -> Floats:
    """‖a_j‖² of all rows, as products of a row and a column each, which BLAS does at the pace of memory."""
    norms: Floats = np.matmul(a[:, None], a[:, :, None]).reshape(-1)
    return norms


def _anew(out: Floats, a: Floats, b: Floats, pairs: npt.NDArray[np.int64]) -> None:
    """Squared distances of single pairs by differences; where most pairs are near, of all by a product in float64."""
    if pairs.size > 4 * (a.shape[0] + b.shape[0]):
        middle = b.mean(0, dtype=np.float64)
        x, y = a - middle, b - middle
        exact = np.einsum("ij,ij->i", x, x)[:, None] + np.einsum("ij,ij->i", y, y) - 2 * (x @ y.T)
        out[...] = np.maximum(exact, 0)
        pairs = np.flatnonzero((exact < 1e-12 * np.abs(exact).max()).reshape(-1))
    flat = out.reshape(-1)
    step = max(1, _BLOCK // max(1, a.shape[1]))
    for at in range(0, pairs.size, step):
        some = pairs[at : at + step]
        off = a[some // b.shape[0]] - b[some % b.shape[0]]
        flat[some] = np.einsum("ij,ij->i", off, off)
