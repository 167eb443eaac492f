"""GroupNormalization and InstanceNormalization: statistics per sample, and per group of channels or per channel.

In training graphs each is a BatchNormalization of one sample, with a channel for every group of every sample:
onnxruntime's operator scales and shifts in one pass over memory, where a Mul and an Add need two.
"""

from __future__ import annotations

import math

import numpy as np

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.batch_statistics import column, inverse_deviation, normalise_by_batch, scale_channels
from fedprune_export.autodiff.element_counts import divide_by_size, sum_axes
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, gradient_rule
from fedprune_export.channels.choices import GROUPS, POSITIONS
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.operators.norm_vectors import normalise_kept, shorten_vectors, tie_vectors, write_affine
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule
from fedprune_export.pruning.rewrites import Sizes, rewrite

gradient_reads(INPUT, "GroupNormalization", "InstanceNormalization")


@channel_rule("InstanceNormalization")
def instance_norm_channels(channels: Channels, node: Node) -> None:
    """Scale and shift along the channels; each channel is normalised over its own positions."""
    x = channels.input_rows(node, 0)
    tie_vectors(channels, node, x[1:2])
    channels.set_output(node, x)


@channel_rule("GroupNormalization")
def group_norm_channels(channels: Channels, node: Node) -> None:
    """Whole norm groups are cut, or the same positions of every group. Spatial axes stay."""
    x = channels.input_rows(node, 0)
    if any(r.any() for r in x[2:]):
        channels.notes.append(f"{node.op} {node.name} has channels on spatial axes: they stay.")
    channels.fix(x[2:])
    row = x[1]
    groups = int(node.attrs["num_groups"])
    blocks = row.reshape(groups, -1)
    options = ([GROUPS] if groups > 1 else []) + ([POSITIONS] if blocks.shape[1] > 1 else [])
    if row.any():
        # Whole groups and positions within groups exclude each other: statistics need groups of equal size.
        option = channels.choices.next_option(node.outputs[0], options) if len(options) > 1 else options[0]
        if option == GROUPS:
            channels.atoms.tie(blocks, blocks[:, :1])
            row = np.repeat(blocks[:, 0], blocks.shape[1])
        elif option == POSITIONS:
            channels.atoms.tie(blocks, blocks[:1])
            row = np.tile(blocks[0], groups)
        else:
            channels.atoms.fix(row)
            row = np.zeros_like(row)
        if len(options) > 1 and option is not None:
            channels.choices.expect_choice(node.outputs[0], option, [row])
    tie_vectors(channels, node, [row])
    channels.set_output(node, [x[0], row, *(np.zeros_like(r) for r in x[2:])])


@rewrite("GroupNormalization")
def group_norm_rewrite(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Set the number of norm groups to those of which channels are left, equally many of each."""
    shorten_vectors(graph, node, sizes)
    if sizes.is_shorter(node.inputs[0], 1):
        channels = sizes.full_sizes(node.inputs[0])[1] or 0
        kept_groups = sizes.kept_indices(node.inputs[0], 1) * int(node.attrs["num_groups"]) // channels
        groups_left, counts = np.unique(kept_groups, return_counts=True)
        # The analysis cuts whole groups or the same positions of each, so this is a cut that it has not made.
        if np.any(counts != counts[0]):
            raise ModelError(f"{node.op} {node.name}: norm groups of unequal size are left", got=counts.tolist())
        node.attrs["num_groups"] = int(groups_left.size)


@mask_rule("GroupNormalization")
def mask_group_norm(masks: MaskWriter, node: Node) -> bool:
    """Statistics of every norm group over its kept channels. Those of a group without any are not read."""
    graph, x = masks.graph, node.inputs[0]
    kept_counts = masks.mask_of(x, 1)
    if kept_counts is None:
        return False
    groups, rank = int(node.attrs["num_groups"]), masks.rank(x)
    shape = graph.emit("Shape", x)
    inside = kept_counts.reshape(groups, -1)
    rows = graph.emit("Reshape", x, graph.ints(0, groups, inside.shape[1], *([-1] if rank > 2 else [])))
    tail = [1] * (rank > 2)
    mask = graph.constant(inside.reshape(1, *inside.shape, *tail), np.float32)
    positions = math.prod(masks.length(x, a) for a in range(2, rank))
    # A group without channels has a count of 0, and 0 / 0 is NaN also under a mask.
    count = graph.constant(np.maximum(inside.sum(1), 1).reshape(1, -1, 1, *tail) * positions, np.float32)
    axes = [2, 3][: 1 + len(tail)]
    y = graph.emit("Reshape", normalise_kept(graph, node, rows, mask, count, axes), shape)
    write_affine(graph, node, y, [column(graph, name, rank) for name in node.inputs[1:] if name])
    return True


@gradient_rule("GroupNormalization", "InstanceNormalization")
def group_norm(tape: Tape, node: Node) -> Pull:
    """Normalise over positions and the channels of a group, whether whole groups or channels within them are cut.

    With z the normalised values, s = 1/√(var + ε), and means over a group of one sample:
    dγ = Σ dy·z, dβ = Σ dy, dx = s · (γ·dy − mean(γ·dy) − z · mean(γ·dy·z)).
    """
    number: Dim = tape.shape(node.inputs[0])[1]
    length: Dim = 1
    if node.op == "GroupNormalization":
        number, length = tape.block_layout(node, node.inputs[0], 1, int(node.attrs["num_groups"]))
    return _normalise_groups(tape, node, number, length)[0]


def instance_norm(tape: Tape, node: Node) -> tuple[Pull, str, str]:
    """Normalise each channel of each sample over its positions. Returns the pull, and the means over the batch of the
    channels' means and variances (over n, not n − 1), [C]."""
    shape = tape.shape(node.inputs[0])
    pull, *statistics = _normalise_groups(tape, node, shape[1], 1)
    by_sample = (tape.reshape(value, (tape.product(shape[:2]),), shape[:2]) for value in statistics)
    mean, variance = (tape.graph.emit("ReduceMean", v, attrs={"axes": [0], "keepdims": 0}) for v in by_sample)
    return pull, mean, variance


def _normalise_groups(tape: Tape, node: Node, number: Dim, length: Dim) -> tuple[Pull, str, str]:
    """Normalise `number` groups of `length` channels. Returns the pull, and means and variances, [N · number]."""
    name, gamma, beta = node.inputs[:3]
    x, shape = tape.value(name), tape.shape(name)
    g = tape.graph
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    rows = _Rows(tape, shape, number, length)
    flat = tape.reshape(x, shape, rows.group_shape)
    z, _, mean, _, variance = normalise_by_batch(g, flat, rows.fill(1), rows.fill(0), [0, 2], epsilon)
    z = tape.reshape(z, rows.group_shape, shape)
    scale, shift = (tape.fit_to_width(node, i, shape[1:2]) for i in (1, 2))
    tape.enter(node.outputs[0], scale_channels(g, z, scale, shift), shape)

    def pull(dy: str) -> None:
        dot = g.emit("Mul", dy, z)
        each, each_dot = (rows.sum_positions(v) for v in (dy, dot))
        if tape.needs_gradient(gamma):
            tape.add_gradient(gamma, tape.sum_to_shape(each_dot, shape[:2], shape[1:2]))
        if tape.needs_gradient(beta):
            tape.add_gradient(beta, tape.sum_to_shape(each, shape[:2], shape[1:2]))
        if not tape.needs_gradient(name):
            return
        # dx = dy_term + group_terms: s·γ·dy, and −s · (mean(γ·dy) + z · mean(γ·dy·z)).
        inverse = inverse_deviation(g, variance, epsilon)
        minus_inverse = g.emit("Neg", inverse)
        mean_term, z_factor = (
            g.emit("Mul", rows.mean(g.emit("Mul", v, scale)), minus_inverse) for v in (each, each_dot)
        )
        group_terms = scale_channels(g, tape.reshape(z, shape, rows.group_shape), z_factor, mean_term)
        group_terms = tape.reshape(group_terms, rows.group_shape, shape)
        dy_term = g.emit("Mul", dy, rows.per_channel(inverse, scale))
        tape.add_gradient(name, g.emit("Add", dy_term, group_terms))

    return pull, mean, variance


class _Rows:
    """Values [N, C, ...] as one sample with N · groups channels."""

    def __init__(self, tape: Tape, shape: Shape, number: Dim, length: Dim) -> None:
        self._tape, self._graph, self._shape = tape, tape.graph, shape
        self._number, self._length = number, length
        self.groups = tape.product([shape[0], number])
        self._group_size = tape.product([length, *shape[2:]])
        self.group_shape: Shape = (1, self.groups, self._group_size)

    def fill(self, number: float) -> str:
        """The same number for every group: [N · groups]."""
        return self._graph.emit("Expand", self._graph.scalar(number), self._tape.size(self.groups))

    def sum_positions(self, value: str) -> str:
        """The sums over positions: [N, C]."""
        axes = list(range(2, len(self._shape)))
        return sum_axes(self._graph, value, axes, keep=False) if axes else value

    def mean(self, sums: str) -> str:
        """The means over groups, from sums over positions [N, C]: [N · groups]."""
        by_group = self._tape.reshape(sums, self._shape[:2], (self.groups, self._length))
        total = sum_axes(self._graph, by_group, [1], keep=False)
        return divide_by_size(self._tape, total, [self._group_size])

    def per_channel(self, of_groups: str, of_channels: str) -> str:
        """A number per sample and group, [N · groups], times one per channel, [C]: [N, C, 1, ...]."""
        tape, apart = self._tape, (self._shape[0], self._number, 1)
        left = tape.reshape(of_groups, (self.groups,), apart)
        right = tape.reshape(of_channels, self._shape[1:2], (self._number, self._length))
        product = self._graph.emit("Mul", left, right)
        target = (*self._shape[:2], *[1] * len(self._shape[2:]))
        return tape.reshape(product, (self._shape[0], self._number, self._length), target)
