"""What an update learnt from another model than the one that it is folded onto."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.aggregation.magnitude import check_range
from fedprune.model.architecture import Architecture
from fedprune.model.selection import Selection, mesh


def rebased(
    architecture: Architecture,
    selection: Selection,
    trained: Mapping[str, npt.NDArray[np.float32]],
    sent: Mapping[str, npt.NDArray[np.float32]],
    base: Mapping[str, npt.NDArray[np.float32]],
    bounds: Mapping[str, float],
    left_out: Collection[str] = (),
) -> dict[str, npt.NDArray[Any]]:
    """w_t + (w_k − w_sent) for the tensors that are trained; statistics are measured, not moved, and stay w_k.

    Where a device was sent what the base holds now, that is w_k itself, bit for bit.

    Args:
        architecture: The model.
        selection: Where the submodel's channels live.
        trained: w_k, checked.
        sent: w_sent, checked.
        base: w_t, the whole model.
        bounds: By tensor the largest magnitude that a sum accepts.
        left_out: Tensors that don't enter the sums.

    Returns:
        Tensors of the submodel's shapes, float64 where they were moved.

    Raises:
        ProtocolError: A sum is out of bounds; the message names the tensor.
    """
    out: dict[str, npt.NDArray[Any]] = dict(trained)
    for spec in architecture.trainable:
        name = spec.name
        if name in left_out:
            continue
        now = base[name][mesh(selection.maps(name))]
        if np.array_equal(now, sent[name]):
            continue
        moved = trained[name].astype(np.float64)
        moved -= sent[name]
        moved += now
        check_range(f"{name}, moved as an earlier model was", moved, bounds[name])
        out[name] = moved
    return out
