"""Binary cross-entropy of every label, from logits.

With positive weight p: (1 − y)·softplus(x) + p·y·softplus(−x), its slope (1 − y)·σ(x) − p·y·σ(−x). All of it is
written with e = exp(−|x|) and without differences, so that small losses keep their digits.
"""

from __future__ import annotations

import numpy as np

from fedprune.model.loss import (
    CLASS_WEIGHT,
    Feeds,
    GraphWriter,
    Loss,
    LossParts,
    LossTerms,
    Outputs,
    Shape,
    Y,
    along_classes,
    sample_means,
)


def _write(g: GraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    zero, one = g.scalar(0), g.scalar(1)
    e = g.emit("Exp", g.emit("Neg", g.emit("Abs", logits)))
    above = g.emit("Add", one, e)
    # log(1 + e) where the sum rounds e off: log(u)·e/(u − 1), in which the rounding of u cancels.
    rounded = g.emit("Sub", above, one)
    lost = g.emit("Equal", rounded, zero)
    exact = g.emit("Div", g.emit("Mul", g.emit("Log", above), e), g.emit("Where", lost, one, rounded))
    soft = g.emit("Where", lost, e, exact)
    positive = g.emit("Greater", logits, zero)
    absent, present = g.emit("Sub", one, Y), Y
    if terms.class_weight:
        present = g.emit("Mul", present, along_classes(g, CLASS_WEIGHT, outputs))

    def side(load: str, x: str, up: str, down: str) -> tuple[str, str]:
        """A kind of labels' loss and the size of its slope."""
        softplus = g.emit("Add", soft, g.emit("Relu", x))
        sigma = g.emit("Div", g.emit("Where", positive, up, down), above)
        return g.emit("Mul", load, softplus), g.emit("Mul", load, sigma)

    of_absent, down = side(absent, logits, one, e)
    of_present, up = side(present, g.emit("Neg", logits), e, one)
    each, slope = g.emit("Add", of_absent, of_present), g.emit("Sub", down, up)
    return sample_means(g, each, slope, outputs)


def _value(outputs: Outputs, feeds: Feeds) -> float:
    return float(np.mean(np.maximum(outputs, 0) - outputs * feeds[Y] + np.log1p(np.exp(-np.abs(outputs)))))


LOSS = Loss(
    labels="multi", write=_write, value=_value, copies=5.5, reads_logits=True, terms=frozenset({"balance_classes"})
)
