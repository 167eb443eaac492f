"""Mixup: training on samples that are mixed with others of their batch, as are their labels.

Zhang, Cisse, Dauphin and Lopez-Paz 2018, "mixup: Beyond Empirical Risk Minimization" (arXiv:1710.09412), eq. 1 and 2,
as the authors' code has it: one λ ~ Beta(α, α) for a batch, whose samples meet each other in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune_device.data.batches import Part

Array = npt.NDArray[Any]


def mixed(parts: Sequence[Part], alpha: float, rng: np.random.Generator) -> tuple[list[Part], npt.NDArray[np.float32]]:
    """Mix the samples of a batch, in each of its parts by themselves, and not before the part's samples are asked for.

    Numbers to predict, and labels from 0 to 1, are mixed as samples are. Classes stay, and have partners beside them.

    Args:
        parts: The batch.
        alpha: α.
        rng: Gives λ and the orders.

    Returns:
        The mixed batch; and λ (float32, shape []), the share of each sample itself.
    """
    share = np.float32(rng.beta(alpha, alpha))
    out = []
    for part in parts:
        y, order = part.y, rng.permutation(len(part.y))
        make = partial(_made, part.make, order, share)
        if y.dtype.kind == "i":
            out.append(Part(make, y, y[order]))
        else:
            out.append(Part(make, _mix(y, order, share)))
    return out, np.asarray(share)


def _made(make: Callable[[], Array], order: npt.NDArray[np.int64], share: np.float32) -> Array:
    return _mix(make(), order, share)


def _mix(value: Array, order: npt.NDArray[np.int64], share: np.float32) -> Array:
    """λ·v + (1 − λ)·v in another order, in float32."""
    out = np.asarray(value[order], np.float32)
    out *= np.float32(1) - share
    out += share * value
    return out
