"""Cross-entropy with class labels; hits are labels whose logit is the largest at its position.

With smoothing ε the target is a_c = (1 − ε)·w_y·[c = y] + ε/K·w_c: the loss is −Σ a_c·log p_c, its derivative p·Σa − a.
With pairs of labels, w_y·[c = y] is λ·w_y·[c = y] + (1 − λ)·w_y'·[c = y']. Partners' labels are the same labels in
another order, so that their weights add up to the same divisor, and the loss is λ·CE(y) + (1 − λ)·CE(y').
"""

from __future__ import annotations

from functools import partial

import numpy as np

from fedprune.model import loss


def _write(g: loss.LossGraphWriter, logits: str, outputs: loss.Shape, terms: loss.LossTerms) -> loss.LossParts:
    label = g.emit("Unsqueeze", loss.Y, g.ints(1))
    is_counted = count_weight = ""
    if terms.ignore_label is not None:
        is_counted = g.emit("Not", g.emit("Equal", loss.Y, g.constant(terms.ignore_label, np.int64)))
        # Class 0 stands in for ignored labels, which may be no class at all (255) and would be out of range.
        label = g.emit("Where", g.emit("Unsqueeze", is_counted, g.ints(1)), label, g.constant(0, np.int64))
        count_weight = g.emit("Cast", g.emit("Unsqueeze", is_counted, g.ints(1)), attrs={"to": 1})
    is_label = g.emit("Equal", label, loss.class_numbers(g, outputs))
    log_probability = g.emit("LogSoftmax", logits, attrs={"axis": 1})
    probability = g.emit("Softmax", logits, attrs={"axis": 1})
    expected = g.emit("Cast", is_label, attrs={"to": 1})
    guess = g.emit("ArgMax", logits, attrs={"axis": 1, "keepdims": 0})
    expected_class = loss.Y
    if terms.label_pairs:
        g.add_input(loss.Y_PARTNER, (loss.BATCH, *outputs[1:]), np.int64)
        g.add_input(loss.Y_SHARE)
        expected_class = g.emit("Where", g.emit("Less", loss.Y_SHARE, g.scalar(0.5)), loss.Y_PARTNER, loss.Y)
    right = g.emit("Equal", guess, expected_class)
    loss.count_hits(g, g.emit("And", right, is_counted) if is_counted else right)
    weight = g.emit("Gather", loss.CLASS_WEIGHT, label) if terms.class_weight else ""
    label_weight = g.emit("Mul", weight, count_weight) if weight and count_weight else weight or count_weight
    divisor = g.emit("ReduceSum", label_weight, attrs={"keepdims": 0}) if label_weight else ""
    if count_weight:  # a batch in which no label counts has loss 0, and not 0 / 0
        divisor = g.emit("Where", g.emit("Equal", divisor, g.scalar(0)), g.scalar(1), divisor)
    if not terms.label_pairs and not terms.label_smoothing:
        label_log_probability = g.emit("Where", is_label, log_probability, g.scalar(0))
        row = g.emit("Neg", g.emit("ReduceSum", label_log_probability, g.ints(1), attrs={"keepdims": 1}))
        return loss.LossParts(row, partial(g.emit, "Mul", g.emit("Sub", probability, expected)), label_weight, divisor)
    if terms.label_pairs:
        target = _paired_target(g, expected, weight, outputs)
        if terms.label_smoothing:
            kept_share, spread_share = _smoothing(g, outputs, terms, "")
            target = g.emit("Add", g.emit("Mul", target, kept_share), spread_share)
    else:
        kept_share, spread_share = _smoothing(g, outputs, terms, weight)
        target = g.emit("Add", g.emit("Mul", expected, kept_share), spread_share)
    return _target_loss(
        g, g.emit("Mul", target, count_weight) if count_weight else target, probability, log_probability, divisor
    )


def _paired_target(g: loss.LossGraphWriter, expected: str, weight: str, outputs: loss.Shape) -> str:
    """The target distribution of two labels and their shares [N, K, ...], from 1 where a class is the label (0
    elsewhere), and the weight of each label [N, 1, ...] or ""."""
    partner = g.emit("Unsqueeze", loss.Y_PARTNER, g.ints(1))
    is_partner = g.emit("Equal", partner, loss.class_numbers(g, outputs))
    own_share, partner_share = loss.Y_SHARE, g.emit("Sub", g.scalar(1), loss.Y_SHARE)
    if weight:
        own_share = g.emit("Mul", own_share, weight)
        partner_share = g.emit("Mul", partner_share, g.emit("Gather", loss.CLASS_WEIGHT, partner))
    mixed_in = g.emit("Cast", is_partner, attrs={"to": 1})
    return g.emit("Add", g.emit("Mul", expected, own_share), g.emit("Mul", mixed_in, partner_share))


def _smoothing(g: loss.LossGraphWriter, outputs: loss.Shape, terms: loss.LossTerms, weight: str) -> tuple[str, str]:
    """The factor of labels, [] or with their weights [N, 1, ...], and the share of every class: [] or [K, 1, ...]."""
    g.add_input(loss.LABEL_SMOOTHING)
    kept_share = g.emit("Sub", g.scalar(1), loss.LABEL_SMOOTHING)
    spread_share = g.emit("Div", loss.LABEL_SMOOTHING, g.scalar(outputs[0]))
    if weight:
        kept_share = g.emit("Mul", kept_share, weight)
    if terms.class_weight:
        spread_share = g.emit("Mul", spread_share, loss.along_classes(g, loss.CLASS_WEIGHT, outputs))
    return kept_share, spread_share


def _target_loss(
    g: loss.LossGraphWriter, target: str, probability: str, log_probability: str, divisor: str
) -> loss.LossParts:
    """Cross-entropy with any target distribution [N, K, ...]."""
    row = g.emit("Neg", g.emit("ReduceSum", g.emit("Mul", target, log_probability), g.ints(1), attrs={"keepdims": 1}))
    target_sum = g.emit("ReduceSum", target, g.ints(1), attrs={"keepdims": 1})
    slope = g.emit("Sub", g.emit("Mul", probability, target_sum), target)
    return loss.LossParts(row, partial(g.emit, "Mul", slope), "", divisor)


def _value(outputs: loss.Outputs, feeds: loss.Feeds) -> float:
    logs = outputs - outputs.max(axis=1, keepdims=True)
    logs = logs - np.log(np.exp(logs).sum(axis=1, keepdims=True))

    def log_probabilities_of(labels: loss.Array) -> loss.Array:
        return np.take_along_axis(logs, labels[:, None], axis=1)[:, 0]

    label_logs, smoothing = log_probabilities_of(feeds[loss.Y]), float(feeds.get(loss.LABEL_SMOOTHING, 0.0))
    if loss.Y_SHARE in feeds:
        share = float(feeds[loss.Y_SHARE])
        label_logs = share * label_logs + (1 - share) * log_probabilities_of(feeds[loss.Y_PARTNER])
    return float(-np.mean((1 - smoothing) * label_logs + smoothing * logs.mean(axis=1)))


LOSS = loss.Loss(
    labels="classes",
    write=_write,
    value=_value,
    copies=1.5,
    reads_logits=True,
    terms=frozenset({"logit_adjustment", "mask_absent_classes", "balance_classes", "label_smoothing", "ignore_label"}),
)
