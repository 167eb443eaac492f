"""Cross-entropy with class labels; hits are labels whose logit is the largest of its place.

With smoothing ε, a_c = (1 − ε)·w_y·[c = y] + ε/K·w_c: the loss is −Σ a_c·log p_c, its slope p·Σa − a. With pairs of
labels, w_y·[c = y] is λ·w_y·[c = y] + (1 − λ)·w_y'·[c = y']; because partners' labels are the same ones in another
order, their weights add up to the same divisor, and the loss is λ·CE(y) + (1 − λ)·CE(y').
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedprune.model.loss import (
    BATCH,
    CLASS_WEIGHT,
    LABEL_SMOOTHING,
    Y_PARTNER,
    Y_SHARE,
    Array,
    Feeds,
    GraphWriter,
    Loss,
    LossParts,
    LossTerms,
    Outputs,
    Shape,
    Y,
    along_classes,
    class_numbers,
    count_hits,
)


def _write(g: GraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    label = g.emit("Unsqueeze", Y, g.ints(1))
    counts = counted = ""
    if terms.ignore_label is not None:
        counts = g.emit("Not", g.emit("Equal", Y, g.constant(terms.ignore_label, np.int64)))
        label = g.emit("Where", g.emit("Unsqueeze", counts, g.ints(1)), label, g.constant(0, np.int64))
        counted = g.emit("Cast", g.emit("Unsqueeze", counts, g.ints(1)), attrs={"to": 1})
    is_label = g.emit("Equal", label, class_numbers(g, outputs))
    log_probability = g.emit("LogSoftmax", logits, attrs={"axis": 1})
    probability = g.emit("Softmax", logits, attrs={"axis": 1})
    expected = g.emit("Cast", is_label, attrs={"to": 1})
    guess = g.emit("ArgMax", logits, attrs={"axis": 1, "keepdims": 0})
    meant = Y
    if terms.label_pairs:
        g.add_input(Y_PARTNER, (BATCH, *outputs[1:]), np.int64)
        g.add_input(Y_SHARE)
        minor = g.emit("Less", Y_SHARE, g.scalar(0.5))
        meant = g.emit("Where", minor, Y_PARTNER, Y)
    right = g.emit("Equal", guess, meant)
    count_hits(g, g.emit("And", right, counts) if counts else right)
    weight = g.emit("Gather", CLASS_WEIGHT, label) if terms.class_weight else ""
    whole = g.emit("Mul", weight, counted) if weight and counted else weight or counted
    divisor = g.emit("ReduceSum", whole, attrs={"keepdims": 0}) if whole else ""
    if counted:  # of a batch without any label that counts the loss is 0
        divisor = g.emit("Where", g.emit("Equal", divisor, g.scalar(0)), g.scalar(1), divisor)
    if not terms.label_pairs and not terms.label_smoothing:
        own = g.emit("Where", is_label, log_probability, g.scalar(0))
        row = g.emit("Neg", g.emit("ReduceSum", own, g.ints(1), attrs={"keepdims": 1}))
        return LossParts(row, partial(g.emit, "Mul", g.emit("Sub", probability, expected)), whole, divisor)
    if terms.label_pairs:
        aim = _mixed(g, expected, weight, outputs)
        if terms.label_smoothing:
            kept, spread = _smoothing(g, outputs, terms, "")
            aim = g.emit("Add", g.emit("Mul", aim, kept), spread)
    else:
        kept, spread = _smoothing(g, outputs, terms, weight)
        aim = g.emit("Add", g.emit("Mul", expected, kept), spread)
    return _towards(g, g.emit("Mul", aim, counted) if counted else aim, probability, log_probability, divisor)


def _mixed(g: GraphWriter, expected: str, weight: str, outputs: Shape) -> str:
    """The target distribution of two labels and their shares [N, K, ...].

    Args:
        expected: 1 where a class is the label, else 0.
        weight: The weight of each label [N, 1, ...], or empty.
    """
    partner = g.emit("Unsqueeze", Y_PARTNER, g.ints(1))
    is_partner = g.emit("Equal", partner, class_numbers(g, outputs))
    own, other = Y_SHARE, g.emit("Sub", g.scalar(1), Y_SHARE)
    if weight:
        own = g.emit("Mul", own, weight)
        other = g.emit("Mul", other, g.emit("Gather", CLASS_WEIGHT, partner))
    mixed_in = g.emit("Cast", is_partner, attrs={"to": 1})
    return g.emit("Add", g.emit("Mul", expected, own), g.emit("Mul", mixed_in, other))


def _smoothing(g: GraphWriter, outputs: Shape, terms: LossTerms, weight: str) -> tuple[str, str]:
    """By what labels are multiplied, [] or with their weights [N, 1, ...], and what every class gets of them: [] or
    [K, 1, ...]."""
    g.add_input(LABEL_SMOOTHING)
    kept = g.emit("Sub", g.scalar(1), LABEL_SMOOTHING)
    spread = g.emit("Div", LABEL_SMOOTHING, g.scalar(outputs[0]))
    if weight:
        kept = g.emit("Mul", kept, weight)
    if terms.class_weight:
        spread = g.emit("Mul", spread, along_classes(g, CLASS_WEIGHT, outputs))
    return kept, spread


def _towards(g: GraphWriter, aim: str, probability: str, log_probability: str, divisor: str) -> LossParts:
    """Cross-entropy with any aim [N, K, ...]."""
    row = g.emit("Neg", g.emit("ReduceSum", g.emit("Mul", aim, log_probability), g.ints(1), attrs={"keepdims": 1}))
    whole = g.emit("ReduceSum", aim, g.ints(1), attrs={"keepdims": 1})
    slope = g.emit("Sub", g.emit("Mul", probability, whole), aim)
    return LossParts(row, partial(g.emit, "Mul", slope), "", divisor)


def _value(outputs: Outputs, feeds: Feeds) -> float:
    logs = outputs - outputs.max(axis=1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))

    def chosen(labels: Array) -> Array:
        return np.take_along_axis(logs, labels[:, None], axis=1)[:, 0]

    own, smoothing = chosen(feeds[Y]), float(feeds.get(LABEL_SMOOTHING, 0.0))
    if Y_SHARE in feeds:
        share = float(feeds[Y_SHARE])
        own = share * own + (1 - share) * chosen(feeds[Y_PARTNER])
    return float(-np.mean((1 - smoothing) * own + smoothing * logs.mean(axis=1)))


LOSS = Loss(
    labels="classes",
    write=_write,
    value=_value,
    copies=1.5,
    reads_logits=True,
    terms=frozenset({"logit_adjustment", "mask_absent_classes", "balance_classes", "label_smoothing", "ignore_label"}),
)
