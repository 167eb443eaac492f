"""A convolution as intents: what is written where `formulation` chooses how its maps are computed."""

from __future__ import annotations

from fedprune_export.autodiff.conv_geometry import Window, operator_attrs
from fedprune_export.autodiff.intents import DOMAIN, INPUT_GRADIENT, KERNEL_GRADIENT
from fedprune_export.ir.graph import Graph


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
