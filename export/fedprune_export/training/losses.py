"""The loss of a training step, with its gradient by the logits: a built-in one (`fedprune.model.losses`), or the
model's own."""

from __future__ import annotations

import numpy as np

from fedprune.core.errors import ModelError
from fedprune.model import step_contract
from fedprune.model.loss import LossParts, along_classes, count_hits
from fedprune.model.losses import LOSSES
from fedprune.model.recipe import MULTI, Features
from fedprune_export.autodiff.tape import BATCH, Shape, Tape
from fedprune_export.ir.graph import Graph
from fedprune_export.operators.reductions import elements_of
from fedprune_export.pruning.model import Model


def target_shape(features: Features, outputs: tuple[int, ...]) -> tuple[Shape, np.dtype[np.generic]]:
    """Shape and type of the labels of a batch, for outputs [N, *outputs]."""
    return (BATCH, *features.target_shape(outputs)), np.dtype(np.int64 if features.counts else np.float32)


def write_loss(g: Graph, logits: str, outputs: tuple[int, ...], features: Features, own: Model | None = None) -> str:
    """Write the loss and what else is known of a batch's outputs.

    Args:
        g: The training graph; its inputs and outputs grow.
        logits: The model's output [N, *outputs]; classes are on its axis 1.
        own: The model's own loss, where the features ask for that.

    Returns:
        The gradient of the loss by the logits.

    Raises:
        ModelError: An operator of the model's own loss has no gradient rule, or outputs of this shape have no such
            loss.
    """
    present = ""
    if features.logit_offset:
        g.add_input(step_contract.LOGIT_OFFSET, outputs[:1])
        logits = g.emit("Add", logits, along_classes(g, step_contract.LOGIT_OFFSET, outputs))
    if features.class_mask:
        g.add_input(step_contract.CLASS_MASK, outputs[:1])
        mask = along_classes(g, step_contract.CLASS_MASK, outputs)
        present = g.emit("Greater", mask, g.scalar(0))
        logits = g.emit("Where", present, logits, g.scalar(0))
    if features.class_weight:
        g.add_input(step_contract.CLASS_WEIGHT, outputs[:1])
    loss = LOSSES[features.loss]
    if loss.setting:
        g.add_input(loss.setting)
    parts = loss.write(g, logits, outputs, features) if own is None else _of_graph(g, logits, own)
    if loss.labels == MULTI:
        right = g.emit("Greater", step_contract.Y, g.scalar(0.5))
        count_hits(g, g.emit("Equal", g.emit("Greater", logits, g.scalar(0)), right))
    share = _share(g, parts, features)
    g.emit("ReduceSum", g.emit("Mul", parts.row, share), attrs={"keepdims": 0}, out=step_contract.LOSS)
    gradient = parts.gradient(share)
    # Logits of masked classes were replaced, so that no gradient passes them.
    return g.emit("Where", present, gradient, g.scalar(0)) if present else gradient


def _share(g: Graph, parts: LossParts, features: Features) -> str:
    """By what the losses of labels are multiplied: of `row`'s shape, or []."""
    divisor = parts.divisor
    if features.accumulate:
        g.add_input(step_contract.DIVISOR)
        divisor = step_contract.DIVISOR
    elif not parts.weight and not divisor:
        divisor = elements_of(g, parts.row)
    return g.emit("Div", parts.weight, divisor) if parts.weight else g.emit("Reciprocal", divisor)


def _of_graph(g: Graph, logits: str, loss: Model) -> LossParts:
    """A loss that is a graph, differentiated by the same rules as the model."""
    taken, labels = (tuple(d for d in p.shape[1:] if isinstance(d, int)) for p in loss.graph.inputs)
    tape = Tape(loss, g)
    tape.enter(step_contract.LOGITS, logits, (BATCH, *taken), wanted=True)
    tape.enter(step_contract.Y, step_contract.Y, (BATCH, *labels))
    try:
        tape.forward()
    except ModelError as error:
        raise ModelError(f"the model's own loss: {error}") from error
    row = tape.value(step_contract.LOSS)
    if not tape.wants(step_contract.LOSS):
        raise ModelError(
            "the model's own loss doesn't depend on its outputs in a way that can be trained",
            hint="No gradient passes argmax, comparisons, rounding, whole numbers or detach().",
        )

    def gradient(share: str) -> str:
        tape.add(step_contract.LOSS, g.emit("Expand", share, tape.shape_of(row)))
        tape.backward()
        found = tape.gradient(step_contract.LOGITS)
        if found is None:
            raise ModelError("the model's own loss has no gradient by its outputs")
        return found

    return LossParts(row, gradient)
