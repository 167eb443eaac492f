"""Gradient rules of group and instance normalisation.

Whatever takes one number per sample and group, or per sample and channel, is written as a batch normalisation of a
single sample that has as many channels: onnxruntime's operator does in one pass over memory what a product and a sum
do in two.
"""

from __future__ import annotations

from fedprune_export.autodiff.intents import DOMAIN, GROUP_NORMALISE, GROUP_NORMALISE_GRADIENT
from fedprune_export.autodiff.rules.reductions import divided, summed
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, rule
from fedprune_export.ir.graph import Graph, Node


@rule("GroupNormalization", "InstanceNormalization")
def group_norm(tape: Tape, node: Node) -> Pull:
    """Normalised over positions and the channels of a group, whether groups or channels in them are cut.

    With z the normalised values, s = 1/√(var + ε), and means over a group of one sample:
    dγ = Σ dy·z, dβ = Σ dy, dx = s · (γ·dy − mean(γ·dy) − z · mean(γ·dy·z)).
    """
    name, gamma, beta = node.inputs
    x, shape = tape.value(name), tape.shape(name)
    g, others = tape.graph, [0, *range(2, len(shape))]
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    number: Dim = shape[1]
    length: Dim = 1
    if node.op == "GroupNormalization":
        number, length = tape.blocks(node, name, 1, int(node.attrs["num_groups"]))
    least = None if tape.intends is None else tape.intends.group_norms
    if least is not None and len(shape) == 4 and isinstance(shape[1], int) and shape[1] >= least:
        return _intended(tape, node, number, epsilon)
    rows = _Rows(tape, shape, number, length)
    # The mean of float32 sums is off by a little where it is large: of values that it has centred it is exact.
    flat = tape.reshape(x, shape, rows.of_groups)
    rough = g.emit("ReduceMean", flat, attrs={"axes": [2], "keepdims": 1})
    centred = g.emit("Sub", flat, rough)
    # Scratch arrays for the operator (`norms.Normal` says why), made of what no other norm has: equal ones are merged.
    own = g.emit("Reshape", rough, g.ints(-1))
    twice = g.emit("Add", own, own)
    scratch = g.emit("Sub", own, own), g.emit("Sub", twice, twice)
    attrs = {"epsilon": epsilon, "momentum": 0.0, "training_mode": 1}
    inputs = (centred, rows.ones(rows.groups), rows.zeros(rows.groups), *scratch)
    z, _, variance = g.emit_many("BatchNormalization", *inputs, outputs=3, attrs=attrs)
    z = tape.reshape(z, rows.of_groups, shape)
    scale, shift = (tape.fitted(node, i, shape[1:2]) for i in (1, 2))
    tape.enter(node.outputs[0], _affine(g, z, scale, shift), shape)

    def pull(dy: str) -> None:
        dot = g.emit("Mul", dy, z)
        each, each_dot = (rows.summed(v) for v in (dy, dot))
        if tape.wants(gamma):
            tape.add(gamma, summed(g, dot, others, keep=False))
        if tape.wants(beta):
            tape.add(beta, summed(g, dy, others, keep=False))
        if not tape.wants(name):
            return
        inverse = g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", variance, g.scalar(epsilon))))
        back = g.emit("Neg", inverse)
        mean, slope = (g.emit("Mul", rows.mean(g.emit("Mul", v, scale)), back) for v in (each, each_dot))
        line = _affine(g, tape.reshape(z, shape, rows.of_groups), slope, mean)
        steepness = rows.per_channel(inverse, scale)
        wide = _affine(g, tape.reshape(dy, shape, rows.of_channels), steepness, rows.zeros(rows.channels))
        line, wide = tape.reshape(line, rows.of_groups, shape), tape.reshape(wide, rows.of_channels, shape)
        tape.add(name, g.emit("Add", wide, line))

    return pull


def _intended(tape: Tape, node: Node, groups: Dim, epsilon: float) -> Pull:
    """Say what is to be computed, for a graph whose sizes are fixed."""
    name, gamma, beta = node.inputs
    g, x, shape = tape.graph, tape.value(name), tape.shape(name)
    scale, shift = (tape.fitted(node, i, shape[1:2]) for i in (1, 2))
    attrs = {"groups": groups, "epsilon": epsilon}
    y, inverse = g.emit_many(GROUP_NORMALISE, x, scale, shift, outputs=2, attrs=attrs, domain=DOMAIN)
    tape.enter(node.outputs[0], y, shape)

    def pull(dy: str) -> None:
        found = g.emit_many(GROUP_NORMALISE_GRADIENT, dy, x, scale, inverse, outputs=3, attrs=attrs, domain=DOMAIN)
        for wanted, gradient in zip((name, gamma, beta), found, strict=True):
            if tape.wants(wanted):
                tape.add(wanted, gradient)

    return pull


class _Rows:
    """Values [N, C, ...] as one sample with N · C channels, or with N · groups.

    Args:
        tape: The tape.
        shape: The values' shape.
        number: How many groups there are.
        length: Channels of a group.
    """

    def __init__(self, tape: Tape, shape: Shape, number: Dim, length: Dim) -> None:
        self._tape, self._graph, self._shape = tape, tape.graph, shape
        self._number, self._length = number, length
        self.groups, self.channels = tape.product([shape[0], number]), tape.product(shape[:2])
        self._whole = tape.product([length, *shape[2:]])
        self.of_groups: Shape = (1, self.groups, self._whole)
        self.of_channels: Shape = (1, self.channels, tape.product(shape[2:]))

    def ones(self, size: Dim) -> str:
        """A vector of ones."""
        return self._graph.emit("Expand", self._graph.scalar(1), self._tape.size(size))

    def zeros(self, size: Dim) -> str:
        """A vector of zeros."""
        return self._graph.emit("Expand", self._graph.scalar(0), self._tape.size(size))

    def summed(self, value: str) -> str:
        """The sums over positions: [N, C]."""
        axes = list(range(2, len(self._shape)))
        return summed(self._graph, value, axes, keep=False) if axes else value

    def mean(self, sums: str) -> str:
        """The means over groups, from sums over positions [N, C]: [N · groups]."""
        parts = self._tape.reshape(sums, self._shape[:2], (self.groups, self._length))
        total = summed(self._graph, parts, [1], keep=False)
        return divided(self._tape, total, [self._whole])

    def per_channel(self, of_groups: str, of_channels: str) -> str:
        """A number per sample and group, [N · groups], times one per channel, [C]: [N · C]."""
        tape, apart = self._tape, (self._shape[0], self._number, 1)
        left = tape.reshape(of_groups, (self.groups,), apart)
        right = tape.reshape(of_channels, self._shape[1:2], (self._number, self._length))
        product = self._graph.emit("Mul", left, right)
        return tape.reshape(product, (self._shape[0], self._number, self._length), (self.channels,))


def _affine(g: Graph, value: str, scale: str, shift: str) -> str:
    """Value · scale + shift, one number per channel each, as the operator computes it at inference."""
    zero = g.emit("Sub", scale, scale)
    one = g.emit("Add", zero, g.scalar(1))
    return g.emit("BatchNormalization", value, scale, shift, zero, one, attrs={"epsilon": 0.0})
