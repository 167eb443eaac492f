"""Finds the rows of the last layer that a device has trained: with HeteroFL's label rows, only they count."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedprune.model.selection import Tensors
from fedprune.model.trainable import head_axes
from fedprune.strategies.values import Submodel

# A row whose change is this small a share of it across its own direction has only decayed.
_PARALLEL_TOLERANCE = 1e-5


def changed_rows(submodel: Submodel, before: Tensors, *, decays: bool) -> dict[str, npt.NDArray[np.bool_]]:
    """Masks of the last layer's tensors: the rows that were trained. Raises `ConfigError` if the model has no last
    layer.

    Args:
        submodel: What was trained.
        before: What it began with.
        decays: Weight decay also shrinks rows that have no gradient, all of a row alike: a row that only became shorter
            was not trained. The bias goes with its weight's row.
    """
    axes = head_axes(submodel.selection.architecture)
    weight = next(iter(axes))
    values = (np.moveaxis(tensors[weight], axes[weight], 0) for tensors in (submodel.tensors, before))
    trained_rows, sent_rows = (v.reshape(len(v), -1) for v in values)
    is_changed = (trained_rows != sent_rows).any(axis=1)
    if decays:
        # Only weights decay, so the bias says nothing here: its row is judged by the weight's.
        is_changed &= ~_only_decayed(trained_rows, sent_rows)
    else:
        for name in list(axes)[1:]:
            is_changed |= submodel.tensors[name] != before[name]
    masks = {}
    for name, axis in axes.items():
        shape = submodel.tensors[name].shape
        broadcast_rows = is_changed.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        masks[name] = np.array(np.broadcast_to(broadcast_rows, shape))
    return masks


def _only_decayed(trained_rows: npt.NDArray[np.float32], sent_rows: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether each row is c times what it was, with 0 < c ≤ 1."""
    trained64, sent64 = trained_rows.astype(np.float64), sent_rows.astype(np.float64)
    # Above 0, so that a row of zeros doesn't divide by 0.
    squared_norms = np.maximum((sent64 * sent64).sum(axis=1), 1e-300)
    # Least squares: the c for which c times the old row is nearest to the new one.
    factor = (trained64 * sent64).sum(axis=1) / squared_norms
    residual = np.sqrt(((trained64 - factor[:, None] * sent64) ** 2).sum(axis=1))
    only_shrunk: npt.NDArray[np.bool_] = (
        (residual <= _PARALLEL_TOLERANCE * np.sqrt(squared_norms)) & (factor > 0) & (factor <= 1)
    )
    return only_shrunk
