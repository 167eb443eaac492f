"""Values normalised by the statistics of their batch, and the gradients of such a normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from fedprune.planning.probe_report import CPU
from fedprune_export.ir.graph import Graph


class BatchNormalised:
    """Values [N, C, ...] normalised by the statistics of their batch, and their gradients.

    A mean summed in float32 is slightly wrong, most where much of the input is constant. So it is subtracted first, and
    the statistics of what is left are measured: their mean is the first mean's error, which is added to it.

    Attributes:
        y: The normalised values.
        mean: The batch's mean, [C].
        variance: The batch's variance over n, not n − 1, [C].
    """

    def __init__(self, g: Graph, x: str, scale: str, shift: str, epsilon: float, rank: int) -> None:
        self._graph, self._scale, self._epsilon = g, scale, epsilon
        self._channels = channels = ChannelAxis(g, rank)
        first_mean = g.emit("ReduceMean", x, attrs={"axes": channels.reduced_axes, "keepdims": 1})
        self._centred = g.emit("Sub", x, first_mean)
        # onnxruntime overwrites the arrays given as running statistics (unless these outputs leave the graph), so it
        # gets two arrays of zeros (v − v) of its own. No other node may compute the same: equal nodes are merged.
        vectors = scale, shift
        if any(n.op == "Sub" and n.inputs in ([scale, scale], [shift, shift]) for n in g.nodes):
            mean = g.emit("Squeeze", first_mean, g.ints(*channels.reduced_axes))
            vectors = mean, g.emit("Neg", mean)
        zeros = [g.emit("Sub", vector, vector) for vector in vectors]
        self.y, self._mean_error, self.variance = normalise_by_batch(
            g, (self._centred, scale, shift, *zeros), channels.reduced_axes, epsilon
        )
        self.mean = g.emit("Add", g.emit("Squeeze", first_mean, g.ints(*channels.reduced_axes)), self._mean_error)

    @cached_property
    def _inverse_deviation(self) -> str:
        g = self._graph
        return g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", self.variance, g.scalar(self._epsilon))))

    def scale_and_shift_gradients(self, dy: str) -> tuple[str, str]:
        """The gradients of scale and shift."""
        g, channels = self._graph, self._channels
        dshift = channels.sum_per_channel(dy)
        dot = channels.sum_per_channel(g.emit("Mul", dy, self._centred))
        dot = g.emit("Sub", dot, g.emit("Mul", self._mean_error, dshift))
        return g.emit("Mul", dot, self._inverse_deviation), dshift

    def input_gradient(self, dy: str, dscale: str, dshift: str, count: str) -> str:
        """The gradient of x, given those of scale and shift and the number of elements per channel:

        dx = scale / σ · (dy − dshift / count − (x − mean) / σ · dscale / count), with σ = √(variance + epsilon).
        """
        g = self._graph
        slope = g.emit("Div", g.emit("Mul", dscale, self._inverse_deviation), count)
        base = g.emit("Sub", g.emit("Div", dshift, count), g.emit("Mul", self._mean_error, slope))
        # A normalisation by mean 0 and variance 1 computes centred · slope + base in one pass.
        zero = g.emit("Sub", self._inverse_deviation, self._inverse_deviation)
        one = g.emit("Add", zero, g.scalar(1))
        linear_part = g.emit("BatchNormalization", self._centred, slope, base, zero, one, attrs={"epsilon": 0.0})
        scale = g.emit("Mul", self._scale, self._inverse_deviation)
        return g.emit("Mul", g.emit("Sub", dy, linear_part), self._channels.column(scale))


def normalise_by_batch(
    g: Graph, inputs: Sequence[str], reduced_axes: list[int], epsilon: float
) -> tuple[str, str, str]:
    """Values normalised by their batch, its mean and its variance.

    onnxruntime's kernel of a batch normalisation that trains runs only on the CPU
    (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/providers/cuda/nn/batch_norm.h): on a GPU
    further operators measure the statistics.

    Args:
        inputs: Values, scale, shift, and two arrays of zeros, which the operator overwrites.
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


class ChannelAxis:
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
