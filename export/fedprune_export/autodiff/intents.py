"""Intents: operators of a training graph that define what is to be computed, but not how.

A graph for one board at fixed widths (`pruning.fixed_width`) is written with them, and `formulation` turns each into
the operators that are fastest there. They exist between those two passes only.

| operator | from | to |
|---|---|---|
| `InputGradient` | dy, kernel | dx of a convolution |
| `KernelGradient` | x, dy, kernel | the gradient of its kernel |
| `Normalise` | x, scale, shift, elements per channel | y, and mean and variance of the batch |
| `NormaliseGradient` | dy, x, the batch's mean | dx, dscale, dshift |
| `GroupNormalise` | x, scale, shift | y, and one over every group's deviation |
| `GroupNormaliseGradient` | dy, x, scale, what that is called | dx, dscale, dshift |
| `Rectified` | dy, y | dy where y > 0, or between the bounds that it has |
| `PoolGradient` | dy, x, y | dx of a maximum over adjacent windows |
| `ScaledSum` | a, b, a number | a + b · number |
"""

from __future__ import annotations

from dataclasses import dataclass

DOMAIN = "fedprune.intent"

INPUT_GRADIENT, KERNEL_GRADIENT = "InputGradient", "KernelGradient"
NORMALISE, NORMALISE_GRADIENT = "Normalise", "NormaliseGradient"
GROUP_NORMALISE, GROUP_NORMALISE_GRADIENT = "GroupNormalise", "GroupNormaliseGradient"
RECTIFIED, POOL_GRADIENT = "Rectified", "PoolGradient"
SCALED_SUM = "ScaledSum"


@dataclass(frozen=True)
class Intentions:
    """Which intents rules may write: all of them, but group norms only where they are worth it.

    Attributes:
        group_norms: Channels from which on a group norm is an intent; None if it never is.
    """

    group_norms: int | None = None
