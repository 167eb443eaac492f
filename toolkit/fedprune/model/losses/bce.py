"""Binary cross-entropy of every label, from logits.

With positive weight p: (1 − y)·softplus(x) + p·y·softplus(−x), its derivative (1 − y)·σ(x) − p·y·σ(−x). Both are
written with e = exp(−|x|) and without differences, so that small losses keep their digits.
"""

from __future__ import annotations

import numpy as np

from fedprune.model import loss


def _write(g: loss.LossGraphWriter, logits: str, outputs: loss.Shape, terms: loss.LossTerms) -> loss.LossParts:
    zero, one = g.scalar(0), g.scalar(1)
    e = g.emit("Exp", g.emit("Neg", g.emit("Abs", logits)))
    one_plus_e = g.emit("Add", one, e)
    # log1p(e), which ONNX lacks: with u = 1 + e rounded, log(u)·e/(u − 1), in which the rounding of u cancels.
    rounded = g.emit("Sub", one_plus_e, one)
    is_lost = g.emit("Equal", rounded, zero)
    exact = g.emit("Div", g.emit("Mul", g.emit("Log", one_plus_e), e), g.emit("Where", is_lost, one, rounded))
    log_one_plus_e = g.emit("Where", is_lost, e, exact)
    positive = g.emit("Greater", logits, zero)
    absent, present = g.emit("Sub", one, loss.Y), loss.Y
    if terms.class_weight:
        present = g.emit("Mul", present, loss.along_classes(g, loss.CLASS_WEIGHT, outputs))

    def side(load: str, x: str, up: str, down: str) -> tuple[str, str]:
        """The loss of one kind of labels, and the size of its derivative."""
        softplus = g.emit("Add", log_one_plus_e, g.emit("Relu", x))
        sigma = g.emit("Div", g.emit("Where", positive, up, down), one_plus_e)
        return g.emit("Mul", load, softplus), g.emit("Mul", load, sigma)

    of_absent, down = side(absent, logits, one, e)
    of_present, up = side(present, g.emit("Neg", logits), e, one)
    losses, slope = g.emit("Add", of_absent, of_present), g.emit("Sub", down, up)
    return loss.sample_means(g, losses, slope, outputs)


def _value(outputs: loss.Outputs, feeds: loss.Feeds) -> float:
    return float(np.mean(np.maximum(outputs, 0) - outputs * feeds[loss.Y] + np.log1p(np.exp(-np.abs(outputs)))))


LOSS = loss.Loss(
    labels="multi", write=_write, value=_value, copies=5.5, reads_logits=True, terms=frozenset({"balance_classes"})
)
