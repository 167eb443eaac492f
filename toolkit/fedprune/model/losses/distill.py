"""T² · KL(softmax(y / T) ‖ softmax(z / T)) over classes, the mean over places; labels are a teacher's outputs.

Its slope is T · (softmax(z / T) − softmax(y / T)): cross-entropy with the teacher's softened shares, less its own
entropy, so that 0 is the least; T² keeps the size of gradients (Hinton, Vinyals and Dean, "Distilling the knowledge
in a neural network", arXiv:1503.02531, Sec. 2).
"""

from __future__ import annotations

import math
from functools import partial

from fedprune.core.errors import ModelError, shape_text
from fedprune.model.loss import GraphWriter, Loss, LossParts, LossTerms, Shape, Y

_TEMPERATURE = "distill_temperature"


def _write(g: GraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    if outputs[0] < 2:
        raise ModelError(
            "outputs of a model with loss distill",
            expected="[n, classes, ...], with two classes or more",
            got=shape_text("n", *outputs),
        )
    heat, places = _TEMPERATURE, math.prod(outputs[1:])
    student, teacher = (g.emit("Div", value, heat) for value in (logits, Y))
    own, aim = (g.emit("Softmax", value, attrs={"axis": 1}) for value in (student, teacher))
    log_own, log_aim = (g.emit("LogSoftmax", value, attrs={"axis": 1}) for value in (student, teacher))
    each = g.emit("Mul", aim, g.emit("Sub", log_aim, log_own))
    row = g.emit("ReduceSum", each, g.ints(*range(1, len(outputs) + 1)), attrs={"keepdims": 1})
    row = g.emit("Mul", row, g.emit("Div", g.emit("Mul", heat, heat), g.scalar(places)))
    slope = g.emit("Mul", g.emit("Sub", own, aim), g.emit("Div", heat, g.scalar(places)))
    return LossParts(row, partial(g.emit, "Mul", slope))


LOSS = Loss(labels="values", write=_write, copies=6.0, reads_logits=True, setting=_TEMPERATURE, can_mix=False)
