"""Writes the loss of a training step and its gradient by the logits.

The loss is built in (`fedprune.model.losses`), or the model's own.
"""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.features import MULTI_LABELS, Features
from fedprune.model.loss import LossParts, along_classes, count_hits
from fedprune.model.losses import LOSSES
from fedprune_export.autodiff.element_counts import elements_of
from fedprune_export.autodiff.tape import BATCH, Shape, Tape
from fedprune_export.ir.graph import Graph
from fedprune_export.pruning.model import Model


def target_shape(features: Features, outputs: tuple[int, ...]) -> tuple[Shape, np.dtype[np.generic]]:
    """Shape and type of the labels of a batch, for outputs [N, *outputs]."""
    return (BATCH, *features.target_shape(outputs)), np.dtype(np.int64 if features.has_class_labels else np.float32)


def write_loss(
    g: Graph, logits: str, outputs: tuple[int, ...], features: Features, own_loss: Model | None = None
) -> str:
    """Write the loss of a batch, and the counts of right answers; returns the gradient of the loss by the logits.

    Raises `ModelError` if an operator of the model's own loss has no gradient rule, or outputs of this shape have no
    such loss. `logits`: the model's output [N, *outputs], with classes on axis 1.
    """
    present = ""
    if features.logit_offset:
        g.add_input(step_contract.LOGIT_OFFSET, outputs[:1])
        logits = g.emit("Add", logits, along_classes(g, step_contract.LOGIT_OFFSET, outputs))
    if features.class_mask:
        g.add_input(step_contract.CLASS_MASK, outputs[:1])
        mask = along_classes(g, step_contract.CLASS_MASK, outputs)
        # After the offset, so that the logit of a masked class is exactly 0.
        present = g.emit("Greater", mask, g.scalar(0))
        logits = g.emit("Where", present, logits, g.scalar(0))
    if features.class_weight:
        g.add_input(step_contract.CLASS_WEIGHT, outputs[:1])
    loss = LOSSES[features.loss]
    if loss.setting:
        g.add_input(loss.setting)
    loss_parts = loss.write(g, logits, outputs, features) if own_loss is None else _write_own_loss(g, logits, own_loss)
    if loss.labels == MULTI_LABELS:
        is_positive = g.emit("Greater", step_contract.Y, g.scalar(0.5))
        count_hits(g, g.emit("Equal", g.emit("Greater", logits, g.scalar(0)), is_positive))
    share = _loss_factor(g, loss_parts, features)
    g.emit("ReduceSum", g.emit("Mul", loss_parts.row, share), attrs={"keepdims": 0}, out=step_contract.LOSS)
    gradient = loss_parts.gradient(share)
    # Logits of masked classes were replaced, so that no gradient passes them.
    return g.emit("Where", present, gradient, g.scalar(0)) if present else gradient


def _loss_factor(g: Graph, loss_parts: LossParts, features: Features) -> str:
    """The factor of each label's loss in the batch's: of `row`'s shape, or []."""
    divisor = loss_parts.divisor
    if features.accumulate:
        g.add_input(step_contract.DIVISOR)
        # Micro-batches are divided by what the whole batch counts, which only the trainer knows.
        divisor = step_contract.DIVISOR
    elif not loss_parts.weight and not divisor:
        divisor = elements_of(g, loss_parts.row)
    return g.emit("Div", loss_parts.weight, divisor) if loss_parts.weight else g.emit("Reciprocal", divisor)


def _write_own_loss(g: Graph, logits: str, loss: Model) -> LossParts:
    """A loss that is a graph, differentiated by the same rules as the model."""
    output_sizes, label_sizes = (tuple(d for d in p.shape[1:] if isinstance(d, int)) for p in loss.graph.inputs)
    tape = Tape(loss, g)
    tape.enter(step_contract.LOGITS, logits, (BATCH, *output_sizes), needs_gradient=True)
    tape.enter(step_contract.Y, step_contract.Y, (BATCH, *label_sizes))
    try:
        tape.forward()
    except ModelError as error:
        raise ModelError(f"the model's own loss: {error}") from error
    row = tape.value(step_contract.LOSS)
    if not tape.needs_gradient(step_contract.LOSS):
        raise ModelError(
            "the model's own loss doesn't depend on its outputs in a way that can be trained",
            hint="No gradient passes argmax, comparisons, rounding, whole numbers or detach().",
        )

    def gradient(share: str) -> str:
        tape.add_gradient(step_contract.LOSS, g.emit("Expand", share, tape.shape_of(row)))
        tape.backward()
        logit_gradient = tape.gradient(step_contract.LOGITS)
        if logit_gradient is None:
            raise ModelError("the model's own loss has no gradient by its outputs")
        return logit_gradient

    return LossParts(row, gradient)
