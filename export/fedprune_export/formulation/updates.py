"""What moves weights: sums in one pass over memory, where a tensor is large enough for that to count."""

from __future__ import annotations

import math

from fedprune_export.autodiff.intents import SCALED_SUM
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.layouts import BLOCKED
from fedprune_export.ir.graph import Node

_LARGE = 4096
"""Numbers of a tensor from which on it is worth it."""

_ROWS = 64
"""Rows into which a tensor is laid at most: threads share them out."""


@rule(SCALED_SUM)
def scaled_sum(to: Formulator, node: Node) -> bool:
    """A + b · number: a convolution of 1×1 over b, one channel to one, that adds a."""
    layouts, g, out = to.layouts, to.graph, node.outputs[0]
    shape = [d for d in layouts.shapes.get(node.inputs[0], ()) if isinstance(d, int)]
    size, b = math.prod(shape), layouts.block
    first, second, factor = (layouts.plain(n) for n in node.inputs)
    if not to.forms.block or size % b or size < _LARGE:
        g.emit("Add", first, g.emit("Mul", second, factor), out=out)
        return True
    rows = math.gcd(size // b, _ROWS)
    laid = g.ints(1, b, rows, size // b // rows)
    kernel = _kernel(to, factor)
    ones = [1, 1]
    attrs = {"kernel_shape": ones, "strides": ones, "dilations": ones, "pads": [0] * 4, "group": b}
    laid_out = [g.emit("Reshape", v, laid) for v in (first, second)]
    total = g.emit("Conv", laid_out[1], kernel, "", laid_out[0], attrs=attrs, domain=BLOCKED)
    g.emit("Reshape", total, g.ints(*shape), out=out)
    return True


def _kernel(to: Formulator, factor: str) -> str:
    """A number as the kernel of every channel of a block; all sums with this number have the same."""
    name = f"{factor}::kernel"
    if name not in to.state:
        g = to.graph
        number = g.emit("Reshape", factor, g.ints(1, 1, 1, 1))
        to.state[name] = g.emit("Expand", number, g.ints(to.layouts.block, 1, 1, 1))
    return str(to.state[name])
