"""Squared error of every output: d², derivative 2·d."""

from __future__ import annotations

import numpy as np

from fedprune.model.loss import Feeds, Loss, LossGraphWriter, LossParts, LossTerms, Outputs, Shape, Y, sample_means


def _write(g: LossGraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    d = g.emit("Sub", logits, Y)
    return sample_means(g, g.emit("Mul", d, d), g.emit("Mul", d, g.scalar(2)), outputs)


def _value(outputs: Outputs, feeds: Feeds) -> float:
    return float(np.mean((outputs - feeds[Y]) ** 2))


LOSS = Loss(labels="values", write=_write, value=_value)
