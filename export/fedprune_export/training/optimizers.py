"""Writes weights' updates from their gradients: proximal term, clipping, drift, the optimisers of torch.optim, Lion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fedprune.model import step_contract
from fedprune.model.features import DECOUPLED, Features
from fedprune_export.autodiff.tape import Shape, Tape, port
from fedprune_export.ir.graph import Graph

# The smallest denominator of the surrogate: where weight and threshold are both 0, 0 / 0 would be not a number.
_MIN_DENOMINATOR = float(np.finfo(np.float32).tiny)


def forward_value(g: Graph, name: str, features: Features) -> str:
    """The value that the forward pass reads: w · mask, and with a threshold w · 1[|w| ≥ θ]."""
    value = name
    if features.element_mask:
        value = g.emit("Mul", value, step_contract.mask_name(name))
    if features.threshold:
        value = g.emit("Where", _is_above_threshold(g, name), value, g.scalar(0))
    return value


def tensor_gradient(g: Graph, name: str, gradient: str, features: Features) -> str:
    """The gradient of the data loss by a tensor, from its gradient by the value that the forward pass read.

    With a threshold, the step 1[|w| ≥ θ] is taken to rise by 2θ/(|w| + θ)² per unit of |w| where it is 1, and not at
    all where it is 0 (FIARSE, Wu et al., NeurIPS 2024), so that ∂L/∂w = g · 1[|w| ≥ θ] · (1 + 2θ|w|/(|w| + θ)²). A
    mask is left to the code that sums the gradients.
    """
    if not features.threshold:
        return gradient
    magnitude = g.emit("Abs", name)
    theta = step_contract.threshold_name(name)
    divisor = g.emit("Max", g.emit("Add", magnitude, theta), g.scalar(_MIN_DENOMINATOR))
    # Two quotients, since the square of the sum of two small numbers would be 0.
    rise = g.emit("Mul", g.emit("Div", magnitude, divisor), g.emit("Div", g.emit("Mul", theta, g.scalar(2)), divisor))
    slope = g.emit("Add", rise, g.scalar(1))
    return g.emit("Where", _is_above_threshold(g, name), g.emit("Mul", gradient, slope), g.scalar(0))


def _is_above_threshold(g: Graph, name: str) -> str:
    return g.emit("GreaterOrEqual", g.emit("Abs", name), step_contract.threshold_name(name))


# torch.nn.utils.clip_grad_norm_ adds it to the norm.
_CLIP_EPSILON = 1e-6


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor that trains, and its symbolic shape."""

    name: str
    shape: Shape


def add_inputs(g: Graph, tensors: Sequence[TrainedTensor], features: Features) -> None:
    """Give the graph the inputs of the optimiser: its numbers, and per tensor its state, anchor, mask and so on."""
    read = {name: n for name, n in step_contract.OPTIMIZER_NUMBERS.items() if n.is_read(features)}
    g.inputs += [port(name, (), n.dtype) for name, n in read.items()]
    arrays = [*step_contract.state_names(features.optimizer)]
    arrays += [step_contract.anchor_name] * features.proximal + [step_contract.mask_name] * features.element_mask
    arrays += [step_contract.gradient_sum_name] * features.accumulate + [step_contract.drift_name] * features.drift
    for tensor in tensors:
        g.inputs += [port(array(tensor.name), tensor.shape) for array in arrays]
        scalars = [step_contract.strength_name] * features.proximal
        scalars += [step_contract.threshold_name] * features.threshold
        g.inputs += [port(scalar(tensor.name), ()) for scalar in scalars]


def write_updates(g: Graph, tape: Tape, tensors: Sequence[TrainedTensor], features: Features) -> None:
    """Write every tensor's next value and state from the gradients on the tape."""
    fit = _FittedScalars(g)
    gradients = [_objective(g, tape, tensor, features, fit) for tensor in tensors]
    if features.clip:
        # min(1, clip_norm / (norm + 1e-6)), with the norm of all gradients together.
        squares = [g.emit("ReduceSumSquare", x, attrs={"keepdims": 0}) for x in gradients]
        norm = g.emit("Sqrt", g.emit("Sum", *squares))
        share = g.emit("Div", step_contract.CLIP_NORM, g.emit("Add", norm, g.scalar(_CLIP_EPSILON)))
        share = g.emit("Min", share, g.scalar(1))
        gradients = [g.emit("Mul", x, fit(share, tensor)) for x, tensor in zip(gradients, tensors, strict=True)]
    update = _UPDATES[features.optimizer](g, fit)
    for tensor, gradient in zip(tensors, gradients, strict=True):
        name = tensor.name
        is_kept = g.emit("Greater", step_contract.mask_name(name), g.scalar(0)) if features.element_mask else ""
        gradient, target = _with_terms(g, tensor, gradient, features, fit), step_contract.next_name(name)
        if is_kept:
            # Weight decay and momentum would move masked elements, too.
            g.emit("Where", is_kept, update(tensor, gradient, None), name, out=target)
        else:
            update(tensor, gradient, target)
        arrays = [name, *(state(name) for state in step_contract.state_names(features.optimizer))]
        g.outputs += [port(step_contract.next_name(n), tensor.shape) for n in arrays]


class _FittedScalars:
    """Scalars in a shape that is fast to multiply a tensor by.

    onnxruntime multiplies an array of shape [n, m, 1, 1] by a scalar of shape [] element by element, fifty times slower
    than by one of shape [1, 1, 1, 1]: where a tensor's last dimension is 1, a scalar gets the tensor's rank.
    """

    def __init__(self, g: Graph) -> None:
        self._g = g
        self._reshaped: dict[tuple[str, int], str] = {}

    def __call__(self, scalar: str, tensor: TrainedTensor) -> str:
        rank = len(tensor.shape)
        if not rank or tensor.shape[-1] != 1:
            return scalar
        if (scalar, rank) not in self._reshaped:
            self._reshaped[scalar, rank] = self._g.emit("Reshape", scalar, self._g.ints(*[1] * rank))
        return self._reshaped[scalar, rank]


def _objective(g: Graph, tape: Tape, tensor: TrainedTensor, features: Features, fit: _FittedScalars) -> str:
    """The gradient of the objective by a tensor; gradients are summed over micro-batches before the proximal term."""
    name, shape = tensor.name, tensor.shape
    gradient = tape.gradient(name) or g.emit("ConstantOfShape", tape.shape_of(name))
    gradient = tensor_gradient(g, name, gradient, features)
    if features.accumulate:
        running_total = step_contract.next_name(step_contract.gradient_sum_name(name))
        gradient = g.emit("Add", step_contract.gradient_sum_name(name), gradient, out=running_total)
        g.add_output(running_total, shape)
    if features.proximal:
        deviation = g.emit("Sub", name, step_contract.anchor_name(name))
        pull = g.emit("Mul", deviation, fit(step_contract.strength_name(name), tensor))
        gradient = g.emit("Add", gradient, pull)
    if features.element_mask:
        gradient = g.emit("Mul", gradient, step_contract.mask_name(name))
    if features.gradients:
        gradient = g.emit("Identity", gradient, out=step_contract.gradient_name(name))
        g.add_output(step_contract.gradient_name(name), shape)
    return gradient


def _with_terms(g: Graph, tensor: TrainedTensor, gradient: str, features: Features, fit: _FittedScalars) -> str:
    """A clipped gradient and what is added to it: the drift and, unless the optimiser decays weights itself, wd · w."""
    terms = [step_contract.drift_name(tensor.name)] * features.drift
    if features.decay and features.optimizer not in DECOUPLED:
        terms.append(g.emit("Mul", tensor.name, fit(step_contract.WEIGHT_DECAY, tensor)))
    for term in terms:
        gradient = g.emit("Add", gradient, term)
    masks = terms and features.element_mask
    return g.emit("Mul", gradient, step_contract.mask_name(tensor.name)) if masks else gradient


# Takes a tensor, its gradient and a name; writes the next state, and the next tensor by this name.
_Update = Callable[[TrainedTensor, str, "str | None"], str]


def _sgd(g: Graph, fit: _FittedScalars) -> _Update:
    """buf = m · buf + g; w −= lr · buf (torch.optim.SGD)."""

    def update(tensor: TrainedTensor, gradient: str, out: str | None) -> str:
        name, state = tensor.name, step_contract.momentum_name(tensor.name)
        decayed = g.emit("Mul", state, fit(step_contract.MOMENTUM, tensor))
        momentum = g.emit("Add", decayed, gradient, out=step_contract.next_name(state))
        return g.emit("Sub", name, g.emit("Mul", momentum, fit(step_contract.LR, tensor)), out=out)

    return update


def _adam(g: Graph, fit: _FittedScalars, *, decoupled: bool) -> _Update:
    """torch.optim.Adam, with `decoupled` torch.optim.AdamW.

    m = β1·m + (1 − β1)·g; v = β2·v + (1 − β2)·g²;
    w −= lr/(1 − β1^t) · m / (√v/√(1 − β2^t) + ε), with AdamW also lr · wd · w.
    """

    # In float64 (type 11), since 1 − β^t of a β near 1 loses most of its digits in float32.
    number, one = g.emit("Cast", step_contract.STEP_NUMBER, attrs={"to": 11}), g.constant(1, np.float64)
    (keep1, take1), (keep2, take2) = (_decay_shares(g, beta) for beta in (step_contract.BETA1, step_contract.BETA2))
    bias1, bias2 = (g.emit("Sub", one, g.emit("Pow", b, number)) for b in (step_contract.BETA1, step_contract.BETA2))
    pace = _to_float32(g, g.emit("Div", g.emit("Cast", step_contract.LR, attrs={"to": 11}), bias1))
    root = _to_float32(g, g.emit("Sqrt", bias2))
    shrink = g.emit("Mul", step_contract.LR, step_contract.WEIGHT_DECAY) if decoupled else ""

    def update(tensor: TrainedTensor, gradient: str, out: str | None) -> str:
        name = tensor.name
        first, second = step_contract.momentum_name(name), step_contract.second_moment_name(name)
        addend = g.emit("Mul", gradient, fit(take1, tensor))
        mean = g.emit("Add", g.emit("Mul", first, fit(keep1, tensor)), addend, out=step_contract.next_name(first))
        addend = g.emit("Mul", g.emit("Mul", gradient, gradient), fit(take2, tensor))
        square = g.emit("Add", g.emit("Mul", second, fit(keep2, tensor)), addend, out=step_contract.next_name(second))
        denominator = g.emit(
            "Add", g.emit("Div", g.emit("Sqrt", square), fit(root, tensor)), fit(step_contract.EPSILON, tensor)
        )
        change = g.emit("Mul", g.emit("Div", mean, denominator), fit(pace, tensor))
        change = g.emit("Add", change, g.emit("Mul", name, fit(shrink, tensor))) if decoupled else change
        return g.emit("Sub", name, change, out=out)

    return update


def _lion(g: Graph, fit: _FittedScalars) -> _Update:
    """w −= lr · (sign(β1·m + (1 − β1)·g) + wd · w); m = β2·m + (1 − β2)·g (Chen et al., "Symbolic discovery of
    optimization algorithms", NeurIPS 2023, Alg. 2)."""
    (keep1, take1), (keep2, take2) = (_decay_shares(g, beta) for beta in (step_contract.BETA1, step_contract.BETA2))

    def update(tensor: TrainedTensor, gradient: str, out: str | None) -> str:
        name, state = tensor.name, step_contract.momentum_name(tensor.name)
        direction = g.emit("Add", g.emit("Mul", state, fit(keep1, tensor)), g.emit("Mul", gradient, fit(take1, tensor)))
        decayed, addend = g.emit("Mul", state, fit(keep2, tensor)), g.emit("Mul", gradient, fit(take2, tensor))
        g.emit("Add", decayed, addend, out=step_contract.next_name(state))
        change = g.emit("Add", g.emit("Sign", direction), g.emit("Mul", name, fit(step_contract.WEIGHT_DECAY, tensor)))
        return g.emit("Sub", name, g.emit("Mul", change, fit(step_contract.LR, tensor)), out=out)

    return update


def _decay_shares(g: Graph, beta: str) -> tuple[str, str]:
    """β and 1 − β in float32; numbers near 1 lose too many digits in float32 differences."""
    return _to_float32(g, beta), _to_float32(g, g.emit("Sub", g.constant(1, np.float64), beta))


def _to_float32(g: Graph, value: str) -> str:
    return g.emit("Cast", value, attrs={"to": 1})


_UPDATES: dict[str, Callable[[Graph, _FittedScalars], _Update]] = {
    "sgd": _sgd,
    "adam": partial(_adam, decoupled=False),
    "adamw": partial(_adam, decoupled=True),
    "lion": _lion,
}
