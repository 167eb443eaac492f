"""Norms with statistics per channel or per group of channels: batch, instance and group normalisation.

Group and instance normalisation have one number per sample and group, or per sample and channel. Their training forms
are written as a batch normalisation of a single sample with as many channels: onnxruntime's operator does in one pass
over memory what a product and a sum do in two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.planning.probe_report import CPU
from fedprune_export.autodiff.tape import Dim, Pull, Shape, Tape, describe, gradient_rule
from fedprune_export.channels.atoms import AtomRow
from fedprune_export.channels.choices import GROUPS, POSITIONS
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Graph, Node
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.operators.reductions import count_of, divide_by_size, sum_axes
from fedprune_export.pruning.masked_reference import Mask, MaskWriter, mask_rule
from fedprune_export.pruning.rewrites import Sizes, rewrite

gradient_reads(INPUT, "BatchNormalization", "GroupNormalization", "InstanceNormalization")


def tie_vectors(channels: Channels, node: Node, indices: Sequence[int], rows: Sequence[AtomRow]) -> None:
    """Tie a norm's vectors to the axes of its input.

    A constant with equal entries fits any width, because `shorten_vectors` shortens it.
    """
    has_fixed = False
    for i in indices:
        if not channels.has_input(node, i) or channels.is_uniform(node.inputs[i]):
            continue
        vector_rows = channels.input_rows(node, i)
        for row, along in zip(vector_rows[::-1], rows[::-1], strict=False):
            if row.size == along.size:
                has_fixed = has_fixed or (channels.is_constant(node.inputs[i]) and bool(along.any()))
                channels.atoms.tie(row, along)
    if has_fixed:
        channels.notes.append(f"{node.op} {node.name} has a constant for each channel: its channels stay.")


@channel_rule("BatchNormalization")
def batch_norm_channels(channels: Channels, node: Node) -> None:
    """Scale, shift, mean and variance along the channels; each channel keeps its own statistics."""
    x = channels.input_rows(node, 0)
    tie_vectors(channels, node, (1, 2), x[1:2])
    has_fixed = False
    for i in (3, 4):
        has_fixed = has_fixed or (channels.is_constant(node.inputs[i]) and bool(x[1].any()))
        channels.atoms.tie(channels.input_rows(node, i)[0], x[1])
    if has_fixed:
        channels.notes.append(f"{node.op} {node.name} has constant statistics: its channels stay.")
    channels.set_output(node, x)
    for i in range(1, len(node.outputs)):
        channels.set_output(node, [x[1]], i)


@channel_rule("InstanceNormalization")
def instance_norm_channels(channels: Channels, node: Node) -> None:
    """Scale and shift along the channels; each channel is normalised over its own positions."""
    x = channels.input_rows(node, 0)
    tie_vectors(channels, node, (1, 2), x[1:2])
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
            channels.choices.watch(node.outputs[0], option, [row])
    tie_vectors(channels, node, (1, 2), [row])
    channels.set_output(node, [x[0], row, *(np.zeros_like(r) for r in x[2:])])


@rewrite("BatchNormalization", "InstanceNormalization")
def shorten_vectors(graph: Graph, node: Node, sizes: Sizes) -> None:
    """Shorten constants that scale or shift all channels alike to the number of channels left."""
    over_last = node.op in ("LayerNormalization", "RMSNormalization")
    for i in (1, 2):
        constant = graph.initializers.get(node.inputs[i]) if len(node.inputs) > i else None
        if constant is None:
            continue
        first = len(sizes.full_sizes(node.inputs[0])) - constant.ndim if over_last else 1
        shape = [
            after if n == before and after is not None else n
            for n, before, after in zip(
                constant.shape,
                sizes.full_sizes(node.inputs[0])[first:],
                sizes.cut_sizes(node.inputs[0])[first:],
                strict=False,
            )
        ]
        if shape != list(constant.shape):
            node.inputs[i] = graph.constant(np.full(shape, constant.reshape(-1)[0]), constant.dtype)


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


@mask_rule("InstanceNormalization")
def mask_instance_norm(masks: MaskWriter, node: Node) -> bool:
    rank = masks.rank(node.inputs[0])
    axes = range(2, rank)
    return mask_norm(masks, node, axes, {a: m for a in axes if (m := masks.mask_of(node.inputs[0], a)) is not None})


def mask_norm(masks: MaskWriter, node: Node, axes: Sequence[int], axis_masks: dict[int, Mask]) -> bool:
    """Write a norm in primitives that averages over the kept indices of its axes only.

    Returns False, and writes nothing, where no axis has a mask.
    """
    if not axis_masks:
        return False
    graph, rank = masks.graph, masks.rank(node.inputs[0])
    x, mask = node.inputs[0], ""
    for axis, kept_rows in axis_masks.items():
        channel_mask = masks.broadcast_mask(kept_rows, axis, rank)
        mask = graph.emit("Mul", mask, channel_mask) if mask else channel_mask
    count = graph.scalar(math.prod(float(axis_masks[a].sum()) if a in axis_masks else masks.length(x, a) for a in axes))

    def mean(value: str) -> str:
        total = graph.emit("ReduceSum", graph.emit("Mul", value, mask), graph.ints(*axes), attrs={"keepdims": 1})
        return graph.emit("Div", total, count)

    y = x if node.op == "RMSNormalization" else graph.emit("Sub", x, mean(x))
    spread = graph.emit("Add", mean(graph.emit("Mul", y, y)), graph.scalar(float(node.attrs.get("epsilon", 1e-5))))
    y = graph.emit("Div", y, graph.emit("Sqrt", spread))
    vectors = [name for name in node.inputs[1:] if name]
    if node.op == "InstanceNormalization":
        vectors = [_column(graph, name, rank) for name in vectors]
    _write_affine(graph, node, y, vectors)
    return True


def _column(graph: Graph, vector: str, rank: int) -> str:
    """A vector that broadcasts along the second of `rank` axes."""
    return graph.emit("Reshape", vector, graph.ints(1, -1, *[1] * (rank - 2)))


def _write_affine(graph: Graph, node: Node, y: str, vectors: Sequence[str]) -> None:
    """Scale and shift a normalised value; the result has the name of the node's output."""
    for op, vector in zip(("Mul", "Add"), vectors, strict=False):
        y = graph.emit(op, y, vector)
    graph.emit("Identity", y, out=node.outputs[0])


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
    axes = graph.ints(*[2, 3][: 1 + len(tail)])

    def mean(value: str) -> str:
        total = graph.emit("ReduceSum", graph.emit("Mul", value, mask), axes, attrs={"keepdims": 1})
        return graph.emit("Div", total, count)

    y = graph.emit("Sub", rows, mean(rows))
    spread = graph.emit("Add", mean(graph.emit("Mul", y, y)), graph.scalar(float(node.attrs.get("epsilon", 1e-5))))
    y = graph.emit("Reshape", graph.emit("Div", y, graph.emit("Sqrt", spread)), shape)
    _write_affine(graph, node, y, [_column(graph, name, rank) for name in node.inputs[1:] if name])
    return True


@gradient_rule("BatchNormalization")
def batch_norm(tape: Tape, node: Node) -> Pull:
    """Normalise by the batch; the running statistics become outputs, with torch's unbiased variance.

    Where the statistics are frozen, normalise by them, as torch does in evaluation mode.

    A layer that is called several times moves its statistics in each call, from what the call before left. The node's
    momentum is the share of the old statistics that is kept (torch's is the share that is replaced).

    With c = x − mean, s = 1/√(var + ε) and n elements per channel:
    dγ = s · Σ dy·c, dβ = Σ dy, dx = γ · s · (dy − Σdy/n − c · s² · Σ dy·c / n). Sums are taken of centred values, so
    that a mean far from zero costs no digits.
    """
    name, gamma, beta, mean_name, var_name = node.inputs
    if not (tape.is_tensor(mean_name) and tape.is_tensor(var_name)):
        return _fixed_statistics_norm(tape, node)
    if tape.is_frozen(mean_name) != tape.is_frozen(var_name):
        raise ModelError(
            f"{describe(node)}: only one of its statistics is frozen",
            expected=f"both of {mean_name} and {var_name}, or neither",
            hint="Mend the patterns of recipe.frozen and recipe.trainable.",
        )
    if tape.is_frozen(mean_name):
        return _fixed_statistics_norm(tape, node)
    g = tape.graph
    x, shape = tape.value(name), tape.shape(name)
    scale, shift = _norm_vector(tape, node, 1, mean_name), _norm_vector(tape, node, 2, var_name)
    eps = float(node.attrs.get("epsilon", 1e-5))
    keep = float(node.attrs.get("momentum", 0.9))
    count = count_of(tape, [shape[0], *shape[2:]])
    normal = BatchNormalised(g, x, scale, shift, eps, len(shape))
    tape.enter(node.outputs[0], normal.y, shape)
    # Not 0 where a channel has a single element.
    degrees = g.emit("Max", g.emit("Sub", count, g.scalar(1)), g.scalar(1))
    # PyTorch normalises by the variance over n, but its running variance is over n − 1.
    unbiased = g.emit("Mul", normal.variance, g.emit("Div", count, degrees))
    for statistic, value in ((mean_name, normal.mean), (var_name, unbiased)):
        following = step_contract.next_name(statistic)
        before = tape.value(statistic)
        if any(o.name == following for o in g.outputs):  # a layer that is called again, such as a twin's
            before = g.fresh(statistic)
            producer = g.producers()[following]
            producer.name, producer.outputs = before, [before]
        else:
            g.add_output(following, tape.shape(statistic))
        old = g.emit("Mul", before, g.scalar(keep))
        new = g.emit("Mul", value, g.scalar(1 - keep))
        g.emit("Add", old, new, out=following)

    def pull(dy: str) -> None:
        dgamma, dbeta = normal.vector_gradients(dy)
        dx = normal.input_gradient(dy, dgamma, dbeta, count) if tape.needs_gradient(name) else ""
        tape.add_gradient(gamma, dgamma)
        tape.add_gradient(beta, dbeta)
        if tape.needs_gradient(name):
            tape.add_gradient(name, dx)

    return pull


class BatchNormalised:
    """Values [N, C, ...] normalised by the statistics of their batch, and their gradients.

    A mean that is computed by float32 sums has a small error, which is largest where much of the input is constant.
    Values that are centred by it give exact statistics, and the error of the first mean.

    Attributes:
        y: The normalised values.
        mean: The batch's mean, [C].
        variance: The batch's variance over n, not n − 1, [C].
    """

    def __init__(self, g: Graph, x: str, scale: str, shift: str, epsilon: float, rank: int) -> None:
        self._graph, self._scale, self._epsilon = g, scale, epsilon
        self._channels = channels = _Channels(g, rank)
        rough = g.emit("ReduceMean", x, attrs={"axes": channels.reduced_axes, "keepdims": 1})
        self._centred = g.emit("Sub", x, rough)
        # onnxruntime writes the batch's statistics into the arrays that come in as running ones unless those outputs
        # leave the graph, so it gets scratch arrays. Nothing else may compute the same: equal nodes are merged.
        sources = scale, shift
        if any(n.op == "Sub" and n.inputs in ([scale, scale], [shift, shift]) for n in g.nodes):
            mean = g.emit("Squeeze", rough, g.ints(*channels.reduced_axes))
            sources = mean, g.emit("Neg", mean)
        scratch = [g.emit("Sub", source, source) for source in sources]
        self.y, self._mean_error, self.variance = _normalise_by_batch(
            g, (self._centred, scale, shift, *scratch), channels.reduced_axes, epsilon
        )
        self.mean = g.emit("Add", g.emit("Squeeze", rough, g.ints(*channels.reduced_axes)), self._mean_error)

    @cached_property
    def _spread(self) -> str:
        return self._graph.emit("Add", self.variance, self._graph.scalar(self._epsilon))

    @cached_property
    def _inverse(self) -> str:
        return self._graph.emit("Reciprocal", self._graph.emit("Sqrt", self._spread))

    def vector_gradients(self, dy: str) -> tuple[str, str]:
        """The gradients of scale and shift."""
        g, channels = self._graph, self._channels
        total = channels.sum_per_channel(dy)
        dot = g.emit(
            "Sub", channels.sum_per_channel(g.emit("Mul", dy, self._centred)), g.emit("Mul", self._mean_error, total)
        )
        return g.emit("Mul", dot, self._inverse), total

    def input_gradient(self, dy: str, dscale: str, dshift: str, count: str) -> str:
        """The gradient of x, given those of scale and shift and the number of elements per channel."""
        g = self._graph
        slope = g.emit("Div", g.emit("Mul", dscale, self._inverse), count)
        base = g.emit("Sub", g.emit("Div", dshift, count), g.emit("Mul", self._mean_error, slope))
        # centred · slope + base, which the operator computes at inference in one pass.
        zero = g.emit("Sub", self._inverse, self._inverse)
        one = g.emit("Add", zero, g.scalar(1))
        fit = g.emit("BatchNormalization", self._centred, slope, base, zero, one, attrs={"epsilon": 0.0})
        steepness = g.emit("Mul", self._scale, self._inverse)
        return g.emit("Mul", g.emit("Sub", dy, fit), self._channels.column(steepness))


def _normalise_by_batch(
    g: Graph, inputs: Sequence[str], reduced_axes: list[int], epsilon: float
) -> tuple[str, str, str]:
    """Values normalised by their batch, its mean and its variance.

    onnxruntime's kernel of a batch normalisation that trains is for the processor alone
    (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/providers/cuda/nn/batch_norm.h): a GPU measures
    the statistics by operators of their own.

    Args:
        inputs: Values, scale, shift, and two scratch arrays for the operator.
        reduced_axes: All axes but the channels'.
    """
    if g.unit == CPU:
        attrs = {"epsilon": epsilon, "momentum": 0.0, "training_mode": 1}
        y, mean, variance = g.emit_many("BatchNormalization", *inputs, outputs=3, attrs=attrs)
        return y, mean, variance
    value, scale, shift, *_ = inputs
    mean = g.emit("ReduceMean", value, attrs={"axes": reduced_axes, "keepdims": 1})
    rest = g.emit("Sub", value, mean)
    variance = g.emit("ReduceMean", g.emit("Mul", rest, rest), attrs={"axes": reduced_axes, "keepdims": 0})
    mean = g.emit("Squeeze", mean, g.ints(*reduced_axes))
    y = g.emit("BatchNormalization", value, scale, shift, mean, variance, attrs={"epsilon": epsilon})
    return y, mean, variance


class _Channels:
    """A per-channel operation on values whose second axis has the channels."""

    def __init__(self, graph: Graph, rank: int) -> None:
        self._graph = graph
        self.reduced_axes = [0, *range(2, rank)]

    def column(self, vector: str) -> str:
        """A vector of one number per channel that broadcasts over the values."""
        inner = len(self.reduced_axes) - 1
        return self._graph.emit("Unsqueeze", vector, self._graph.ints(*range(1, 1 + inner))) if inner else vector

    def sum_per_channel(self, value: str) -> str:
        """The sums over all axes but the channels'."""
        return self._graph.emit("ReduceSum", value, self._graph.ints(*self.reduced_axes), attrs={"keepdims": 0})


def _fixed_statistics_norm(tape: Tape, node: Node) -> Pull:
    """Normalise by frozen statistics, as at inference, or by statistics that the graph computes, mostly of weights.

    With c = (x − mean) · s and s = 1/√(var + ε): dγ = Σ dy·c, dβ = Σ dy, dx = γ · s · dy; and of computed statistics
    dmean = −γ · s · Σ dy, dvar = −γ · s² · Σ dy·c / 2.
    """
    name, gamma, beta, mean_name, var_name = node.inputs
    g, shape = tape.graph, tape.shape(node.inputs[0])
    channels = _Channels(g, len(shape))
    scale, shift = _norm_vector(tape, node, 1, mean_name), _norm_vector(tape, node, 2, var_name)
    mean, var = tape.value(mean_name), tape.value(var_name)
    attrs = {"epsilon": float(node.attrs.get("epsilon", 1e-5))}
    x = tape.value(name)
    tape.enter(node.outputs[0], g.emit("BatchNormalization", x, scale, shift, mean, var, attrs=attrs), shape)
    inverse = g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", var, g.scalar(attrs["epsilon"]))))

    def pull(dy: str) -> None:
        steepness = g.emit("Mul", scale, inverse)
        if tape.needs_gradient(gamma) or tape.needs_gradient(var_name):
            centred = g.emit("Sub", x, channels.column(mean))
            dot = g.emit("Mul", channels.sum_per_channel(g.emit("Mul", dy, centred)), inverse)
            tape.add_gradient(gamma, dot)
            if tape.needs_gradient(var_name):
                # d s / d var = −s³ / 2.
                half = g.emit("Mul", g.emit("Mul", steepness, inverse), g.scalar(-0.5))
                tape.add_gradient(var_name, g.emit("Mul", half, dot))
        if tape.needs_gradient(beta) or tape.needs_gradient(mean_name):
            total = channels.sum_per_channel(dy)
            tape.add_gradient(beta, total)
            if tape.needs_gradient(mean_name):
                tape.add_gradient(mean_name, g.emit("Neg", g.emit("Mul", steepness, total)))
        if tape.needs_gradient(name):
            tape.add_gradient(name, g.emit("Mul", dy, channels.column(steepness)))

    return pull


def _norm_vector(tape: Tape, node: Node, index: int, statistic: str) -> str:
    """The scale or shift of a norm. A constant with equal entries is built at the length of the statistic.

    The channels of such a constant may be cut, so its stored length doesn't hold at every width.
    """
    name = node.inputs[index]
    if tape.is_tensor(name) or tape.producer(name) is not None:
        return tape.value(name)
    g, constant, like = tape.graph, np.asarray(tape.required_constant(node, index), np.float32), tape.value(statistic)
    # `like − like` gives zeros of the cut width.
    same = np.all(constant == constant[0])
    return g.emit("Add", g.emit("Sub", like, like), g.constant(constant[0] if same else constant, np.float32))


@gradient_rule("GroupNormalization", "InstanceNormalization")
def group_norm(tape: Tape, node: Node) -> Pull:
    """Normalise over positions and the channels of a group, whether whole groups or channels within them are cut.

    With z the normalised values, s = 1/√(var + ε), and means over a group of one sample:
    dγ = Σ dy·z, dβ = Σ dy, dx = s · (γ·dy − mean(γ·dy) − z · mean(γ·dy·z)).
    """
    name, gamma, beta = node.inputs
    x, shape = tape.value(name), tape.shape(name)
    g, reduced_axes = tape.graph, [0, *range(2, len(shape))]
    epsilon = float(node.attrs.get("epsilon", 1e-5))
    number: Dim = shape[1]
    length: Dim = 1
    if node.op == "GroupNormalization":
        number, length = tape.block_layout(node, name, 1, int(node.attrs["num_groups"]))
    rows = _Rows(tape, shape, number, length)
    # The mean of float32 sums is off by a little where it is large: of values that it has centred it is exact.
    flat = tape.reshape(x, shape, rows.group_shape)
    rough = g.emit("ReduceMean", flat, attrs={"axes": [2], "keepdims": 1})
    centred = g.emit("Sub", flat, rough)
    # Scratch arrays for the operator, as for batch norms. They are made of
    # values that no other norm has, because onnxruntime merges equal nodes.
    group_means = g.emit("Reshape", rough, g.ints(-1))
    twice = g.emit("Add", group_means, group_means)
    scratch = g.emit("Sub", group_means, group_means), g.emit("Sub", twice, twice)
    inputs = (centred, rows.ones(rows.groups), rows.zeros(rows.groups), *scratch)
    z, _, variance = _normalise_by_batch(g, inputs, [0, 2], epsilon)
    z = tape.reshape(z, rows.group_shape, shape)
    scale, shift = (tape.fit_to_width(node, i, shape[1:2]) for i in (1, 2))
    tape.enter(node.outputs[0], _affine(g, z, scale, shift), shape)

    def pull(dy: str) -> None:
        dot = g.emit("Mul", dy, z)
        each, each_dot = (rows.sum_positions(v) for v in (dy, dot))
        if tape.needs_gradient(gamma):
            tape.add_gradient(gamma, sum_axes(g, dot, reduced_axes, keep=False))
        if tape.needs_gradient(beta):
            tape.add_gradient(beta, sum_axes(g, dy, reduced_axes, keep=False))
        if not tape.needs_gradient(name):
            return
        inverse = g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", variance, g.scalar(epsilon))))
        back = g.emit("Neg", inverse)
        mean, slope = (g.emit("Mul", rows.mean(g.emit("Mul", v, scale)), back) for v in (each, each_dot))
        line = _affine(g, tape.reshape(z, shape, rows.group_shape), slope, mean)
        steepness = rows.per_channel(inverse, scale)
        wide = _affine(g, tape.reshape(dy, shape, rows.channel_shape), steepness, rows.zeros(rows.channels))
        line, wide = tape.reshape(line, rows.group_shape, shape), tape.reshape(wide, rows.channel_shape, shape)
        tape.add_gradient(name, g.emit("Add", wide, line))

    return pull


class _Rows:
    """Values [N, C, ...] as one sample with N · C channels, or with N · groups."""

    def __init__(self, tape: Tape, shape: Shape, number: Dim, length: Dim) -> None:
        self._tape, self._graph, self._shape = tape, tape.graph, shape
        self._number, self._length = number, length
        self.groups, self.channels = tape.product([shape[0], number]), tape.product(shape[:2])
        self._group_size = tape.product([length, *shape[2:]])
        self.group_shape: Shape = (1, self.groups, self._group_size)
        self.channel_shape: Shape = (1, self.channels, tape.product(shape[2:]))

    def ones(self, size: Dim) -> str:
        return self._graph.emit("Expand", self._graph.scalar(1), self._tape.size(size))

    def zeros(self, size: Dim) -> str:
        return self._graph.emit("Expand", self._graph.scalar(0), self._tape.size(size))

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
