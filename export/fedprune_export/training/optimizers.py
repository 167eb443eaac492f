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
    read = {name: n for name, n in step_contract.OPTIMIZER_NUMBERS.items() if n.is_read(features)}
    g.inputs += [port(name, (), n.dtype) for name, n in read.items()]
    arrays = [*step_contract.states(features.optimizer)]
    arrays += [step_contract.anchor] * features.proximal + [step_contract.mask] * features.element_mask
    arrays += [step_contract.total] * features.accumulate
    for tensor in tensors:
        g.inputs += [port(array(tensor.name), tensor.shape) for array in arrays]
        scalars = [step_contract.strength] * features.proximal + [step_contract.threshold] * features.threshold
        g.inputs += [port(scalar(tensor.name), ()) for scalar in scalars]


def write_updates(g: Graph, tape: Tape, tensors: Sequence[Trained], features: Features) -> None:
    """Write every tensor's next value and state from the gradients on the tape."""
    fit = _Scalars(g)
    gradients = [_objective(g, tape, tensor, features, fit) for tensor in tensors]
    if features.clip:
        share = _clip_share(g, gradients)
        gradients = [g.emit("Mul", x, fit(share, tensor)) for x, tensor in zip(gradients, tensors, strict=True)]
    update = _UPDATES[features.optimizer](g, fit)
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


class _Scalars:
    """Scalars as a tensor takes them: in its rank where its last dimension is 1, since onnxruntime multiplies an array
    of shape [n, m, 1, 1] by a scalar of shape [] element by element, fifty times slower than by one of shape
    [1, 1, 1, 1]."""

    def __init__(self, g: Graph) -> None:
        self._g = g
        self._made: dict[tuple[str, int], str] = {}

    def __call__(self, scalar: str, tensor: Trained) -> str:
        rank = len(tensor.shape)
        if not rank or tensor.shape[-1] != 1:
            return scalar
        if (scalar, rank) not in self._made:
            self._made[scalar, rank] = self._g.emit("Reshape", scalar, self._g.ints(*[1] * rank))
        return self._made[scalar, rank]


def _objective(g: Graph, tape: Tape, tensor: Trained, features: Features, fit: _Scalars) -> str:
    """The gradient of the whole objective by a tensor; sums are of the data loss's alone."""
    name, shape = tensor.name, tensor.shape
    gradient = tape.gradient(name) or g.emit("ConstantOfShape", tape.shape_of(name))
    gradient = passed(g, name, gradient, features)
    if features.accumulate:
        so_far = step_contract.following(step_contract.total(name))
        gradient = g.emit("Add", step_contract.total(name), gradient, out=so_far)
        g.add_output(so_far, shape)
    if features.proximal:
        moved = g.emit("Sub", name, step_contract.anchor(name))
        pull = g.emit("Mul", moved, fit(step_contract.strength(name), tensor))
        gradient = g.emit("Add", gradient, pull)
    if features.element_mask:
        gradient = g.emit("Mul", gradient, step_contract.mask(name))
    if features.gradients:
        gradient = g.emit("Identity", gradient, out=step_contract.gradient(name))
        g.add_output(step_contract.gradient(name), shape)
    return gradient


def _clip_share(g: Graph, gradients: Sequence[str]) -> str:
    """min(1, clip_norm / (norm + 1e-6)), with the norm of all gradients together."""
    squares = [g.emit("ReduceSumSquare", x, attrs={"keepdims": 0}) for x in gradients]
    norm = g.emit("Sqrt", g.emit("Sum", *squares))
    share = g.emit("Div", step_contract.CLIP_NORM, g.emit("Add", norm, g.scalar(_CLIP_EPSILON)))
    return g.emit("Min", share, g.scalar(1))


_Update = Callable[[Trained, str, str, "str | None"], str]
"""Takes a tensor, its gradient and its mask (or nothing), writes its state and returns the tensor as it is then, by the
name that is given."""


def _sgd(g: Graph, fit: _Scalars) -> _Update:
    """g += wd · w; buf = m · buf + g; w −= lr · buf (torch.optim.SGD)."""

    def update(tensor: Trained, gradient: str, mask: str, out: str | None) -> str:
        name, state = tensor.name, step_contract.buffer(tensor.name)
        gradient = g.emit("Add", gradient, g.emit("Mul", name, fit(step_contract.WEIGHT_DECAY, tensor)))
        if mask:
            gradient = g.emit("Mul", gradient, mask)
        old = g.emit("Mul", state, fit(step_contract.MOMENTUM, tensor))
        moved = g.emit("Add", old, gradient, out=step_contract.following(state))
        return g.emit("Sub", name, g.emit("Mul", moved, fit(step_contract.LR, tensor)), out=out)

    return update


def _adam(g: Graph, fit: _Scalars, *, decoupled: bool) -> _Update:
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
            gradient = g.emit("Add", gradient, g.emit("Mul", name, fit(step_contract.WEIGHT_DECAY, tensor)))
            gradient = g.emit("Mul", gradient, mask) if mask else gradient
        first, second = step_contract.buffer(name), step_contract.second(name)
        fresh = g.emit("Mul", gradient, fit(take1, tensor))
        mean = g.emit("Add", g.emit("Mul", first, fit(keep1, tensor)), fresh, out=step_contract.following(first))
        fresh = g.emit("Mul", g.emit("Mul", gradient, gradient), fit(take2, tensor))
        square = g.emit("Add", g.emit("Mul", second, fit(keep2, tensor)), fresh, out=step_contract.following(second))
        spread = g.emit(
            "Add", g.emit("Div", g.emit("Sqrt", square), fit(root, tensor)), fit(step_contract.EPSILON, tensor)
        )
        change = g.emit("Mul", g.emit("Div", mean, spread), fit(pace, tensor))
        change = g.emit("Add", change, g.emit("Mul", name, fit(shrink, tensor))) if decoupled else change
        return g.emit("Sub", name, change, out=out)

    return update


def _lion(g: Graph, fit: _Scalars) -> _Update:
    """w −= lr · (sign(β1·m + (1 − β1)·g) + wd · w); m = β2·m + (1 − β2)·g (Chen et al., "Symbolic discovery of
    optimization algorithms", NeurIPS 2023, Alg. 2)."""
    (keep1, take1), (keep2, take2) = (_shares(g, beta) for beta in (step_contract.BETA1, step_contract.BETA2))

    def update(tensor: Trained, gradient: str, mask: str, out: str | None) -> str:
        name, state = tensor.name, step_contract.buffer(tensor.name)
        meant = g.emit("Add", g.emit("Mul", state, fit(keep1, tensor)), g.emit("Mul", gradient, fit(take1, tensor)))
        kept, fresh = g.emit("Mul", state, fit(keep2, tensor)), g.emit("Mul", gradient, fit(take2, tensor))
        g.emit("Add", kept, fresh, out=step_contract.following(state))
        change = g.emit("Add", g.emit("Sign", meant), g.emit("Mul", name, fit(step_contract.WEIGHT_DECAY, tensor)))
        return g.emit("Sub", name, g.emit("Mul", change, fit(step_contract.LR, tensor)), out=out)

    return update


def _shares(g: Graph, beta: str) -> tuple[str, str]:
    """β and 1 − β in float32; numbers near 1 lose too many digits in float32 differences."""
    return _single(g, beta), _single(g, g.emit("Sub", g.constant(1, np.float64), beta))


def _single(g: Graph, value: str) -> str:
    return g.emit("Cast", value, attrs={"to": 1})


_UPDATES: dict[str, Callable[[Graph, _Scalars], _Update]] = {
    "sgd": _sgd,
    "adam": partial(_adam, decoupled=False),
    "adamw": partial(_adam, decoupled=True),
    "lion": _lion,
}
