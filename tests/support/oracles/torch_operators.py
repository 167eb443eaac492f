"""What the operators of a normalised graph do, in torch: those that compute element by element, or move elements."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional

Tensor = torch.Tensor
Function = Callable[..., Any]

_DTYPES = {1: None, 2: torch.uint8, 6: torch.int32, 7: torch.int64, 9: torch.bool, 10: None, 11: None}
OPERATORS: dict[str, Function] = {}
"""Functions of the node's attributes and its inputs (None where left out), by operator."""


def operator(*names: str) -> Callable[[Function], Function]:
    """Say what these operators do."""

    def register(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = function
        return function

    return register


def pad_axes(x: Tensor, pads: list[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Padding before and after each of the last axes."""
    return functional.pad(x, [p for pair in reversed(pads) for p in pair], value=value)


def _unary(function: Function) -> Function:
    return lambda a, x: function(x)


for _name, _function in {
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Exp": torch.exp,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Reciprocal": torch.reciprocal,
    "Sin": torch.sin,
    "Identity": lambda x: x,
    "HardSwish": functional.hardswish,
}.items():
    OPERATORS[_name] = _unary(_function)


for _name, _function in {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Div": lambda a, b: torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc"),
    "Pow": torch.pow,
    "MatMul": torch.matmul,
    "Equal": torch.eq,
    "Where": torch.where,
    "PRelu": lambda x, slope: torch.where(x >= 0, x, x * slope),
}.items():
    OPERATORS[_name] = lambda a, *x, _f=_function: _f(*x)


def _fold(function: Function) -> Function:
    def fold(a: Mapping[str, Any], first: Tensor, *operands: Tensor) -> Tensor:
        for operand in operands:
            first = function(first, operand)
        return first

    return fold


OPERATORS["Max"] = _fold(torch.maximum)
OPERATORS["Min"] = _fold(torch.minimum)


@operator("LeakyRelu")
def _leaky(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return functional.leaky_relu(x, a.get("alpha", 0.01))


@operator("Elu")
def _elu(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return functional.elu(x, a.get("alpha", 1.0))


@operator("Shrink")
def _shrink(a: Mapping[str, Any], x: Tensor) -> Tensor:
    """By nothing, it is `detach`."""
    threshold = a.get("lambd", 0.5)
    return x.detach() if threshold == 0 else functional.softshrink(x, threshold)


@operator("ArgMin")
def _argmin(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return torch.argmin(x, int(a.get("axis", 0)), bool(a.get("keepdims", 1)))


@operator("Selu")
def _selu(a: Mapping[str, Any], x: Tensor) -> Tensor:
    alpha, gamma = a.get("alpha", 1.6732632), a.get("gamma", 1.0507010)
    return gamma * torch.where(x > 0, x, alpha * (x.clamp(max=0).exp() - 1))


@operator("HardSigmoid")
def _hard_sigmoid(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1)


@operator("Gelu")
def _gelu(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=a.get("approximate", "none"))


@operator("Clip")
def _clip(a: Mapping[str, Any], x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, None if low is None else low.item(), None if high is None else high.item())


@operator("Cast")
def _cast(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.to(_DTYPES[a["to"]] or a["_dtype"])


@operator("Softmax")
def _softmax(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return torch.softmax(x, a.get("axis", -1))


@operator("Gemm")
def _gemm(a: Mapping[str, Any], x: Tensor, w: Tensor, c: Tensor | None = None) -> Tensor:
    out = a.get("alpha", 1.0) * ((x.T if a.get("transA") else x) @ (w.T if a.get("transB") else w))
    return out if c is None else out + a.get("beta", 1.0) * c


@operator("Einsum")
def _einsum(a: Mapping[str, Any], *x: Tensor) -> Tensor:
    return torch.einsum(a["equation"], *x)


def _axes(a: Mapping[str, Any], x: Tensor, axes_input: Tensor | None) -> tuple[int, ...]:
    axes = a.get("axes") if axes_input is None else axes_input.tolist()
    return tuple(axes) if axes else tuple(range(x.ndim))


def _reduction(function: Function) -> Function:
    return lambda a, x, axes=None: function(x, dim=_axes(a, x, axes), keepdim=bool(a.get("keepdims", 1)))


for _name, _function in {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceL1": lambda x, **k: x.abs().sum(**k),
    "ReduceL2": lambda x, **k: torch.linalg.vector_norm(x, **k),
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
}.items():
    OPERATORS[_name] = _reduction(_function)


@operator("Shape")
def _shape(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return torch.tensor(x.shape)[a.get("start", 0) : a.get("end")]


@operator("Reshape")
def _reshape(a: Mapping[str, Any], x: Tensor, target: Tensor) -> Tensor:
    sizes = target.tolist()
    if not a.get("allowzero"):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    return x.reshape(tuple(sizes))


@operator("Flatten")
def _flatten(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.reshape(math.prod(x.shape[: a.get("axis", 1)]), -1)


@operator("Squeeze")
def _squeeze(a: Mapping[str, Any], x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes.tolist()))


@operator("Unsqueeze")
def _unsqueeze(a: Mapping[str, Any], x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(i % rank for i in axes.reshape(-1).tolist()):
        x = x.unsqueeze(axis)
    return x


@operator("Transpose")
def _transpose(a: Mapping[str, Any], x: Tensor) -> Tensor:
    return x.permute(a.get("perm") or tuple(range(x.ndim))[::-1])


@operator("Concat")
def _concat(a: Mapping[str, Any], *x: Tensor) -> Tensor:
    return torch.cat(x, a["axis"])


@operator("Split")
def _split(a: Mapping[str, Any], x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis = a.get("axis", 0)
    return torch.split(x, -(-x.shape[axis] // a["_outputs"]) if sizes is None else sizes.tolist(), axis)


@operator("Slice")
def _slice(
    a: Mapping[str, Any],
    x: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    n = starts.numel()
    where = list(range(n)) if axes is None else axes.tolist()
    strides = [1] * n if steps is None else steps.tolist()
    for axis, start, stop, step in zip(where, starts.tolist(), ends.tolist(), strides, strict=True):
        picked = range(x.shape[axis])[slice(start, None if step < 0 and stop < -x.shape[axis] else stop, step)]
        if step == 1:
            x = x.narrow(axis, picked.start, len(picked))
        else:
            x = x.index_select(axis, torch.tensor(list(picked), dtype=torch.int64))
    return x


@operator("Gather")
def _gather(a: Mapping[str, Any], x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    flat = indices.reshape(-1).remainder(x.shape[axis])
    return x.index_select(axis, flat).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


@operator("GatherElements")
def _gather_elements(a: Mapping[str, Any], x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    return x.gather(axis, indices.remainder(x.shape[axis]))


@operator("ScatterElements")
def _scatter_elements(attrs: Mapping[str, Any], x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis, index = int(attrs.get("axis", 0)), index.long()
    if attrs.get("reduction", "none") == "add":
        return x.scatter_add(axis, index, updates)
    return x.scatter(axis, index, updates)


@operator("GridSample")
def _grid_sample(attrs: Mapping[str, Any], x: Tensor, grid: Tensor) -> Tensor:
    padding, corners = attrs.get("padding_mode", "zeros"), bool(attrs.get("align_corners", 0))
    return functional.grid_sample(x, grid, attrs.get("mode", "bilinear"), padding, corners)


@operator("GatherND")
def _gather_nd(a: Mapping[str, Any], x: Tensor, indices: Tensor) -> Tensor:
    if a.get("batch_dims", 0):
        raise NotImplementedError("GatherND with batch_dims")
    return x[tuple(indices.movedim(-1, 0))]


@operator("Expand")
def _expand(a: Mapping[str, Any], x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(shape.tolist())))


@operator("Tile")
def _tile(a: Mapping[str, Any], x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(repeats.tolist())


@operator("Pad")
def _pad(
    a: Mapping[str, Any], x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None
) -> Tensor:
    where = list(range(x.ndim)) if axes is None else axes.tolist()
    amounts = pads.tolist()
    mode = a.get("mode", "constant")
    for i, axis in enumerate(where):
        low, high = amounts[i], amounts[i + len(where)]
        n = x.shape[axis]
        if mode == "constant":
            pairs = [(0, 0)] * x.ndim
            pairs[axis] = (low, high)
            x = pad_axes(x, pairs, 0.0 if value is None else value.item())
        else:
            at = torch.arange(-low, n + high)
            if mode == "edge":
                at = at.clamp(0, n - 1)
            elif mode == "wrap":
                at = at.remainder(n)
            else:
                at = (n - 1) - ((n - 1) - at.abs()).abs()
            x = x.index_select(axis, at)
    return x
