"""Metrics as ONNX graphs: from outputs and labels to sums that add up over batches, and from the sums to the metric."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedprune.core.errors import ConfigError, shape_text
from fedprune.core.metrics import METRICS
from fedprune.model.features import CUSTOM_LOSS, Features
from fedprune.model.loss import Y
from fedprune.model.step_contract import LOGITS, SUMS, VALUE
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model

# Histogram bins of the scores, for the average precision. Sums over batches need a fixed size; ranks of all scores
# would need all of them at once.
BINS = 200


def metric_graph(model: Model, labels: Port, features: Features) -> Graph:
    """The measurement of a model's outputs against a training graph's labels (`step_contract.METRIC_METADATA`).

    Raises `ConfigError` if the model brings no metric, or the metric compares with labels of another kind.
    """
    if features.metric == CUSTOM_LOSS:
        if model.metric is None:
            raise ConfigError(
                "'custom', and the model brings no metric",
                path=("recipe", "metric"),
                hint="Give it with the model: --metric package.module:function, [model] metric, or load(..., metric=).",
            )
        label_input = model.metric.inputs[1]
        if (label_input.dtype, tuple(label_input.shape[1:])) != (labels.dtype, tuple(labels.shape[1:])):
            raise ConfigError(
                "is the model's own, with another loss",
                path=("recipe", "metric"),
                expected=f"a metric of the loss's labels, {labels.dtype} {shape_text('n', *labels.shape[1:])}",
                got=f"one of {label_input.dtype} {shape_text('n', *label_input.shape[1:])}",
                hint="Set the metric's attributes target_shape and target_dtype, as the loss has them.",
            )
        return model.metric
    outputs = model.architecture.output_shape
    g = Graph(name="metric")
    g.inputs = [Port(LOGITS, np.dtype(np.float32), ("N", *outputs)), Port(Y, labels.dtype, ("N", *labels.shape[1:]))]
    takes_classes = "classes" in METRICS[features.metric].labels
    label_shape = outputs[1:] if takes_classes else outputs
    if (labels.dtype.kind == "i") != takes_classes or tuple(labels.shape[1:]) != label_shape:
        raise ConfigError(
            f"{features.metric!r} with this loss",
            path=("recipe", "metric"),
            expected=f"{'classes' if takes_classes else 'numbers'} {shape_text('n', *label_shape)} as labels",
            got=f"{labels.dtype} {shape_text('n', *labels.shape[1:])}",
        )
    _METRICS[features.metric](g, outputs, features)
    g.outputs = [Port(SUMS, np.dtype(np.float32), ("K",)), Port(VALUE, np.dtype(np.float32), ())]
    return g


def _class_numbers(g: Graph, outputs: tuple[int, ...], factor: int = 1) -> str:
    """The numbers of the classes, times a factor [1, K, 1, ...]."""
    return g.constant(factor * np.arange(outputs[0]).reshape(1, -1, *[1] * (len(outputs) - 1)), np.int64)


def _class_labels(g: Graph, outputs: tuple[int, ...], features: Features) -> tuple[str, str]:
    """Whether each label is a class [N, K, ...], and whether it counts [N, 1, ...]; one that doesn't is no class."""
    label = g.emit("Unsqueeze", Y, g.ints(1))
    counted = g.emit("Equal", label, label)  # true everywhere: without `ignore_label` every label counts
    if features.ignore_label is not None:
        counted = g.emit("Not", g.emit("Equal", label, g.constant(features.ignore_label, np.int64)))
    return g.emit("And", g.emit("Equal", label, _class_numbers(g, outputs)), counted), counted


def _as_floats(g: Graph, value: str) -> str:
    return g.emit("Cast", value, attrs={"to": 1})


def _mean_iou(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """Per class, the number of positions in the intersection, in the labels and in the predictions; classes in neither
    are left out of the mean.
    """
    is_label, counted = _class_labels(g, outputs, features)
    prediction = g.emit("ArgMax", LOGITS, attrs={"axis": 1, "keepdims": 1})
    is_prediction = g.emit("And", g.emit("Equal", prediction, _class_numbers(g, outputs)), counted)
    axes = g.ints(0, *range(2, len(outputs) + 1))
    truths = g.emit("And", is_label, is_prediction), is_label, is_prediction
    counts = [g.emit("ReduceSum", _as_floats(g, v), axes, attrs={"keepdims": 0}) for v in truths]
    g.emit("Concat", *counts, attrs={"axis": 0}, out=SUMS)
    intersection, label_sizes, prediction_sizes = g.emit_many("Split", SUMS, outputs=3)
    union = g.emit("Sub", g.emit("Add", label_sizes, prediction_sizes), intersection)
    _mean_of_present(g, g.emit("Div", intersection, g.emit("Max", union, g.scalar(1))), union)


def _perplexity(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """e to the mean negative log-likelihood of the labels that count."""
    is_label, counted = _class_labels(g, outputs, features)
    log_likelihoods = g.emit("Where", is_label, g.emit("LogSoftmax", LOGITS, attrs={"axis": 1}), g.scalar(0))
    g.emit("Exp", _quotient_of_sums(g, g.emit("Neg", log_likelihoods), _as_floats(g, counted)), out=VALUE)


def _average_precision(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """Per class and bin of the score: positive labels, and others; precision is summed over the recall that each bin
    adds (Everingham et al., "The PASCAL VOC challenge", IJCV 2010, without its interpolation)."""
    score = g.emit("Mul", g.emit("Sigmoid", LOGITS), g.scalar(BINS))
    # An output that is not a number makes the sums of its class not a number, too. It can't be an index.
    is_number = g.emit("Equal", score, score)
    bin_numbers = g.emit("Where", is_number, g.emit("Min", g.emit("Floor", score), g.scalar(BINS - 1)), g.scalar(0))
    bins = g.emit("Cast", bin_numbers, attrs={"to": 7})
    bin_indices = g.emit("Reshape", g.emit("Add", bins, _class_numbers(g, outputs, BINS)), g.ints(-1))
    present = _as_floats(g, g.emit("Greater", Y, g.scalar(0.5)))
    positive = g.emit("Reshape", g.emit("Where", is_number, present, score), g.ints(-1))
    empty = g.constant(np.zeros(outputs[0] * BINS), np.float32)
    rows = [
        g.emit("ScatterElements", empty, bin_indices, some, attrs={"axis": 0, "reduction": "add"})
        for some in (positive, g.emit("Sub", g.scalar(1), positive))
    ]
    g.emit("Concat", *rows, attrs={"axis": 0}, out=SUMS)
    positives, negatives = (
        g.emit("Reshape", row, g.ints(outputs[0], BINS)) for row in g.emit_many("Split", SUMS, outputs=2)
    )
    # From the highest bin down: the positives and others at or above each threshold.
    true_above, false_above = (
        g.emit("CumSum", row, g.constant(1, np.int64), attrs={"reverse": 1}) for row in (positives, negatives)
    )
    precision = g.emit("Div", true_above, g.emit("Max", g.emit("Add", true_above, false_above), g.scalar(1)))
    total = g.emit("ReduceSum", positives, g.ints(1), attrs={"keepdims": 0})
    weighted = g.emit("ReduceSum", g.emit("Mul", positives, precision), g.ints(1), attrs={"keepdims": 0})
    _mean_of_present(g, g.emit("Div", weighted, g.emit("Max", total, g.scalar(1))), total)


def _rmse(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """The root of the mean squared error."""
    d = g.emit("Sub", LOGITS, Y)
    g.emit("Sqrt", _quotient_of_sums(g, g.emit("Mul", d, d), _as_floats(g, g.emit("Size", d))), out=VALUE)


def _mae(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """The mean absolute error."""
    d = g.emit("Abs", g.emit("Sub", LOGITS, Y))
    g.emit("Identity", _quotient_of_sums(g, d, _as_floats(g, g.emit("Size", d))), out=VALUE)


def _quotient_of_sums(g: Graph, *values: str) -> str:
    """The sum of a value over that of another one []; not a number where that is 0. The sums are written as `SUMS`."""
    totals = [g.emit("ReduceSum", g.emit("Reshape", value, g.ints(-1))) for value in values]
    g.emit("Concat", *totals, attrs={"axis": 0}, out=SUMS)
    return g.emit("Squeeze", g.emit("Div", *g.emit_many("Split", SUMS, outputs=2)))


def _mean_of_present(g: Graph, class_values: str, size: str) -> None:
    """The mean over the classes with a `size` above 0; not a number if there are none."""
    is_present = _as_floats(g, g.emit("Greater", size, g.scalar(0)))
    sums = [g.emit("ReduceSum", value, attrs={"keepdims": 0}) for value in (class_values, is_present)]
    g.emit("Div", *sums, out=VALUE)


_METRICS: dict[str, Callable[[Graph, tuple[int, ...], Features], None]] = {
    "miou": _mean_iou,
    "perplexity": _perplexity,
    "ap": _average_precision,
    "rmse": _rmse,
    "mae": _mae,
}
