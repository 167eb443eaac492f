"""Absolute error of every output: |d|, derivative sign(d)."""

from __future__ import annotations

from fedprune.model.loss import Loss, LossGraphWriter, LossParts, LossTerms, Shape, Y, sample_means


def _write(g: LossGraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    d = g.emit("Sub", logits, Y)
    return sample_means(g, g.emit("Abs", d), g.emit("Sign", d), outputs)


LOSS = Loss(labels="values", write=_write)
