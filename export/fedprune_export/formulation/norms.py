"""Batch normalisation: in blocks with few passes over the values, or as the plain rule writes it.

In blocks one value of each channel is taken off all of them: the one at the middle place of the first sample. It is
near the batch's mean as measured by the batch's deviation, so the mean square less the squared mean is the variance
without a loss of digits. The convolution that makes the values subtracts it in its bias, at no cost, and another
convolution of that one place computes it first. Where there is no such convolution, the subtraction costs a pass. The
per-channel scale of the gradient is deferred (`Layouts.defer`) and usually fused into the next kernel.

Group and instance normalisation have a scale and a shift per sample and channel. With c = x − mean, s = 1/√(var + ε),
z = c · s and means over a group of one sample: y = γ·z + β, dγ = Σ dy·z, dβ = Σ dy,
dx = s · (γ·dy − mean(γ·dy) − z · mean(γ·dy·z)). Sums are taken of centred values, so that a mean far from zero costs no
digits. Large values are only summed and scaled; all else has one number per sample and channel.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedprune_export.autodiff.intents import GROUP_NORMALISE, GROUP_NORMALISE_GRADIENT, NORMALISE, NORMALISE_GRADIENT
from fedprune_export.autodiff.rules.norms import Normal
from fedprune_export.formulation.formulator import Formulator, rule
from fedprune_export.ir.graph import Node


@dataclass(frozen=True)
class _Plain:
    """What the gradient needs of a forward pass in plain layout."""

    normal: Normal
    count: str


@dataclass(frozen=True)
class _InBlocks:
    """What the gradient needs of a forward pass in blocks: the mean is that of the shifted values."""

    shifted: str
    mean: str
    inverse: str
    steepness: str
    count: str


@rule(NORMALISE)
def normalise(to: Formulator, node: Node) -> bool:
    """The forward pass; a sum and a ReLU that follow it are computed with it."""
    x, scale, shift, count = node.inputs
    y, mean, variance = node.outputs
    layouts, g, epsilon = to.layouts, to.graph, float(node.attrs["epsilon"])
    layouts.shapes[y] = layouts.shapes[x]
    if not layouts.in_blocks(x):
        normal = Normal(g, layouts.plain(x), layouts.plain(scale), layouts.plain(shift), epsilon, 4)
        to.state[mean] = _Plain(normal, count)
        for value, name in ((normal.y, y), (normal.mean, mean), (normal.variance, variance)):
            to.name(value, name)
        return True
    channels, height, width = layouts.sizes(x)
    own = all(r is node or (r.op == NORMALISE_GRADIENT and r.inputs[2] == mean) for r in to.readers(x))
    one_place = layouts.one_place(x)
    off = g.emit("Neg", one_place)
    less = own and layouts.absorb(x, shift=off)
    value = layouts.blocked(x)
    if not less:
        one = g.emit("Expand", g.scalar(1), g.ints(channels))
        value = layouts.affine(value, channels, one, off)
    average = g.emit("Div", layouts.total(value, channels, height * width), count)
    square = layouts.dot(value, value, x)
    spread = g.emit("Sub", g.emit("Div", square, count), g.emit("Mul", average, average))
    spread = g.emit("Relu", spread)
    inverse = g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", spread, g.scalar(epsilon))))
    steepness = g.emit("Mul", layouts.plain(scale), inverse)
    base = g.emit("Sub", layouts.plain(shift), g.emit("Mul", average, steepness))
    to.state[mean] = _InBlocks(value, average, inverse, steepness, count)
    to.name(g.emit("Add", average, one_place), mean)
    to.name(spread, variance)
    after = followers(to, y)
    layouts.put(after.out, layouts.affine(value, channels, steepness, base, after.add, after.bounds))
    return True


@dataclass(frozen=True)
class Followers:
    """What is computed in one pass with a value.

    Attributes:
        out: The last value of them.
        add: A value in blocks that is added, or nothing.
        bounds: As `Layouts.affine` has them.
    """

    out: str
    add: str = ""
    bounds: tuple[float, ...] = ()


def followers(to: Formulator, y: str) -> Followers:
    """The sum and the activation that alone read a value: they are left out, and are to be computed with it."""
    layouts, found = to.layouts, Followers(y)
    follower = to.only_reader(y)
    if follower is not None and follower.op == "Add":
        other = next((i for i in follower.inputs if i != y), y)
        if layouts.in_blocks(other) and layouts.shapes.get(other) == layouts.shapes[y]:
            found = Followers(follower.outputs[0], layouts.blocked(other))
            layouts.shapes[found.out] = layouts.shapes[y]
            to.skip(follower)
            follower = to.only_reader(found.out)
    bounds: tuple[float, ...] = ()
    if follower is not None and follower.op in ("Relu", "Clip"):
        given = [to.graph.initializers.get(i) for i in follower.inputs[1:]]
        bounds = (0.0,) if follower.op == "Relu" else tuple(float(b) for b in given if b is not None)
    if follower is not None and len(bounds) == 1 + (follower.op == "Clip"):
        found = Followers(follower.outputs[0], found.add, bounds)
        layouts.shapes[found.out] = layouts.shapes[y]
        to.skip(follower)
    return found


@rule(NORMALISE_GRADIENT)
def normalise_gradient(to: Formulator, node: Node) -> bool:
    """The gradients of values, scale and shift."""
    dy, x, mean = node.inputs
    dx, dscale, dshift = node.outputs
    layouts, g = to.layouts, to.graph
    kept = to.state[mean]
    layouts.shapes[dx] = layouts.shapes[x]
    if isinstance(kept, _Plain):
        slope = layouts.plain(dy)
        of_scale, of_shift = kept.normal.pulled_vectors(slope)
        to.name(kept.normal.pulled(slope, of_scale, of_shift, kept.count), dx)
    elif isinstance(kept, _InBlocks):
        channels, height, width = layouts.sizes(x)
        slope = layouts.blocked(dy)
        of_shift = layouts.total(slope, channels, height * width)
        dot = layouts.dot(slope, kept.shifted, x)
        dot = g.emit("Sub", dot, g.emit("Mul", kept.mean, of_shift))
        of_scale = g.emit("Mul", dot, kept.inverse)
        line = g.emit("Div", g.emit("Mul", of_scale, kept.inverse), kept.count)
        base = g.emit("Sub", g.emit("Mul", kept.mean, line), g.emit("Div", of_shift, kept.count))
        layouts.put(dx, layouts.affine(kept.shifted, channels, g.emit("Neg", line), base, slope))
        layouts.defer(dx, kept.steepness)
    else:
        return False
    to.name(of_scale, dscale)
    to.name(of_shift, dshift)
    return True


@dataclass(frozen=True)
class _Kept:
    """What the gradient needs of a forward pass: groups have [N, groups, 1], channels [N, groups, channels of one]."""

    centred: str
    inverse: str
    steepness: str


class _Groups:
    """Numbers per sample and group, and per sample and channel."""

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
