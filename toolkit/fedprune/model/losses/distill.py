"""T² · KL(softmax(y / T) ‖ softmax(z / T)) over classes, mean over positions. y: a teacher's logits, z: the model's.

Its derivative is T · (softmax(z / T) − softmax(y / T)): cross-entropy with the teacher's softened shares, less its own
entropy, so that the minimum is 0; T² keeps the size of gradients (Hinton, Vinyals and Dean, "Distilling the knowledge
in a neural network", arXiv:1503.02531, Sec. 2).
"""

from __future__ import annotations

import math
from functools import partial

from fedprune.core.errors import ModelError, shape_text
from fedprune.model.loss import Loss, LossGraphWriter, LossParts, LossTerms, Shape, Y

_TEMPERATURE = "distill_temperature"


def _write(g: LossGraphWriter, logits: str, outputs: Shape, terms: LossTerms) -> LossParts:
    if outputs[0] < 2:
        raise ModelError(
            "outputs of a model with loss distill",
            expected="[n, classes, ...], with two classes or more",
            got=shape_text("n", *outputs),
        )
    temperature, positions = _TEMPERATURE, math.prod(outputs[1:])
    student, teacher = (g.emit("Div", value, temperature) for value in (logits, Y))
    student_shares, teacher_shares = (g.emit("Softmax", value, attrs={"axis": 1}) for value in (student, teacher))
    student_logs, teacher_logs = (g.emit("LogSoftmax", value, attrs={"axis": 1}) for value in (student, teacher))
    divergence = g.emit("Mul", teacher_shares, g.emit("Sub", teacher_logs, student_logs))
    row = g.emit("ReduceSum", divergence, g.ints(*range(1, len(outputs) + 1)), attrs={"keepdims": 1})
    row = g.emit("Mul", row, g.emit("Div", g.emit("Mul", temperature, temperature), g.scalar(positions)))
    slope = g.emit(
        "Mul", g.emit("Sub", student_shares, teacher_shares), g.emit("Div", temperature, g.scalar(positions))
    )
    return LossParts(row, partial(g.emit, "Mul", slope))


LOSS = Loss(labels="values", write=_write, copies=4.0, reads_logits=True, setting=_TEMPERATURE, can_mix=False)
