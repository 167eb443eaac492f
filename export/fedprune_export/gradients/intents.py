"""Intents: operators of a training graph that say what is to be computed, but not how.

A graph for one board at fixed widths (`pinned`) is written with them, and `formulation` turns each into the
operators that are fastest there. They exist between those two passes only.

| operator | from | to |
|---|---|---|
| `InputGradient` | dy, kernel | dx of a convolution |
| `KernelGradient` | x, dy, kernel | the gradient of its kernel |
| `Normalise` | x, scale, shift, running mean, elements per channel | y, and mean and variance of the batch |
| `NormaliseGradient` | dy, x, the batch's mean | dx, dscale, dshift |
| `Rectified` | dy, y | dy where y > 0, or between the bounds that it has |
| `PoolGradient` | dy, x, y | dx of a maximum over windows that lie side by side |
| `ScaledSum` | a, b, a number | a + b · number |
"""

from __future__ import annotations

from fedprune_export.gradients.windows import Window, operator_attrs
from fedprune_export.graph import Graph

DOMAIN = "fedprune.intent"

INPUT_GRADIENT, KERNEL_GRADIENT = "InputGradient", "KernelGradient"
NORMALISE, NORMALISE_GRADIENT = "Normalise", "NormaliseGradient"
RECTIFIED, POOL_GRADIENT = "Rectified", "PoolGradient"
SCALED_SUM = "ScaledSum"


class Intended:
    """A convolution of whose maps only the forward one is an operator (see `convolutions.Convolution`).

    Args:
        g: The graph that is written to.
        w: The window.
        kernel: The kernel's value.
        groups: 1, or as many as there are channels.
    """

    def __init__(self, g: Graph, w: Window, kernel: str, groups: int) -> None:
        self.g, self.w, self.kernel, self.groups = g, w, kernel, groups

    def apply(self, x: str, bias: list[str]) -> str:
        """The convolution of x."""
        return self.g.emit("Conv", x, self.kernel, *bias, attrs=operator_attrs(self.w, self.groups))

    def back(self, dy: str, bias: list[str]) -> str:
        """What the transposed convolution makes of dy."""
        attrs = {"window": self.w, "group": self.groups}
        return self.g.emit(INPUT_GRADIENT, dy, self.kernel, *bias, attrs=attrs, domain=DOMAIN)

    def kernel_gradient(self, x: str, dy: str) -> str:
        """The gradient of the kernel."""
        attrs = {"window": self.w, "group": self.groups}
        return self.g.emit(KERNEL_GRADIENT, x, dy, self.kernel, attrs=attrs, domain=DOMAIN)
