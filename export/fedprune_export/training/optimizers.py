"""From gradients to the next weights: proximal pull, clipping, the optimisers of torch.optim, and Lion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedprune.model import step_contract
from fedprune.model.recipe import Features
from fedprune_export.autodiff.tape import Shape, Tape, port
from fedprune_export.ir.graph import Graph

_TINY = float(np.finfo(np.float32).tiny)
"""Least denominator of the surrogate: where weight and threshold are both 0 there is nothing to divide."""


def used(g: Graph, name: str, features: Features) -> str:
    """The value that the forward pass reads: w · mask, and with a threshold w · 1[|w| ≥ θ]."""
    value = name
    if features.element_mask:
        value = g.emit("Mul", value, step_contract.mask(name))
    if features.threshold:
        value = g.emit("Where", _active(g, name), value, g.scalar(0))
    return value


def passed(g: Graph, name: str, gradient: str, features: Features) -> str:
    """The gradient by a tensor, of that by what the forward pass read, where the data loss alone is concerned.

    With a threshold, the step 1[|w| ≥ θ] is taken to rise by 2θ/(|w| + θ)² per unit of |w| where it is 1, and not at
    all where it is 0 (FIARSE, Wu et al., NeurIPS 2024), so that ∂L/∂w = g · 1[|w| ≥ θ] · (1 + 2θ|w|/(|w| + θ)²). A
    mask is left to the code that sums the gradients.
    """
    if not features.threshold:
        return gradient
    size = g.emit("Abs", name)
    theta = step_contract.threshold(name)
    whole = g.emit("Max", g.emit("Add", size, theta), g.scalar(_TINY))
    # Two quotients, since the square of the sum of two small numbers would be 0.
    rise = g.emit("Mul", g.emit("Div", size, whole), g.emit("Div", g.emit("Mul", theta, g.scalar(2)), whole))
    slope = g.emit("Add", rise, g.scalar(1))
    return g.emit("Where", _active(g, name), g.emit("Mul", gradient, slope), g.scalar(0))


def _active(g: Graph, name: str) -> str:
    return g.emit("GreaterOrEqual", g.emit("Abs", name), step_contract.threshold(name))


_CLIP_EPSILON = 1e-6  # torch.nn.utils.clip_grad_norm_ adds it to the norm


@dataclass(frozen=True)
class Trained:
    """A tensor that is trained, and its symbolic shape."""

    name: str
    shape: Shape


def add_inputs(g: Graph, tensors: Sequence[Trained], features: Features) -> None:
    """Give the graph the inputs of the optimiser: its numbers, and what every tensor brings besides itself."""
    g.inputs.append(port(step_contract.LR, ()))
    if features.optimizer == "sgd":
        g.inputs.append(port(step_contract.MOMENTUM, ()))
    g.inputs.append(port(step_contract.WEIGHT_DECAY, ()))
    if features.optimizer != "sgd":
        g.inputs += [port(beta, (), np.float64) for beta in (step_contract.BETA1, step_contract.BETA2)]
    if features.optimizer in ("adam", "adamw"):
        g.inputs += [port(step_contract.EPSILON, ()), port(step_contract.STEP_NUMBER, (), np.int64)]
    if features.clip:
        g.inputs.append(port(step_contract.CLIP_NORM, ()))
    arrays = [*step_contract.states(features.optimizer)]
    arrays += [step_contract.anchor] * features.proximal + [step_contract.mask] * features.element_mask
    arrays += [step_contract.total] * features.accumulate
    for tensor in tensors:
        g.inputs += [port(array(tensor.name), tensor.shape) for array in arrays]
        scalars = [step_contract.strength] * features.proximal + [step_contract.threshold] * features.threshold
        g.inputs += [port(scalar(tensor.name), ()) for scalar in scalars]


def write_updates(g: Graph, tape: Tape, tensors: Sequence[Trained], features: Features) -> None:
    """Write every tensor's next value and state from the gradients on the tape."""
    gradients = [_objective(g, tape, tensor, features) for tensor in tensors]
    if features.clip:
        gradients = _clipped(g, gradients)
    update = _UPDATES[features.optimizer](g)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        name = tensor.name
        mask = step_contract.mask(name) if features.element_mask else ""
        target = step_contract.following(name)
        if mask:
            kept = g.emit("Greater", mask, g.scalar(0))
            g.emit("Where", kept, update(tensor, gradient, mask, None), name, out=target)
        else:
            update(tensor, gradient, mask, target)
        arrays = [name, *(state(name) for state in step_contract.states(features.optimizer))]
        g.outputs += [port(step_contract.following(n), tensor.shape) for n in arrays]


def _objective(g: Graph, tape: Tape, tensor: Trained, features: Features) -> str:
    """The gradient of the whole objective by a tensor; sums are of the data loss's alone."""
    name, shape = tensor.name, tensor.shape
    gradient = tape.gradient(name) or g.emit("ConstantOfShape", tape.shape_of(name))
    gradient = passed(g, name, gradient, features)
    if features.accumulate:
        so_far = step_contract.following(step_contract.total(name))
        gradient = g.emit("Add", step_contract.total(name), gradient, out=so_far)
        g.outputs.append(port(so_far, shape))
    if features.proximal:
        pull = g.emit("Mul", g.emit("Sub", name, step_contract.anchor(name)), step_contract.strength(name))
        gradient = g.emit("Add", gradient, pull)
    if features.element_mask:
        gradient = g.emit("Mul", gradient, step_contract.mask(name))
    if features.gradients:
        gradient = g.emit("Identity", gradient, out=step_contract.gradient(name))
        g.outputs.append(port(step_contract.gradient(name), shape))
    return gradient


def _clipped(g: Graph, gradients: Sequence[str]) -> list[str]:
    """All gradients times min(1, clip_norm / (norm + 1e-6)), with the norm of all of them together."""
    squares = [g.emit("ReduceSumSquare", x, attrs={"keepdims": 0}) for x in gradients]
    norm = g.emit("Sqrt", g.emit("Sum", *squares))
    share = g.emit("Div", step_contract.CLIP_NORM, g.emit("Add", norm, g.scalar(_CLIP_EPSILON)))
    share = g.emit("Min", share, g.scalar(1))
    return [g.emit("Mul", x, share) for x in gradients]


_Update = Callable[[Trained, str, str, "str | None"], str]
"""Takes a tensor, its gradient and its mask (or nothing), writes its state and returns the tensor as it is then, by the
name that is given."""


def _sgd(g: Graph) -> _Update:
    """g += wd · w; buf = m · buf + g; w −= lr · buf (torch.optim.SGD)."""

    def update(tensor: Trained, gradient: str, mask: str, out: str | None) -> str:
        name, state = tensor.name, step_contract.buffer(tensor.name)
        gradient = g.emit("Add", gradient, g.emit("Mul", name, step_contract.WEIGHT_DECAY))
        if mask:
            gradient = g.emit("Mul", gradient, mask)
        old = g.emit("Mul", state, step_contract.MOMENTUM)
        moved = g.emit("Add", old, gradient, out=step_contract.following(state))
        return g.emit("Sub", name, g.emit("Mul", moved, step_contract.LR), out=out)

    return update


def _adam(g: Graph, *, decoupled: bool) -> _Update:
    """torch.optim.Adam, with `decoupled` torch.optim.AdamW.

    g += wd · w (Adam only); m = β1·m + (1 − β1)·g; v = β2·v + (1 − β2)·g²;
    w −= lr/(1 − β1^t) · m / (√v/√(1 − β2^t) + ε), with AdamW also lr · wd · w.
    """

    number, one = g.emit("Cast", step_contract.STEP_NUMBER, attrs={"to": 11}), g.constant(1, np.float64)
    (keep1, take1), (keep2, take2) = (_shares(g, beta) for beta in (step_contract.BETA1, step_contract.BETA2))
    bias1, bias2 = (
        g.emit("Sub", one, g.emit("Pow", beta, number)) for beta in (step_contract.BETA1, step_contract.BETA2)
    )
    pace = _single(g, g.emit("Div", g.emit("Cast", step_contract.LR, attrs={"to": 11}), bias1))
    root = _single(g, g.emit("Sqrt", bias2))
    shrink = g.emit("Mul", step_contract.LR, step_contract.WEIGHT_DECAY) if decoupled else ""

    def update(tensor: Trained, gradient: str, mask: str, out: str | None) -> str:
        name = tensor.name
        if not decoupled:
            gradient = g.emit("Add", gradient, g.emit("Mul", name, step_contract.WEIGHT_DECAY))
            gradient = g.emit("Mul", gradient, mask) if mask else gradient
        first, second = step_contract.buffer(name), step_contract.second(name)
        fresh = g.emit("Mul", gradient, take1)
        mean = g.emit("Add", g.emit("Mul", first, keep1), fresh, out=step_contract.following(first))
        fresh = g.emit("Mul", g.emit("Mul", gradient, gradient), take2)
        square = g.emit("Add", g.emit("Mul", second, keep2), fresh, out=step_contract.following(second))
        spread = g.emit("Add", g.emit("Div", g.emit("Sqrt", square), root), step_contract.EPSILON)
        change = g.emit("Mul", g.emit("Div", mean, spread), pace)
        change = g.emit("Add", change, g.emit("Mul", name, shrink)) if decoupled else change
        return g.emit("Sub", name, change, out=out)

    return update


def _lion(g: Graph) -> _Update:
    """w −= lr · (sign(β1·m + (1 − β1)·g) + wd · w); m = β2·m + (1 − β2)·g (Chen et al., "Symbolic discovery of
    optimization algorithms", NeurIPS 2023, Alg. 2)."""
    (keep1, take1), (keep2, take2) = (_shares(g, beta) for beta in (step_contract.BETA1, step_contract.BETA2))

    def update(tensor: Trained, gradient: str, mask: str, out: str | None) -> str:
        name, state = tensor.name, step_contract.buffer(tensor.name)
        meant = g.emit("Add", g.emit("Mul", state, keep1), g.emit("Mul", gradient, take1))
        kept, fresh = g.emit("Mul", state, keep2), g.emit("Mul", gradient, take2)
        g.emit("Add", kept, fresh, out=step_contract.following(state))
        change = g.emit("Add", g.emit("Sign", meant), g.emit("Mul", name, step_contract.WEIGHT_DECAY))
        return g.emit("Sub", name, g.emit("Mul", change, step_contract.LR), out=out)

    return update


def _shares(g: Graph, beta: str) -> tuple[str, str]:
    """β and 1 − β in float32; numbers near 1 lose too many digits in float32 differences."""
    return _single(g, beta), _single(g, g.emit("Sub", g.constant(1, np.float64), beta))


def _single(g: Graph, value: str) -> str:
    return g.emit("Cast", value, attrs={"to": 1})


_UPDATES: dict[str, Callable[[Graph], _Update]] = {
    "sgd": _sgd,
    "adam": partial(_adam, decoupled=False),
    "adamw": partial(_adam, decoupled=True),
    "lion": _lion,
}
