"""Operators that reduce axes, or find the index of an extreme."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx

from fedprune_export.autodiff.element_counts import divide_by_size
from fedprune_export.autodiff.tape import Pull, Shape, Tape, gradient_rule
from fedprune_export.channels.atoms import fixed_row
from fedprune_export.channels.rule import Channels, channel_rule
from fedprune_export.ir.graph import Array, Node
from fedprune_export.ir.operators import INPUT, gradient_reads
from fedprune_export.pruning.masked_reference import MaskWriter, mask_rule

gradient_reads(INPUT, "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2")

# Reductions to which a channel that is zero adds nothing: cutting it is the same as masking it.
ADDITIVE_REDUCTIONS = ("ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2")

# Numbers that never are the largest or smallest: a lost channel gets them in the masked original.
_NEVER_CHOSEN = {"ReduceMax": -math.inf, "ReduceMin": math.inf}


@channel_rule(
    *ADDITIVE_REDUCTIONS,
    *("ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceLogSumExp", "ArgMax", "ArgMin"),
)
def reduction_channels(channels: Channels, node: Node) -> None:
    """The axes that remain pass. Sums, means and extremes over channels are taken over those that are kept.

    A sum loses only channels that add nothing to it. A mean or an extreme changes with its channels, as the statistics
    of a layer norm do: a smaller network has only its own channels to average or compare (in CBAM's attention over
    places, for example), and Torch-Pruning cuts it to the same one. Other reductions keep the channels that they
    reduce: an index of the largest would number other channels, and products have no such reading.
    """
    x = channels.input_rows(node, 0)
    axes = _reduced_axes(node, len(x), channels.constant_input(node, 1) if channels.has_input(node, 1) else None)
    if node.op not in (*ADDITIVE_REDUCTIONS, *_NEVER_CHOSEN, "ReduceMean"):
        if any(x[a].any() for a in axes):
            channels.notes.append(f"{node.op} {node.name} reduces over channels: they stay.")
        channels.fix([x[a] for a in axes])
    if node.attrs.get("keepdims", 1):
        channels.set_output(node, [fixed_row(1) if a in axes else x[a] for a in range(len(x))])
    else:
        channels.set_output(node, [x[a] for a in range(len(x)) if a not in axes])


def _reduced_axes(node: Node, rank: int, axes_input: Array | None) -> list[int]:
    """The axes that a node reduces, in their order: an attribute or an input, all axes where neither is there."""
    axes = [node.attrs.get("axis", 0)] if node.op in ("ArgMax", "ArgMin") else node.attrs.get("axes", axes_input)
    if axes is None or not np.size(axes):
        return [] if node.attrs.get("noop_with_empty_axes", 0) else list(range(rank))
    return sorted({int(a) % rank for a in np.reshape(axes, -1)})


def _masked_axes(masks: MaskWriter, node: Node) -> list[int]:
    return _reduced_axes(node, masks.rank(node.inputs[0]), masks.graph.initializers.get([*node.inputs, ""][1]))


@mask_rule(*ADDITIVE_REDUCTIONS)
def mask_sum(masks: MaskWriter, node: Node) -> None:
    masks.apply(node, 0, _masked_axes(masks, node))


@mask_rule("ReduceMean")
def mask_mean(masks: MaskWriter, node: Node) -> bool:
    """A mean over what is kept."""
    axes = _masked_axes(masks, node)
    axis_masks = {a: m for a in axes if (m := masks.mask_of(node.inputs[0], a)) is not None}
    if not axis_masks:
        return False
    count = math.prod(float(axis_masks[a].sum()) if a in axis_masks else masks.length(node.inputs[0], a) for a in axes)
    masks.apply(node, 0, axes)
    attrs = {"keepdims": node.attrs.get("keepdims", 1)}
    total = masks.graph.emit("ReduceSum", node.inputs[0], masks.graph.ints(*axes), attrs=attrs)
    masks.graph.emit("Div", total, masks.graph.scalar(count), out=node.outputs[0])
    return True


@mask_rule(*_NEVER_CHOSEN)
def mask_extreme(masks: MaskWriter, node: Node) -> None:
    """The largest or smallest number of what is kept."""
    name = node.inputs[0]
    rank, graph = masks.rank(name), masks.graph
    for axis in _masked_axes(masks, node):
        mask = masks.mask_of(name, axis)
        if mask is not None:
            kept = graph.emit("Cast", masks.broadcast_mask(mask, axis, rank), attrs={"to": onnx.TensorProto.BOOL})
            node.inputs[0] = graph.emit("Where", kept, node.inputs[0], graph.scalar(_NEVER_CHOSEN[node.op]))


# Opset 17 takes axes of these as an input, those of other reductions as an attribute.
_AXES_BY_INPUT = frozenset({"ReduceSum"})


class Reduction:
    """A node that reduces some axes of its first input."""

    def __init__(self, tape: Tape, node: Node, axes: list[int] | None = None) -> None:
        self.tape, self.node, self.g = tape, node, tape.graph
        self.name = node.inputs[0]
        self.x, self.shape = tape.value(self.name), tape.shape(self.name)
        if axes is None:
            axes = _reduced_axes(node, len(self.shape), tape.required_constant(node, 1))
        self.axes = axes
        self.keeps_axes = bool(node.attrs.get("keepdims", 1))
        kept = self.keeps_axes
        self.out: Shape = tuple(1 if i in axes else d for i, d in enumerate(self.shape) if kept or i not in axes)

    def write(self) -> str:
        """Write the reduction with the axes that the node has."""
        y = self.reduce(self.node.op, self.x, keep=self.keeps_axes)
        self.tape.enter(self.node.outputs[0], y, self.out)
        return y

    def write_kept(self) -> str:
        """Write the reduction with its axes kept, as the gradient needs it, and make the output of that."""
        return self.enter_kept(self.reduce(self.node.op, self.x))

    def enter_kept(self, y: str) -> str:
        """Make the output of the result with its axes kept."""
        loses_axes = self.axes and not self.keeps_axes
        out = self.g.emit("Squeeze", y, self.g.ints(*self.axes)) if loses_axes else y
        self.tape.enter(self.node.outputs[0], out, self.out)
        return y

    def reduce(self, op: str, value: str, *, keep: bool = True) -> str:
        """Reduce a value of the input's shape over the same axes."""
        if not self.axes:
            return self.g.emit("Identity", value)
        if op in _AXES_BY_INPUT:
            return self.g.emit(op, value, self.g.ints(*self.axes), attrs={"keepdims": int(keep)})
        return self.g.emit(op, value, attrs={"axes": self.axes, "keepdims": int(keep)})

    def with_reduced_axes(self, dy: str) -> str:
        """The output's gradient with the reduced axes as 1, so that it broadcasts."""
        return dy if self.keeps_axes or not self.axes else self.g.emit("Unsqueeze", dy, self.g.ints(*self.axes))

    def spread(self, value: str) -> str:
        """A value with reduced axes of 1 repeated along them."""
        return self.g.emit("Expand", value, self.tape.shape_of(self.x))

    def share(self, value: str) -> str:
        """A value divided by how many elements are reduced to one."""
        return divide_by_size(self.tape, value, [self.shape[a] for a in self.axes])


Gradient = Callable[[Reduction, str, str], str]  # writes dx, given the reduction, its output y and dy


def _reduction(*operators: str, keeps_axes: bool = False) -> Callable[[Gradient], Gradient]:
    """Register reductions; the gradient's docstring describes the rule.

    `keeps_axes`: whether the gradient gets y with its axes kept.
    """

    def register(gradient: Gradient) -> Gradient:
        def function(tape: Tape, node: Node) -> Pull:
            reduction = Reduction(tape, node)
            y = reduction.write_kept() if keeps_axes else reduction.write()
            return lambda dy: tape.add_gradient(reduction.name, gradient(reduction, y, dy))

        function.__doc__ = gradient.__doc__
        gradient_rule(*operators)(function)
        return gradient

    return register


@_reduction("ReduceSum")
def _total(r: Reduction, y: str, dy: str) -> str:
    """A sum over any axes; every element gets dy."""
    return r.spread(r.with_reduced_axes(dy))


@gradient_rule("ReduceMean", "GlobalAveragePool")
def mean(tape: Tape, node: Node) -> Pull:
    """The mean over any axes, channels as well (counted at run time); the gradient is spread evenly."""
    is_pooling = node.op == "GlobalAveragePool"
    r = Reduction(tape, node, list(range(2, len(tape.shape(node.inputs[0])))) if is_pooling else None)
    tape.enter(node.outputs[0], r.reduce("ReduceMean", r.x, keep=r.keeps_axes), r.out)
    return lambda dy: tape.add_gradient(r.name, r.spread(r.share(r.with_reduced_axes(dy))))


@_reduction("ReduceMax", "ReduceMin", keeps_axes=True)
def _extreme(r: Reduction, y: str, dy: str) -> str:
    """The largest or smallest number along axes; equals share the gradient, as in torch's amax."""
    best = r.g.emit("Equal", r.x, y)
    count = r.reduce("ReduceSum", r.g.emit("Cast", best, attrs={"to": 1}))
    return r.g.emit("Where", best, r.g.emit("Div", r.with_reduced_axes(dy), count), r.g.scalar(0))


@_reduction("ReduceProd")
def _product(r: Reduction, y: str, dy: str) -> str:
    """A product along axes; dx = dy · the product of the others, right with zeros, too."""
    g = r.g
    nothing = g.emit("Equal", r.x, g.scalar(0))
    factors = g.emit("Where", nothing, g.scalar(1), r.x)
    full_product = r.reduce("ReduceProd", factors)
    zeros = r.reduce("ReduceSum", g.emit("Cast", nothing, attrs={"to": 1}))
    # With one zero only that element has a gradient; with two nobody has.
    none, one = (g.emit("Equal", zeros, g.scalar(n)) for n in (0, 1))
    at_zero = g.emit("Where", g.emit("And", nothing, one), full_product, g.scalar(0))
    slope = g.emit("Where", none, g.emit("Div", full_product, factors), at_zero)
    return g.emit("Mul", r.with_reduced_axes(dy), slope)


@_reduction("ReduceL1")
def _absolute_sum(r: Reduction, y: str, dy: str) -> str:
    """The sum of absolute values; dx = dy · sign(x)."""
    return r.g.emit("Mul", r.with_reduced_axes(dy), r.g.emit("Sign", r.x))


@_reduction("ReduceL2", keeps_axes=True)
def _length(r: Reduction, y: str, dy: str) -> str:
    """The Euclidean length; dx = dy · x / y, and 0 where the length is."""
    g = r.g
    nothing = g.emit("Equal", y, g.scalar(0))
    share = g.emit("Div", r.with_reduced_axes(dy), g.emit("Where", nothing, g.scalar(1), y))
    return g.emit("Mul", r.x, share)


@_reduction("ReduceSumSquare")
def _squares(r: Reduction, y: str, dy: str) -> str:
    """The sum of squares; dx = 2 · dy · x."""
    return r.g.emit("Mul", r.g.emit("Mul", r.with_reduced_axes(dy), r.g.scalar(2)), r.x)


@gradient_rule("ReduceLogSumExp")
def log_sum_exp(tape: Tape, node: Node) -> Pull:
    """The logarithm of a sum of exponentials, less the largest first; dx = dy · e^(x − y)."""
    r = Reduction(tape, node)
    g = tape.graph
    # Less the largest number, no exponential is infinite.
    top = r.reduce("ReduceMax", r.x)
    rest = g.emit("Log", r.reduce("ReduceSum", g.emit("Exp", g.emit("Sub", r.x, top))))
    y = r.enter_kept(g.emit("Add", top, rest))
    return lambda dy: tape.add_gradient(
        r.name, g.emit("Mul", r.with_reduced_axes(dy), g.emit("Exp", g.emit("Sub", r.x, y)))
    )


@gradient_rule("ArgMax", "ArgMin")
def place_of_extreme(tape: Tape, node: Node) -> None:
    """The index of the largest or smallest number: no gradient passes."""
    r = Reduction(tape, node)
    tape.enter(node.outputs[0], r.g.emit(node.op, r.x, attrs=node.attrs), r.out)
