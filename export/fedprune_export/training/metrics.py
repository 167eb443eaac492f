"""Metrics as ONNX graphs: from outputs and labels to sums that add up over batches, and from the sums to the metric."""

from __future__ import annotations

import base64
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


def embedded_metric(model: Model, labels: Port, features: Features) -> str:
    """The metric as it is stored in a training graph's metadata. Raises as `metric_graph`."""
    # The opset of training graphs: every onnxruntime that boards have loads it.
    return base64.b64encode(metric_graph(model, labels, features).to_bytes(opset=17)).decode()


def _class_labels(g: Graph, outputs: tuple[int, ...], features: Features) -> tuple[str, str]:
    """Whether each label is a class [N, K, ...], and whether it counts [N, 1, ...]; one that doesn't is no class."""
    classes = g.constant(np.arange(outputs[0]).reshape(1, -1, *[1] * (len(outputs) - 1)), np.int64)
    label = g.emit("Unsqueeze", Y, g.ints(1))
    counted = g.emit("Equal", label, label)  # true everywhere: without `ignore_label` every label counts
    if features.ignore_label is not None:
        counted = g.emit("Not", g.emit("Equal", label, g.constant(features.ignore_label, np.int64)))
    return g.emit("And", g.emit("Equal", label, classes), counted), counted


def _count(g: Graph, truths: str, axes: list[int] | None = None) -> str:
    """Count the truths over all axes [1], or over some."""
    numbers = g.emit("Cast", truths, attrs={"to": 1})
    if axes is None:
        return g.emit("Reshape", g.emit("ReduceSum", numbers, attrs={"keepdims": 0}), g.ints(1))
    return g.emit("ReduceSum", numbers, g.ints(*axes), attrs={"keepdims": 0})


def _mean_iou(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """Per class, the number of positions in the intersection, in the labels and in the predictions; classes in neither
    are left out of the mean.
    """
    k = outputs[0]
    is_label, counted = _class_labels(g, outputs, features)
    classes = g.constant(np.arange(k).reshape(1, -1, *[1] * (len(outputs) - 1)), np.int64)
    prediction = g.emit("ArgMax", LOGITS, attrs={"axis": 1, "keepdims": 1})
    is_prediction = g.emit("And", g.emit("Equal", prediction, classes), counted)
    axes = [0, *range(2, len(outputs) + 1)]
    counts = [_count(g, v, axes) for v in (g.emit("And", is_label, is_prediction), is_label, is_prediction)]
    g.emit("Concat", *counts, attrs={"axis": 0}, out=SUMS)
    intersection, label_sizes, prediction_sizes = (
        g.emit("Slice", SUMS, g.ints(k * i), g.ints(k * (i + 1)), g.ints(0)) for i in range(3)
    )
    union = g.emit("Sub", g.emit("Add", label_sizes, prediction_sizes), intersection)
    _mean_of_present(g, g.emit("Div", intersection, g.emit("Max", union, g.scalar(1))), union)


def _perplexity(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """e to the mean negative log-likelihood of the labels that count."""
    is_label, counted = _class_labels(g, outputs, features)
    log_likelihoods = g.emit("Where", is_label, g.emit("LogSoftmax", LOGITS, attrs={"axis": 1}), g.scalar(0))
    total = g.emit("Reshape", g.emit("ReduceSum", log_likelihoods, attrs={"keepdims": 0}), g.ints(1))
    g.emit("Concat", g.emit("Neg", total), _count(g, counted), attrs={"axis": 0}, out=SUMS)
    g.emit("Exp", _quotient_of_sums(g), out=VALUE)


def _average_precision(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """Per class and bin of the score: positive labels, and others; precision is summed over the recall that each bin
    adds (Everingham et al., "The PASCAL VOC challenge", IJCV 2010, without its interpolation)."""
    k = outputs[0]
    score = g.emit("Mul", g.emit("Sigmoid", LOGITS), g.scalar(BINS))
    # An output that is not a number makes the sums of its class not a number, too. It can't be an index.
    is_number = g.emit("Equal", score, score)
    bin_numbers = g.emit("Where", is_number, g.emit("Min", g.emit("Floor", score), g.scalar(BINS - 1)), g.scalar(0))
    bins = g.emit("Cast", bin_numbers, attrs={"to": 7})
    first = BINS * np.arange(k).reshape(1, -1, *[1] * (len(outputs) - 1))
    bin_indices = g.emit("Reshape", g.emit("Add", bins, g.constant(first, np.int64)), g.ints(-1))
    present = g.emit("Cast", g.emit("Greater", Y, g.scalar(0.5)), attrs={"to": 1})
    positive = g.emit("Reshape", g.emit("Where", is_number, present, score), g.ints(-1))
    empty = g.constant(np.zeros(k * BINS), np.float32)
    rows = [
        g.emit("ScatterElements", empty, bin_indices, some, attrs={"axis": 0, "reduction": "add"})
        for some in (positive, g.emit("Sub", g.scalar(1), positive))
    ]
    g.emit("Concat", *rows, attrs={"axis": 0}, out=SUMS)
    size = k * BINS
    positives, negatives = (
        g.emit("Reshape", g.emit("Slice", SUMS, g.ints(size * i), g.ints(size * (i + 1)), g.ints(0)), g.ints(k, BINS))
        for i in range(2)
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
    _sum_errors(g, g.emit("Mul", d, d))
    g.emit("Sqrt", _quotient_of_sums(g), out=VALUE)


def _mae(g: Graph, outputs: tuple[int, ...], features: Features) -> None:
    """The mean absolute error."""
    _sum_errors(g, g.emit("Abs", g.emit("Sub", LOGITS, Y)))
    g.emit("Identity", _quotient_of_sums(g), out=VALUE)


def _sum_errors(g: Graph, errors: str) -> None:
    total = g.emit("Reshape", g.emit("ReduceSum", errors, attrs={"keepdims": 0}), g.ints(1))
    number = g.emit("Reshape", g.emit("Cast", g.emit("Size", errors), attrs={"to": 1}), g.ints(1))
    g.emit("Concat", total, number, attrs={"axis": 0}, out=SUMS)


def _quotient_of_sums(g: Graph) -> str:
    """The quotient of the first sum by the second []; not a number where the second is 0."""
    first, second = (
        g.emit("Squeeze", g.emit("Slice", SUMS, g.ints(i), g.ints(i + 1), g.ints(0)), g.ints(0)) for i in range(2)
    )
    return g.emit("Div", first, second)


def _mean_of_present(g: Graph, class_values: str, size: str) -> None:
    """The mean over the classes with a `size` above 0; not a number if there are none."""
    class_count = g.emit(
        "ReduceSum", g.emit("Cast", g.emit("Greater", size, g.scalar(0)), attrs={"to": 1}), attrs={"keepdims": 0}
    )
    g.emit("Div", g.emit("ReduceSum", class_values, attrs={"keepdims": 0}), class_count, out=VALUE)


_METRICS: dict[str, Callable[[Graph, tuple[int, ...], Features], None]] = {
    "miou": _mean_iou,
    "perplexity": _perplexity,
    "ap": _average_precision,
    "rmse": _rmse,
    "mae": _mae,
}
