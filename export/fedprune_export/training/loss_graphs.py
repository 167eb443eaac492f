"""Built-in losses that are graphs of outputs and labels, differentiated as a model is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedprune.core.errors import ModelError, shape_text
from fedprune.model.architecture import Architecture
from fedprune.model.recipe import Features
from fedprune.model.step_contract import LOGITS, LOSS, Y
from fedprune_export.ir.graph import Graph, Port
from fedprune_export.pruning.model import Model

_SMOOTH = 1.0
"""Added to both sides of an overlap, so that a class without any place has none to lose."""

_TEMPERATURE = 0.1

_NEVER = -1e30
"""In place of the logarithm of 0: sums of it stay finite."""

_MOST_STEPS = 512
"""Steps of a sequence for CTC, whose graph has some 30 operators for each."""


def focal(outputs: tuple[int, ...]) -> Model:
    """Focal loss of every label, from logits: (p − y)² times the cross-entropy, the mean over a sample's labels.

    For labels 0 and 1 it is that of Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 4, with γ = 2;
    in between that of Li et al., "Generalized focal loss", NeurIPS 2020, eq. 6.
    """
    g = _begun(outputs)
    far = g.emit("Sub", g.emit("Sigmoid", LOGITS), Y)
    # −log of a sigmoid is a softplus, which keeps its digits where the sigmoid is 1.
    present = g.emit("Mul", Y, g.emit("Softplus", g.emit("Neg", LOGITS)))
    absent = g.emit("Mul", g.emit("Sub", g.scalar(1), Y), g.emit("Softplus", LOGITS))
    return _ended(g, g.emit("Mul", g.emit("Mul", far, far), g.emit("Add", present, absent)), outputs)


def dice(outputs: tuple[int, ...]) -> Model:
    """1 − the overlap of masks, from logits, the mean over classes: (2 Σ p·y + 1) / (Σ p + Σ y + 1), with sums over a
    sample's places (Milletari et al., "V-Net", 3DV 2016, with sums in place of squares)."""
    g = _begun(outputs)
    share, places = g.emit("Sigmoid", LOGITS), list(range(2, len(outputs) + 1))

    def total(value: str) -> str:
        return g.emit("ReduceSum", value, g.ints(*places), attrs={"keepdims": 0}) if places else value

    both = g.emit("Add", g.emit("Mul", total(g.emit("Mul", share, Y)), g.scalar(2)), g.scalar(_SMOOTH))
    either = g.emit("Add", g.emit("Add", total(share), total(Y)), g.scalar(_SMOOTH))
    lost = g.emit("Sub", g.scalar(1), g.emit("Div", both, either))
    return _ended(g, lost, outputs[:1], outputs)


def infonce(outputs: tuple[int, ...]) -> Model:
    """−log of the softmax by which a row of a batch picks the rows that belong to it among all others, by their cosines
    over τ = 0.1: the mean over those with the same label, and 0 without any.

    Outputs are one row per sample [D], or one per view of it [V, D], whose views belong together, too. It is the
    supervised contrastive loss (Khosla et al., NeurIPS 2020, eq. 2); with two views and another label for every sample
    it is NT-Xent (Chen et al., "SimCLR", ICML 2020, eq. 1), with labels of classes it brings classes together.
    """
    if len(outputs) > 2:
        raise _unfit("infonce", "[n, D], or [n, views, D]", outputs)
    g = _begun(outputs, "infonce")
    rows, label = LOGITS, Y
    if len(outputs) == 2:
        rows = g.emit("Reshape", LOGITS, g.ints(-1, outputs[1]))
        repeated = g.emit("Expand", g.emit("Unsqueeze", Y, g.ints(1)), g.ints(1, outputs[0]))
        label = g.emit("Reshape", repeated, g.ints(-1))
    itself, alike, _ = _pairs(g, label)
    unit = g.emit("LpNormalization", rows, attrs={"axis": -1, "p": 2})
    near = g.emit("MatMul", g.emit("Mul", unit, g.scalar(1 / _TEMPERATURE)), g.emit("Transpose", unit))
    chances = g.emit("LogSoftmax", g.emit("Where", itself, g.scalar(_NEVER), near), attrs={"axis": -1})
    total = g.emit("ReduceSum", g.emit("Where", alike, chances, g.scalar(0)), g.ints(1), attrs={"keepdims": 0})
    count = g.emit("ReduceSum", g.emit("Cast", alike, attrs={"to": 1}), g.ints(1), attrs={"keepdims": 0})
    each = g.emit("Neg", g.emit("Div", total, g.emit("Max", count, g.scalar(1))))
    if len(outputs) == 1:
        return _ended(g, each, (), outputs)
    return _ended(g, g.emit("Reshape", each, g.ints(-1, outputs[0])), outputs[:1], outputs)


def triplet(outputs: tuple[int, ...]) -> Model:
    """log(1 + e^(p − n)) with Euclidean distances p to the farthest sample of the batch with the same label, and n to
    the nearest with another: batch hard with a soft margin (Hermans et al., "In defense of the triplet loss",
    arXiv:1703.07737, eq. 5 and Sec. 2). A sample that lacks either has a loss of 0."""
    if len(outputs) > 1:
        raise _unfit("triplet", "[n, D]", outputs)
    g = _begun(outputs, "triplet")
    _, alike, other = _pairs(g, Y)
    # Which are the hardest is found from products; their distances are then computed from differences, which are exact.
    centred = g.emit("Sub", LOGITS, g.emit("ReduceMean", LOGITS, attrs={"axes": [0], "keepdims": 1}))
    squares = g.emit("ReduceSum", g.emit("Mul", centred, centred), g.ints(1), attrs={"keepdims": 1})
    products = g.emit("MatMul", centred, g.emit("Transpose", centred))
    far = g.emit("Sub", g.emit("Transpose", squares), g.emit("Mul", products, g.scalar(2)))  # without the row's own
    number = g.emit("Unsqueeze", _numbers(g, Y), g.ints(0))

    def distance(among: str, op: str, excluded: float) -> str:
        hardest = g.emit(op, g.emit("Where", among, far, g.scalar(excluded)), attrs={"axis": 1, "keepdims": 1})
        picked = g.emit("MatMul", g.emit("Cast", g.emit("Equal", hardest, number), attrs={"to": 1}), LOGITS)
        return g.emit("ReduceL2", g.emit("Sub", LOGITS, picked), attrs={"axes": [1], "keepdims": 0})

    lost = g.emit("Softplus", g.emit("Sub", distance(alike, "ArgMax", _NEVER), distance(other, "ArgMin", -_NEVER)))
    both = [
        g.emit("ReduceMax", g.emit("Cast", m, attrs={"to": 1}), attrs={"axes": [1], "keepdims": 0})
        for m in (alike, other)
    ]
    counts = g.emit("Greater", g.emit("Mul", *both), g.scalar(0))
    return _ended(g, g.emit("Where", counts, lost, g.scalar(0)), (), outputs)


def ctc(outputs: tuple[int, ...], ignored: int | None = None) -> Model:
    """−log of the probability of a sequence of labels, over all its alignments to the outputs' steps (Graves et al.,
    "Connectionist temporal classification", ICML 2006, eq. 6 to 8), in logarithms; the blank is class 0.

    Outputs are logits [classes, steps]. A sample's labels are as many as there are steps, the sequence first, then
    zeros. A sequence that has no alignment, because it is too long, has a loss of 0 (torch's `zero_infinity`). Steps
    whose label is `ignored` are after a sample's end: they are blanks for certain, which changes no alignment.
    """
    if len(outputs) != 2 or outputs[1] > _MOST_STEPS or outputs[0] < 2:
        raise _unfit("ctc", f"[n, classes, steps], with at most {_MOST_STEPS} steps", outputs)
    steps = outputs[1]
    states = 2 * steps + 1  # a blank, the first label, a blank, the second label, ..., a blank
    g = _begun(outputs, "ctc")
    order = [0 if s % 2 == 0 else s // 2 + 1 for s in range(states)]
    sequence, chances = Y, g.emit("LogSoftmax", LOGITS, attrs={"axis": 1})
    if ignored is not None:
        after = g.emit("Equal", Y, g.constant(ignored, np.int64))
        sequence = g.emit("Where", after, g.constant(0, np.int64), Y)
        blank = np.array([[[0.0]], *[[[_NEVER]]] * (outputs[0] - 1)]).reshape(1, -1, 1)
        chances = g.emit("Where", g.emit("Unsqueeze", after, g.ints(1)), g.constant(blank, np.float32), chances)
    label = g.emit(
        "Gather", g.emit("Pad", sequence, g.ints(0, 1, 0, 0)), g.constant(order, np.int64), attrs={"axis": 1}
    )
    before = g.emit("Gather", label, g.constant([max(0, s - 2) for s in range(states)], np.int64), attrs={"axis": 1})
    # A label that isn't the one before is reached from there, without the blank between; states of blanks never are.
    direct = g.emit("Where", g.emit("Equal", label, before), g.scalar(_NEVER), g.scalar(0))
    # From the same state, from the one before, and directly.
    ways = g.emit("Pad", g.emit("Unsqueeze", direct, g.ints(2, 3)), g.ints(0, 0, 2, 0, 0, 0, 0, 0))
    place = g.emit("Expand", g.emit("Unsqueeze", label, g.ints(2)), g.ints(1, 1, steps))
    of_states = g.emit("GatherElements", chances, place, attrs={"axis": 1})
    at = (
        [of_states]
        if steps == 1
        else g.emit_many("Split", of_states, g.ints(*[1] * steps), outputs=steps, attrs={"axis": 2})
    )
    first = np.full((1, states, 1), _NEVER, np.float32)
    first[0, :2] = 0
    reached = g.emit("Add", at[0], g.constant(first, np.float32))
    sources = g.constant([[s + 2, s + 1, s] for s in range(states)], np.int64)
    for now in at[1:]:
        earlier = g.emit("Pad", reached, g.ints(0, 2, 0, 0, 0, 0), g.scalar(_NEVER))
        from_each = g.emit("Add", g.emit("Gather", earlier, sources, attrs={"axis": 1}), ways)
        reached = g.emit("Add", g.emit("ReduceLogSumExp", from_each, attrs={"axes": [2], "keepdims": 0}), now)
    length = g.emit(
        "ReduceSum",
        g.emit("Cast", g.emit("Greater", sequence, g.constant(0, np.int64)), attrs={"to": 1}),
        g.ints(1),
        attrs={"keepdims": 1},
    )
    beyond = g.emit("Sub", g.constant(np.arange(states)[None], np.float32), g.emit("Mul", length, g.scalar(2)))
    last = g.emit("And", g.emit("Less", beyond, g.scalar(0.5)), g.emit("Greater", beyond, g.scalar(-1.5)))
    ends = g.emit("Where", last, g.emit("Squeeze", reached, g.ints(2)), g.scalar(_NEVER))
    lost = g.emit("Neg", g.emit("ReduceLogSumExp", ends, attrs={"axes": [1], "keepdims": 0}))
    aligned = g.emit("Less", lost, g.scalar(-_NEVER / 10))
    return _ended(g, g.emit("Where", aligned, lost, g.scalar(0)), (), outputs)


LOSS_GRAPHS: dict[str, Callable[[tuple[int, ...]], Model]] = {
    "focal": focal,
    "dice": dice,
    "infonce": infonce,
    "triplet": triplet,
    "ctc": ctc,
}


def _begun(outputs: tuple[int, ...], loss: str = "focal") -> Graph:
    features, g = Features(loss=loss), Graph(name="loss")
    labels = features.target_shape(outputs)
    g.inputs = [
        Port(LOGITS, np.dtype(np.float32), ("N", *outputs)),
        Port(Y, np.dtype(np.int64 if features.counts else np.float32), ("N", *labels)),
    ]
    return g


def _unfit(loss: str, expected: str, outputs: tuple[int, ...]) -> ModelError:
    return ModelError(f"outputs of a model with loss {loss}", expected=expected, got=shape_text("n", *outputs))


def _numbers(g: Graph, label: str) -> str:
    """0, 1, 2, ... for the rows of a batch whose labels are [rows]."""
    ones = g.emit("Add", g.emit("Mul", label, g.constant(0, np.int64)), g.constant(1, np.int64))
    return g.emit("CumSum", ones, g.constant(0, np.int64), attrs={"exclusive": 1})


def _pairs(g: Graph, label: str) -> tuple[str, str, str]:
    """Which pairs of rows [rows, rows] are a row with itself, others with the same label, and with another one."""

    def equal(value: str) -> str:
        return g.emit("Equal", g.emit("Unsqueeze", value, g.ints(1)), g.emit("Unsqueeze", value, g.ints(0)))

    itself, same = equal(_numbers(g, label)), equal(label)
    return itself, g.emit("And", same, g.emit("Not", itself)), g.emit("Not", same)


def _ended(g: Graph, each: str, shape: tuple[int, ...], outputs: tuple[int, ...] | None = None) -> Model:
    """The mean of losses [N, *shape] over all axes but the first."""
    if shape:
        g.emit("ReduceMean", each, attrs={"axes": list(range(1, len(shape) + 1)), "keepdims": 0}, out=LOSS)
    else:
        g.emit("Identity", each, out=LOSS)
    g.outputs = [Port(LOSS, np.dtype(np.float32), ("N",))]
    return Model(g, Architecture("loss", (), (), (), (), outputs or shape, ()))
