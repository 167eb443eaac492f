"""Operators that compute element by element, reduce, or multiply matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from fedprune_export.eager.context import OPERATORS, Context, Tensor, numbers, operator, unsupported
from fedprune_export.ir.graph import Node

_TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float32,
    11: torch.float32,
}
"""By ONNX's numbers; all floating types are float32, as in the graphs that train."""

_ONE: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Dropout": lambda x: x,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Round": torch.round,
    "Sigmoid": torch.sigmoid,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Softplus": functional.softplus,
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}

_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "And": torch.logical_and,
    "Div": lambda x, y: torch.div(x, y, rounding_mode=None if x.is_floating_point() else "trunc"),
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "Or": torch.logical_or,
    "PRelu": lambda x, slope: torch.where(x < 0, x * slope, x),
    "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
    "Sub": torch.sub,
    "Xor": torch.logical_xor,
}

_MANY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Mean": torch.add,
    "Min": torch.minimum,
    "Sum": torch.add,
}


def together(*values: Tensor) -> tuple[Tensor, ...]:
    """The values on one device: sizes and constants of whole numbers wait on the CPU."""
    place = next((v.device for v in values if v.device.type != "cpu"), None)
    return values if place is None else tuple(v.to(place) if v.ndim else v for v in values)


def _register_plain() -> None:
    def one(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda run, node, x, *rest: function(x)

    def two(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        return lambda run, node, x, y: function(*together(x, y))

    def many(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
        def folded(run: Context, node: Node, *values: Tensor) -> Tensor:
            first, *others = together(*values)
            for other in others:
                first = function(first, other)
            return first / len(values) if node.op == "Mean" else first

        return folded

    OPERATORS.update({name: one(f) for name, f in _ONE.items()})
    OPERATORS.update({name: two(f) for name, f in _TWO.items()})
    OPERATORS.update({name: many(f) for name, f in _MANY.items()})


_register_plain()


@operator("Where")
def _where(run: Context, node: Node, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    condition, x, y = together(condition, x, y)
    return torch.where(condition, x, y)


@operator("Mod")
def _mod(run: Context, node: Node, x: Tensor, y: Tensor) -> Tensor:
    x, y = together(x, y)
    return torch.fmod(x, y) if node.attrs.get("fmod") else torch.remainder(x, y)


@operator("IsInf")
def _is_inf(run: Context, node: Node, x: Tensor) -> Tensor:
    above = torch.isposinf(x) if node.attrs.get("detect_positive", 1) else torch.zeros_like(x, dtype=torch.bool)
    return above | torch.isneginf(x) if node.attrs.get("detect_negative", 1) else above


@operator("LeakyRelu")
def _leaky(run: Context, node: Node, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, node.attrs.get("alpha", 0.01))


@operator("Elu")
def _elu(run: Context, node: Node, x: Tensor) -> Tensor:
    return functional.elu(x, node.attrs.get("alpha", 1.0))


@operator("Celu")
def _celu(run: Context, node: Node, x: Tensor) -> Tensor:
    return functional.celu(x, node.attrs.get("alpha", 1.0))


@operator("Selu")
def _selu(run: Context, node: Node, x: Tensor) -> Tensor:
    alpha = float(node.attrs.get("alpha", 1.67326319217681884765625))
    return functional.elu(x, alpha) * float(node.attrs.get("gamma", 1.05070102214813232421875))


@operator("HardSigmoid")
def _hard_sigmoid(run: Context, node: Node, x: Tensor) -> Tensor:
    return torch.clamp(node.attrs.get("alpha", 0.2) * x + node.attrs.get("beta", 0.5), 0.0, 1.0)


@operator("ThresholdedRelu")
def _thresholded(run: Context, node: Node, x: Tensor) -> Tensor:
    return torch.where(x > node.attrs.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("Shrink")
def _shrink(run: Context, node: Node, x: Tensor) -> Tensor:
    bias, edge = node.attrs.get("bias", 0.0), node.attrs.get("lambd", 0.5)
    return torch.where(x < -edge, x + bias, torch.where(x > edge, x - bias, torch.zeros_like(x)))


@operator("Gelu")
def _gelu(run: Context, node: Node, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=node.attrs.get("approximate", "none"))


@operator("Clip")
def _clip(run: Context, node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if low is None and high is None:
        return x
    return torch.clamp(x, *(None if bound is None else bound.item() for bound in (low, high)))


@operator("Cast")
def _cast(run: Context, node: Node, x: Tensor) -> Tensor:
    wanted = _TYPES.get(int(node.attrs["to"]))
    if wanted is None:
        raise unsupported(node, f"type {node.attrs['to']}")
    return x.to(wanted)


@operator("Softmax")
def _softmax(run: Context, node: Node, x: Tensor) -> Tensor:
    return torch.softmax(x, int(node.attrs.get("axis", -1)))


@operator("LogSoftmax")
def _log_softmax(run: Context, node: Node, x: Tensor) -> Tensor:
    return torch.log_softmax(x, int(node.attrs.get("axis", -1)))


@operator("CumSum")
def _cumulated(run: Context, node: Node, x: Tensor, axis: Tensor) -> Tensor:
    at = int(axis.item())
    turned = x.flip(at) if node.attrs.get("reverse") else x
    out = turned.cumsum(at)
    if node.attrs.get("exclusive"):
        out = out - turned
    return out.flip(at) if node.attrs.get("reverse") else out


@operator("Gemm")
def _gemm(run: Context, node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    left = a.transpose(0, 1) if node.attrs.get("transA") else a
    right = b if node.attrs.get("transB") else b.transpose(0, 1)
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    if c is not None and c.ndim == 1 and alpha == beta == 1.0:
        return functional.linear(left, right, c)
    out = functional.linear(left, right)
    out = out if alpha == 1.0 else alpha * out
    return out if c is None else out + (c if beta == 1.0 else beta * c)


@operator("Einsum")
def _einsum(run: Context, node: Node, *values: Tensor) -> Tensor:
    return torch.einsum(node.attrs["equation"], *together(*values))


@operator("ArgMax", "ArgMin")
def _extreme(run: Context, node: Node, x: Tensor) -> Tensor:
    axis = int(node.attrs.get("axis", 0))
    last, keep = bool(node.attrs.get("select_last_index")), bool(node.attrs.get("keepdims", 1))
    value = x.flip(axis) if last else x
    found = (torch.argmax if node.op == "ArgMax" else torch.argmin)(value, axis, keepdim=keep)
    return x.shape[axis] - 1 - found if last else found


def _axes(node: Node, x: Tensor, given: Tensor | None) -> tuple[int, ...] | None:
    """The axes that are reduced; None where nothing is."""
    named = node.attrs.get("axes") if given is None else numbers(given)
    if named:
        return tuple(int(a) % x.ndim for a in named)
    return None if node.attrs.get("noop_with_empty_axes") else tuple(range(x.ndim))


def _product(x: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keepdim)
    return x


_REDUCTIONS: dict[str, Callable[[Tensor, tuple[int, ...], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keepdim=keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keepdim=keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
}


@operator(*_REDUCTIONS)
def _reduce(run: Context, node: Node, x: Tensor, given: Tensor | None = None) -> Tensor:
    axes = _axes(node, x, given)
    return x if not axes else _REDUCTIONS[node.op](x, axes, bool(node.attrs.get("keepdims", 1)))


@operator("LpNormalization")
def _unit(run: Context, node: Node, x: Tensor) -> Tensor:
    axis, order = int(node.attrs.get("axis", -1)), int(node.attrs.get("p", 2))
    out: Tensor = x / torch.linalg.vector_norm(x, order, dim=axis, keepdim=True)
    return out


@operator("MeanVarianceNormalization")
def _standardised(run: Context, node: Node, x: Tensor) -> Tensor:
    axes = tuple(node.attrs.get("axes", (0, 2, 3)))
    if 0 in {a % x.ndim for a in axes}:
        raise unsupported(node, "a mean over the batch")
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("Hardmax")
def _hardmax(run: Context, node: Node, x: Tensor) -> Tensor:
    axis = int(node.attrs.get("axis", -1))
    places = torch.arange(x.shape[axis], device=x.device)
    shape = [1] * x.ndim
    shape[axis] = -1
    return (places.reshape(shape) == x.argmax(axis, keepdim=True)).to(x.dtype)


@operator("Size")
def _size(run: Context, node: Node, x: Tensor) -> Tensor:
    return torch.tensor(math.prod(x.shape))
