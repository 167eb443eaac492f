"""Huber's error of every output: with c = min(|d|, δ) it is c·(|d| − c/2), its derivative d clipped to ±δ."""

from __future__ import annotations

import numpy as np

from fedprune.model.loss import Feeds, Loss, LossGraphWriter, LossParts, LossTerms, Outputs, Shape, Y, sample_means

_DELTA = "huber_delta"


def _write(g: LossGraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    d = g.emit("Sub", logits, Y)
    size = g.emit("Abs", d)
    c = g.emit("Min", size, _DELTA)
    each = g.emit("Mul", c, g.emit("Sub", size, g.emit("Mul", c, g.scalar(0.5))))
    return sample_means(g, each, g.emit("Mul", g.emit("Sign", d), c), outputs)


def _value(outputs: Outputs, feeds: Feeds) -> float:
    error, delta = np.abs(outputs - feeds[Y]), float(feeds[_DELTA])
    return float(np.mean(np.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))))


LOSS = Loss(labels="values", write=_write, value=_value, copies=2.5, setting=_DELTA)
