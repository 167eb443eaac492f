"""Values normalised by the statistics of their batch, and what the gradients of such a normalisation share."""

from __future__ import annotations

from typing import NamedTuple

from fedprune.planning.probe_report import CPU
from fedprune_export.ir.graph import Graph


class BatchNormalised(NamedTuple):
    """Values normalised by their batch. `centred` has the mean −`mean_error`; statistics are over n, not n − 1."""

    y: str
    centred: str
    mean: str
    mean_error: str
    variance: str


def normalise_by_batch(g: Graph, x: str, scale: str, shift: str, axes: list[int], epsilon: float) -> BatchNormalised:
    """Normalise [N, C, ...] by the statistics over `axes`, all but the channels'.

    A mean summed in float32 is slightly wrong, most where much of the input is constant. So it is subtracted first, and
    the statistics of what is left are measured: their mean is the first mean's error, which is added to it.

    onnxruntime's kernel of a batch normalisation that trains runs only on the CPU
    (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/core/providers/cuda/nn/batch_norm.h): on a GPU
    further operators measure the statistics.
    """
    first_mean = g.emit("ReduceMean", x, attrs={"axes": axes, "keepdims": 1})
    centred = g.emit("Sub", x, first_mean)
    means = g.emit("Squeeze", first_mean, g.ints(*axes))
    if g.unit == CPU:
        # onnxruntime overwrites the arrays given as running statistics (unless these outputs leave the graph), so it
        # gets two arrays of zeros of its own. Equal nodes are merged: only norms of the same values, whose statistics
        # are the same, share these arrays.
        zeros = g.emit("Sub", means, means), g.emit("Mul", means, g.scalar(0))
        attrs = {"epsilon": epsilon, "momentum": 0.0, "training_mode": 1}
        outputs = g.emit_many("BatchNormalization", centred, scale, shift, *zeros, outputs=3, attrs=attrs)
        y, mean_error, variance = outputs
    else:
        error = g.emit("ReduceMean", centred, attrs={"axes": axes, "keepdims": 1})
        rest = g.emit("Sub", centred, error)
        variance = g.emit("ReduceMean", g.emit("Mul", rest, rest), attrs={"axes": axes, "keepdims": 0})
        mean_error = g.emit("Squeeze", error, g.ints(*axes))
        y = g.emit("BatchNormalization", centred, scale, shift, mean_error, variance, attrs={"epsilon": epsilon})
    return BatchNormalised(y, centred, g.emit("Add", means, mean_error), mean_error, variance)


def inverse_deviation(g: Graph, variance: str, epsilon: float) -> str:
    return g.emit("Reciprocal", g.emit("Sqrt", g.emit("Add", variance, g.scalar(epsilon))))


def scale_channels(g: Graph, value: str, scale: str, shift: str) -> str:
    """Value · scale + shift, one number per channel each, in one pass over memory (mean 0, variance 1)."""
    zero = g.emit("Sub", scale, scale)
    one = g.emit("Add", zero, g.scalar(1))
    return g.emit("BatchNormalization", value, scale, shift, zero, one, attrs={"epsilon": 0.0})


def column(g: Graph, vector: str, rank: int) -> str:
    """A vector of one number per channel that broadcasts over values [N, C, ...] with `rank` axes."""
    return g.emit("Unsqueeze", vector, g.ints(*range(1, rank - 1))) if rank > 2 else vector
