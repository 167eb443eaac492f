"""Group and instance normalisation in blocks: every sample's channel has a scale and a shift of its own.

With c = x − mean, s = 1/√(var + ε), z = c · s and means over a group of one sample: y = γ·z + β, dγ = Σ dy·z,
dβ = Σ dy, dx = s · (γ·dy − mean(γ·dy) − z · mean(γ·dy·z)). Sums are taken of centred values, so that a mean far from
zero costs no digits. Large values are only summed and scaled; all else has one number per sample and channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprune_export.autodiff.intents import GROUP_NORMALISE, GROUP_NORMALISE_GRADIENT
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.formulation.norms import followers
from fedprune_export.ir.graph import Node


@dataclass(frozen=True)
class _Kept:
    """What the gradient needs of a forward pass: groups have [N, groups, 1], channels [N, groups, channels of one]."""

    centred: str
    inverse: str
    steepness: str


class _Groups:
    """Numbers per sample and group, and per sample and channel.

    Args:
        to: The graph in the making.
        name: The value that is normalised.
        groups: How many groups its channels have.
    """

    def __init__(self, to: Formulator, name: str, groups: int) -> None:
        self.g, self.layouts = to.graph, to.layouts
        self.channels, self.height, self.width = to.layouts.sizes(name)
        self.groups, self.length = groups, self.channels // groups
        self._share = 1 / (self.length * self.height * self.width)

    def apart(self, each: str) -> str:
        """[N, C] filled up as [N, groups, channels of one]."""
        g = self.g
        if self.layouts.filled(self.channels) != self.channels:
            each = g.emit("Slice", each, g.ints(0), g.ints(self.channels), g.ints(1))
        return g.emit("Reshape", each, g.ints(self.layouts.batch, self.groups, self.length))

    def of_channels(self, vector: str) -> str:
        """A vector [C] as [groups, channels of one]."""
        return self.g.emit("Reshape", self.layouts.plain(vector), self.g.ints(self.groups, self.length))

    def mean(self, sums: str) -> str:
        """Means over groups, [N, groups, 1], of sums over places."""
        g = self.g
        if self.length > 1:
            sums = g.emit("ReduceSum", sums, g.ints(2), attrs={"keepdims": 1})
        return g.emit("Mul", sums, g.scalar(self._share))

    def spread(self, value: str) -> str:
        """Numbers that broadcast to [N, groups, channels of one] as [N, C]."""
        g, batch = self.g, self.layouts.batch
        value = g.emit("Expand", value, g.ints(batch, self.groups, self.length))
        return g.emit("Reshape", value, g.ints(batch, self.channels))

    def joined(self, value: str) -> str:
        """[N, groups, channels of one] as [N, C]."""
        return self.g.emit("Reshape", value, self.g.ints(self.layouts.batch, self.channels))

    def over_batch(self, value: str) -> str:
        """The sums over samples of [N, groups, channels of one], [C]."""
        return self.g.emit("ReduceSum", self.joined(value), self.g.ints(0), attrs={"keepdims": 0})


@rule(GROUP_NORMALISE)
def group_normalise(to: Formulator, node: Node) -> bool:
    """The forward pass; a sum and an activation that follow it are computed with it."""
    x, scale, shift = node.inputs
    y, kept = node.outputs
    layouts, g = to.layouts, to.graph
    layouts.shapes[y] = layouts.shapes[x]
    of = _Groups(to, x, int(node.attrs["groups"]))
    value = layouts.blocked(x)
    sums = of.apart(layouts.total_each(value, of.channels, of.height * of.width))
    one = of.spread(g.scalar(1))
    centred = layouts.affine_each(value, x, one, of.spread(g.emit("Neg", of.mean(sums))))
    variance = of.mean(of.apart(layouts.dot_each(centred, centred, x)))
    spread = g.emit("Sqrt", g.emit("Add", variance, g.scalar(float(node.attrs["epsilon"]))))
    inverse = g.emit("Reciprocal", spread)
    steepness = g.emit("Mul", inverse, of.of_channels(scale))
    to.state[kept] = _Kept(centred, inverse, steepness)
    after, base = followers(to, y), of.spread(of.of_channels(shift))
    layouts.put(after.out, layouts.affine_each(centred, x, of.joined(steepness), base, after.add, after.bounds))
    return True


@rule(GROUP_NORMALISE_GRADIENT)
def group_normalise_gradient(to: Formulator, node: Node) -> bool:
    """The gradients of values, scale and shift."""
    dy, x, scale, name = node.inputs
    dx, dscale, dshift = node.outputs
    layouts, g, kept = to.layouts, to.graph, to.state[name]
    if not isinstance(kept, _Kept):
        return False
    layouts.shapes[dx] = layouts.shapes[x]
    of = _Groups(to, x, int(node.attrs["groups"]))
    slope, gamma = layouts.blocked(dy), of.of_channels(scale)
    each = of.apart(layouts.total_each(slope, of.channels, of.height * of.width))
    dot = g.emit("Mul", of.apart(layouts.dot_each(slope, kept.centred, x)), kept.inverse)
    mean, line = (g.emit("Mul", of.mean(g.emit("Mul", v, gamma)), g.emit("Neg", kept.inverse)) for v in (each, dot))
    wide = layouts.affine_each(slope, x, of.joined(kept.steepness))
    line = of.spread(g.emit("Mul", line, kept.inverse))
    layouts.put(dx, layouts.affine_each(kept.centred, x, line, of.spread(mean), wide))
    to.name(of.over_batch(dot), dscale)
    to.name(of.over_batch(each), dshift)
    return True
