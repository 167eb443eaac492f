"""A model's own loss: a graph of outputs and labels, which the compiler writes in place of this one."""

from __future__ import annotations

from fedprune.core.errors import ModelError
from fedprune.model.loss import Loss, LossGraphWriter, LossParts, LossTerms, Shape


def _write(g: LossGraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    raise ModelError("the model brings no loss of its own", expected="one, or a built-in loss")


LOSS = Loss(labels="own", write=_write, copies=8.0, can_mix=False)  # as many copies as a focal loss needs
