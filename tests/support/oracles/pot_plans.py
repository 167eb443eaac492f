"""Plans by POT, which tests hold ours against."""

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[Any]


def pot(cost: Floats) -> Floats:
    """POT's plan, with columns that sum to 1."""
    import ot

    n, m = cost.shape
    plan: Floats = ot.emd(np.full(n, 1 / n), np.full(m, 1 / m), cost.astype(np.float64), numItermax=1_000_000)
    return plan * m
