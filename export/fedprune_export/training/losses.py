"""Losses of a training step, with their gradient by the logits: torch's functions of the same names, and the model's
own."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedprune.core.errors import ModelError, shape_text
from fedprune.model import step_contract
from fedprune.model.recipe import DISTILL, LOSSES, MULTI, Features
from fedprune_export.autodiff.tape import BATCH, Shape, Tape, port
from fedprune_export.ir.graph import Graph
from fedprune_export.operators.reductions import elements_of
from fedprune_export.pruning.model import Model


@dataclass(frozen=True)
class _Parts:
    """A loss: Σ row·weight over the divisor.

    Attributes:
        row: Loss of every label [N, 1, ...], or of every sample: [N, 1, 1, ...], or [N] for the model's own.
        gradient: Its gradient by the logits [N, K, ...], times a number or weights of `row`'s shape, by their name.
        weight: Weights that go with `row`, or empty.
        divisor: What the sum is divided by, or empty for the number of labels.
    """

    row: str
    gradient: Callable[[str], str]
    weight: str = ""
    divisor: str = ""


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
        g.inputs.append(port(step_contract.LOGIT_OFFSET, outputs[:1]))
        logits = g.emit("Add", logits, _along_classes(g, step_contract.LOGIT_OFFSET, outputs))
    if features.class_mask:
        g.inputs.append(port(step_contract.CLASS_MASK, outputs[:1]))
        mask = _along_classes(g, step_contract.CLASS_MASK, outputs)
        present = g.emit("Greater", mask, g.scalar(0))
        logits = g.emit("Where", present, logits, g.scalar(0))
    if features.class_weight:
        g.inputs.append(port(step_contract.CLASS_WEIGHT, outputs[:1]))
    if setting := LOSSES[features.loss].setting:
        g.inputs.append(port(setting, ()))
    parts = _WRITERS[features.loss](g, logits, outputs, features) if own is None else _of_graph(g, logits, own)
    if LOSSES[features.loss].labels == MULTI:
        right = g.emit("Greater", step_contract.Y, g.scalar(0.5))
        count_hits(g, g.emit("Equal", g.emit("Greater", logits, g.scalar(0)), right))
    share = _share(g, parts, features)
    g.emit("ReduceSum", g.emit("Mul", parts.row, share), attrs={"keepdims": 0}, out=step_contract.LOSS)
    gradient = parts.gradient(share)
    # Logits of masked classes were replaced, so that no gradient passes them.
    return g.emit("Where", present, gradient, g.scalar(0)) if present else gradient


def _along_classes(g: Graph, vector: str, outputs: tuple[int, ...]) -> str:
    """A vector over classes [K] as [K, 1, ...], which goes along axis 1 of the outputs."""
    further = range(1, len(outputs))
    return g.emit("Unsqueeze", vector, g.ints(*further)) if further else vector


def _classes(g: Graph, outputs: tuple[int, ...]) -> str:
    """Numbers of the classes along axis 1 of the outputs."""
    return g.constant(np.arange(outputs[0]).reshape(1, -1, *[1] * (len(outputs) - 1)), np.int64)


def _share(g: Graph, parts: _Parts, features: Features) -> str:
    """By what the losses of labels are multiplied: of `row`'s shape, or []."""
    divisor = parts.divisor
    if features.accumulate:
        g.inputs.append(port(step_contract.DIVISOR, ()))
        divisor = step_contract.DIVISOR
    elif not parts.weight and not divisor:
        divisor = elements_of(g, parts.row)
    return g.emit("Div", parts.weight, divisor) if parts.weight else g.emit("Reciprocal", divisor)


def _of_graph(g: Graph, logits: str, loss: Model) -> _Parts:
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

    return _Parts(row, gradient)


def _cross_entropy(g: Graph, logits: str, outputs: tuple[int, ...], features: Features) -> _Parts:
    """Cross-entropy with class labels; hits are labels whose logit is the largest of its place.

    With smoothing ε, a_c = (1 − ε)·w_y·[c = y] + ε/K·w_c: the loss is −Σ a_c·log p_c, its slope p·Σa − a. With mixup,
    w_y·[c = y] is λ·w_y·[c = y] + (1 − λ)·w_y'·[c = y']; because partners' labels are the same ones in another order,
    their weights add up to the same divisor, and the loss is λ·CE(y) + (1 − λ)·CE(y') (Zhang et al. 2018, eq. 2).
    """
    label = g.emit("Unsqueeze", step_contract.Y, g.ints(1))
    counts = counted = ""
    if features.ignore_label is not None:
        counts = g.emit("Not", g.emit("Equal", step_contract.Y, g.constant(features.ignore_label, np.int64)))
        label = g.emit("Where", g.emit("Unsqueeze", counts, g.ints(1)), label, g.constant(0, np.int64))
        counted = g.emit("Cast", g.emit("Unsqueeze", counts, g.ints(1)), attrs={"to": 1})
    is_label = g.emit("Equal", label, _classes(g, outputs))
    log_probability = g.emit("LogSoftmax", logits, attrs={"axis": 1})
    probability = g.emit("Softmax", logits, attrs={"axis": 1})
    expected = g.emit("Cast", is_label, attrs={"to": 1})
    guess = g.emit("ArgMax", logits, attrs={"axis": 1, "keepdims": 0})
    meant = step_contract.Y
    if features.mixup:
        g.inputs += [port(step_contract.Y_PARTNER, (BATCH, *outputs[1:]), np.int64), port(step_contract.Y_SHARE, ())]
        minor = g.emit("Less", step_contract.Y_SHARE, g.scalar(0.5))
        meant = g.emit("Where", minor, step_contract.Y_PARTNER, step_contract.Y)
    right = g.emit("Equal", guess, meant)
    count_hits(g, g.emit("And", right, counts) if counts else right)
    weight = g.emit("Gather", step_contract.CLASS_WEIGHT, label) if features.class_weight else ""
    whole = g.emit("Mul", weight, counted) if weight and counted else weight or counted
    divisor = g.emit("ReduceSum", whole, attrs={"keepdims": 0}) if whole else ""
    if counted:  # of a batch without any label that counts the loss is 0
        divisor = g.emit("Where", g.emit("Equal", divisor, g.scalar(0)), g.scalar(1), divisor)
    if not features.mixup and not features.label_smoothing:
        own = g.emit("Where", is_label, log_probability, g.scalar(0))
        row = g.emit("Neg", g.emit("ReduceSum", own, g.ints(1), attrs={"keepdims": 1}))
        return _Parts(row, partial(g.emit, "Mul", g.emit("Sub", probability, expected)), whole, divisor)
    if features.mixup:
        aim = _mixed(g, expected, weight, outputs)
        if features.label_smoothing:
            kept, spread = _smoothing(g, outputs, features, "")
            aim = g.emit("Add", g.emit("Mul", aim, kept), spread)
    else:
        kept, spread = _smoothing(g, outputs, features, weight)
        aim = g.emit("Add", g.emit("Mul", expected, kept), spread)
    return _towards(g, g.emit("Mul", aim, counted) if counted else aim, probability, log_probability, divisor)


def _mixed(g: Graph, expected: str, weight: str, outputs: tuple[int, ...]) -> str:
    """The target distribution of two labels and their shares [N, K, ...].

    Args:
        expected: 1 where a class is the label, else 0.
        weight: The weight of each label [N, 1, ...], or empty.
    """
    partner = g.emit("Unsqueeze", step_contract.Y_PARTNER, g.ints(1))
    is_partner = g.emit("Equal", partner, _classes(g, outputs))
    own, other = step_contract.Y_SHARE, g.emit("Sub", g.scalar(1), step_contract.Y_SHARE)
    if weight:
        own = g.emit("Mul", own, weight)
        other = g.emit("Mul", other, g.emit("Gather", step_contract.CLASS_WEIGHT, partner))
    mixed_in = g.emit("Cast", is_partner, attrs={"to": 1})
    return g.emit("Add", g.emit("Mul", expected, own), g.emit("Mul", mixed_in, other))


def _smoothing(g: Graph, outputs: tuple[int, ...], features: Features, weight: str) -> tuple[str, str]:
    """By what labels are multiplied, [] or with their weights [N, 1, ...], and what every class gets of them: [] or
    [K, 1, ...]."""
    g.inputs.append(port(step_contract.LABEL_SMOOTHING, ()))
    kept = g.emit("Sub", g.scalar(1), step_contract.LABEL_SMOOTHING)
    spread = g.emit("Div", step_contract.LABEL_SMOOTHING, g.scalar(outputs[0]))
    if weight:
        kept = g.emit("Mul", kept, weight)
    if features.class_weight:
        spread = g.emit("Mul", spread, _along_classes(g, step_contract.CLASS_WEIGHT, outputs))
    return kept, spread


def _towards(g: Graph, aim: str, probability: str, log_probability: str, divisor: str) -> _Parts:
    """Cross-entropy with any aim [N, K, ...]."""
    row = g.emit("Neg", g.emit("ReduceSum", g.emit("Mul", aim, log_probability), g.ints(1), attrs={"keepdims": 1}))
    whole = g.emit("ReduceSum", aim, g.ints(1), attrs={"keepdims": 1})
    slope = g.emit("Sub", g.emit("Mul", probability, whole), aim)
    return _Parts(row, partial(g.emit, "Mul", slope), "", divisor)


def _bce(g: Graph, logits: str, outputs: tuple[int, ...], features: Features) -> _Parts:
    """Binary cross-entropy of every label, from logits.

    With positive weight p: (1 − y)·softplus(x) + p·y·softplus(−x), its slope (1 − y)·σ(x) − p·y·σ(−x). All of it is
    written with e = exp(−|x|) and without differences, so that small losses keep their digits.
    """
    zero, one = g.scalar(0), g.scalar(1)
    e = g.emit("Exp", g.emit("Neg", g.emit("Abs", logits)))
    above = g.emit("Add", one, e)
    # log(1 + e) where the sum rounds e off: log(u)·e/(u − 1), in which the rounding of u cancels.
    rounded = g.emit("Sub", above, one)
    lost = g.emit("Equal", rounded, zero)
    exact = g.emit("Div", g.emit("Mul", g.emit("Log", above), e), g.emit("Where", lost, one, rounded))
    soft = g.emit("Where", lost, e, exact)
    positive = g.emit("Greater", logits, zero)
    absent, present = g.emit("Sub", one, step_contract.Y), step_contract.Y
    if features.class_weight:
        present = g.emit("Mul", present, _along_classes(g, step_contract.CLASS_WEIGHT, outputs))

    def side(load: str, x: str, up: str, down: str) -> tuple[str, str]:
        """A kind of labels' loss and the size of its slope."""
        softplus = g.emit("Add", soft, g.emit("Relu", x))
        sigma = g.emit("Div", g.emit("Where", positive, up, down), above)
        return g.emit("Mul", load, softplus), g.emit("Mul", load, sigma)

    of_absent, down = side(absent, logits, one, e)
    of_present, up = side(present, g.emit("Neg", logits), e, one)
    each, slope = g.emit("Add", of_absent, of_present), g.emit("Sub", down, up)
    return _mean(g, each, slope, outputs)


def _mse(g: Graph, logits: str, outputs: tuple[int, ...], features: Features) -> _Parts:
    """Squared error of every output: d², slope 2·d."""
    d = g.emit("Sub", logits, step_contract.Y)
    return _mean(g, g.emit("Mul", d, d), g.emit("Mul", d, g.scalar(2)), outputs)


def _huber(g: Graph, logits: str, outputs: tuple[int, ...], features: Features) -> _Parts:
    """Huber's error of every output: with c = min(|d|, δ) it is c·(|d| − c/2), its slope d within ±δ."""
    d = g.emit("Sub", logits, step_contract.Y)
    size = g.emit("Abs", d)
    c = g.emit("Min", size, "huber_delta")
    each = g.emit("Mul", c, g.emit("Sub", size, g.emit("Mul", c, g.scalar(0.5))))
    return _mean(g, each, g.emit("Mul", g.emit("Sign", d), c), outputs)


def _l1(g: Graph, logits: str, outputs: tuple[int, ...], features: Features) -> _Parts:
    """Absolute error of every output: |d|, slope sign(d)."""
    d = g.emit("Sub", logits, step_contract.Y)
    return _mean(g, g.emit("Abs", d), g.emit("Sign", d), outputs)


def _distill(g: Graph, logits: str, outputs: tuple[int, ...], features: Features) -> _Parts:
    """T² · KL(softmax(y / T) ‖ softmax(z / T)) over classes, the mean over places; labels are a teacher's outputs.

    Its slope is T · (softmax(z / T) − softmax(y / T)): cross-entropy with the teacher's softened shares, less its own
    entropy, so that 0 is the least; T² keeps the size of gradients (Hinton, Vinyals and Dean, "Distilling the knowledge
    in a neural network", arXiv:1503.02531, Sec. 2).
    """
    if outputs[0] < 2:
        raise ModelError(
            "outputs of a model with loss distill",
            expected="[n, classes, ...], with two classes or more",
            got=shape_text("n", *outputs),
        )
    heat, places = "distill_temperature", math.prod(outputs[1:])
    student, teacher = (g.emit("Div", value, heat) for value in (logits, step_contract.Y))
    own, aim = (g.emit("Softmax", value, attrs={"axis": 1}) for value in (student, teacher))
    log_own, log_aim = (g.emit("LogSoftmax", value, attrs={"axis": 1}) for value in (student, teacher))
    each = g.emit("Mul", aim, g.emit("Sub", log_aim, log_own))
    row = g.emit("ReduceSum", each, g.ints(*range(1, len(outputs) + 1)), attrs={"keepdims": 1})
    row = g.emit("Mul", row, g.emit("Div", g.emit("Mul", heat, heat), g.scalar(places)))
    slope = g.emit("Mul", g.emit("Sub", own, aim), g.emit("Div", heat, g.scalar(places)))
    return _Parts(row, partial(g.emit, "Mul", slope))


_WRITERS = {"cross_entropy": _cross_entropy, "bce": _bce, "mse": _mse, "l1": _l1, "huber": _huber, DISTILL: _distill}


def _mean(g: Graph, each: str, slope: str, outputs: tuple[int, ...]) -> _Parts:
    """Every sample's mean over its outputs."""
    row = g.emit("ReduceMean", each, attrs={"axes": list(range(1, len(outputs) + 1)), "keepdims": 1})
    return _Parts(row, partial(g.emit, "Mul", g.emit("Mul", slope, g.scalar(1 / math.prod(outputs)))))


def count_hits(g: Graph, right: str) -> None:
    g.emit("ReduceSum", g.emit("Cast", right, attrs={"to": 7}), attrs={"keepdims": 0}, out=step_contract.HITS)
    g.outputs.append(port(step_contract.HITS, (), np.int64))
