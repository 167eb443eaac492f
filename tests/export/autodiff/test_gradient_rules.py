"""Gradients of operators that compute, one row per operator and form, against torch in float64."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import RULES, gradient_rule
from support.oracles.differentiation import Dims, Oracle, Rows, check, floats, gradient_session, ints, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional
Array = np.ndarray[Any, Any]
few = settings(max_examples=40, deadline=None)

ROWS = Rows()
row, one = ROWS.add, ROWS.one


@pytest.mark.parametrize("name", ROWS)
def test_result_and_gradients_are_torchs(name: str) -> None:
    ROWS[name]()


# -- functions of one number; where they bend, `test_special_points.py` has them --------------------------------------


def away(x: Array) -> Array:
    return x + np.sign(x)


def positive(x: Array) -> Array:
    return np.abs(x) + np.float32(0.1)


def inside(x: Array) -> Array:
    return 0.9 * np.tanh(x)


FUNCTIONS: dict[str, Oracle] = {
    "Relu": torch.relu,
    "LeakyRelu": lambda x: F.leaky_relu(x, 0.1),
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Neg": torch.neg,
    "HardSigmoid": F.hardsigmoid,
    "HardSwish": F.hardswish,
    "Identity": lambda x: x * 1,
    "Elu": lambda x: F.elu(x, 0.7),
    "Selu": F.selu,
    "Celu": lambda x: F.celu(x, 1.6),
    "Gelu": F.gelu,
    "Mish": F.mish,
    "Softplus": F.softplus,
    "Softsign": F.softsign,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Tan": torch.tan,
    "Atan": torch.atan,
    "Sinh": torch.sinh,
    "Cosh": torch.cosh,
    "Asinh": torch.asinh,
    "Abs": torch.abs,
    "ThresholdedRelu": lambda x: F.threshold(x, 0.6, 0.0),
    "Shrink": lambda x: F.softshrink(x, 0.7),
    "Reciprocal": lambda x: 1 / x,
    "Acosh": torch.acosh,
    "Log": torch.log,
    "Sqrt": torch.sqrt,
    "Asin": torch.asin,
    "Acos": torch.acos,
    "Atanh": torch.atanh,
}
ATTRIBUTES: dict[str, dict[str, float]] = {
    "LeakyRelu": {"alpha": 0.1},
    "HardSigmoid": {"alpha": 1 / 6, "beta": 0.5},
    "Elu": {"alpha": 0.7},
    "Celu": {"alpha": 1.6},
    "ThresholdedRelu": {"alpha": 0.6},
    "Shrink": {"lambd": 0.7, "bias": 0.7},
}
DOMAINS: dict[str, Callable[[Array], Array]] = {
    "Reciprocal": away,
    **dict.fromkeys(("Log", "Sqrt"), positive),
    "Acosh": lambda x: 1 + positive(x),
    **dict.fromkeys(("Tan", "Asin", "Acos", "Atanh"), inside),
}
for _op, _oracle in FUNCTIONS.items():
    _x = DOMAINS.get(_op, lambda x: x)(3 * normal(2, 3, 8, 8))
    one(_op, _op, _oracle, _x, ("N", "c", 8, 8), narrow={"c": 2}, **ATTRIBUTES.get(_op, {}))
one("gelu by tanh", "Gelu", lambda x: F.gelu(x, approximate="tanh"), 4 * normal(8, 50), approximate="tanh")

for _low, _high in ((0.0, 6.0), (-1.0, 1.0)):
    _x = 4 * normal(5, 40)
    _x[0, :4] = [_low, _high, _low, _high]
    _bounds = {"low": floats(_low), "high": floats(_high)}
    one(f"clip from {_low}", "Clip", partial(F.hardtanh, min_val=_low, max_val=_high), _x, constants=_bounds)

for _op in ("Floor", "Ceil", "Round", "Sign"):
    _step = getattr(torch, _op.lower())
    _nodes = [node(_op, "x", out="s"), node("Add", "s", "x")]
    row(f"no gradient through {_op}", _nodes, lambda x, f=_step: f(x).detach() + x, {"x": 3 * normal(4, 5)})
row(
    "no gradient through a shrinkage by nothing",
    [node("Shrink", "x", out="s", bias=0.0, lambd=0.0), node("Mul", "s", "x")],
    lambda x: x.detach() * x,
    {"x": 3 * normal(4, 5)},
)
row(
    "casts between floats",
    [node("Cast", "x", out="d", to=11), node("Mul", "d", "k", out="m"), node("Cast", "m", to=1)],
    lambda x: x * 0.3,
    {"x": normal(4, 5)},
    None,
    {"k": np.array(0.3)},
)
row(
    "no gradient through a truth as a number",
    [node("Greater", "x", "k", out="t"), node("Cast", "t", out="f", to=1), node("Mul", "f", "x")],
    lambda x: (x > 0.2).to(x.dtype) * x,
    {"x": normal(4, 5)},
    None,
    {"k": floats(0.2)},
)


# -- functions of several values --------------------------------------------------------------------------------------

for _slope in ((1,), (5, 1, 1), (5, 3, 3), ()):
    _data = {"x": normal(3, 5, 3, 3), "a": normal(*_slope, seed=1)}
    _data["x"][0, 0] = 0
    _shapes = {"x": ("N", "c", 3, 3), "a": tuple("c" if d == 5 else d for d in _slope)}
    row(
        f"PRelu with slopes {_slope}",
        [node("PRelu", "x", "a")],
        lambda x, a: torch.where(x > 0, x, a * x),
        _data,
        _shapes,
        narrow={"c": 2},
    )

for _op, _function in (("Max", torch.maximum), ("Min", torch.minimum)):
    _data = {"a": normal(3, 4), "b": normal(1, 4, seed=1), "c": normal(3, 1, seed=2)}
    _data["a"][0] = _data["b"][0]
    row(f"{_op} with equals", [node(_op, "a", "b", "c")], lambda a, b, c, f=_function: f(f(a, b), c), _data)
    _side = {"Max": "min", "Min": "max"}[_op]
    _x = {"x": np.array([[0.5, 0.25, 0.5], [-3.0, 0.5, 4.0]], np.float32)}
    for _inputs in (("x", "k"), ("k", "x")):
        _clamp = partial(torch.Tensor.clamp, **{_side: 0.5})
        row(f"{_op} of {_inputs}", [node(_op, *_inputs)], lambda x, f=_clamp: f(x), _x, None, {"k": floats(0.5)})
for _op, _share in (("Sum", 1), ("Mean", 3)):
    _data = {"a": normal(3, 4), "b": normal(1, 4, seed=1), "c": normal(4, seed=2)}
    row(f"{_op} of three", [node(_op, *_data)], lambda a, b, c, n=_share: (a + b + c) / n, _data, sums=True)

for _power in (2.0, 3.0, 0.5, -1.0, 0.0, 1.0, 1.7):
    _x = positive(normal(4, 20)) if _power != int(_power) or _power < 0 else normal(4, 20)
    if _power >= 1 and _power == int(_power):
        _x[0, 0] = 0
    one(f"power {_power}", "Pow", lambda x, p=_power: x**p, _x, constants={"p": floats(_power)})
one("whole power", "Pow", lambda x: x**3, normal(4, 5), constants={"p": np.array(3, np.int64)})
row("trained power", [node("Pow", "a", "b")], torch.pow, {"a": positive(normal(4, 5)), "b": normal(5, seed=1)})
one("remainder", "Mod", lambda x: torch.fmod(x, 1.5), 5 * normal(4, 5), constants={"m": floats(1.5)}, fmod=1)

_pair = {"a": normal(4, 5), "b": normal(4, 5, seed=1)}
COMPARISONS = {"Greater": torch.gt, "Less": torch.lt, "GreaterOrEqual": torch.ge, "LessOrEqual": torch.le}
for _op, _compare in COMPARISONS.items():
    _nodes = [node(_op, "a", "b", out="t"), node("Where", "t", "a", "b")]
    row(f"choice by {_op}", _nodes, lambda a, b, f=_compare: torch.where(f(a, b), a, b), _pair)
for _op, _logic in {"And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor}.items():
    _nodes = [node("Greater", "x", "zero", out="p"), node("Less", "x", "one", out="q"), node(_op, "p", "q", out="both")]
    row(
        f"choice by {_op}",
        [*_nodes, node("Not", "both", out="t"), node("Where", "t", "x", "zero")],
        lambda x, f=_logic: torch.where(~f(x > 0, x < 1), x, 0),
        {"x": 2 * normal(4, 9)},
        None,
        {"zero": floats(0), "one": floats(1)},
    )
one(
    "a constant over channels with equal entries",
    "Mul",
    lambda x: x * 0.5,
    normal(3, 6, 2),
    ("N", "c", 2),
    constants={"k": np.full((6, 1), 0.5, np.float32)},
    values={"k": ("c", 1)},
    narrow={"c": 4},
)
row(
    "a number of a shape",
    [
        node("Shape", "x", out="s"),
        node("Gather", "s", "one", out="n"),
        node("Cast", "n", out="f", to=1),
        node("Sqrt", "f", out="r"),
        node("Div", "x", "r"),
    ],
    lambda x: x / x.shape[1] ** 0.5,
    {"x": normal(3, 6)},
    {"x": ("N", "c")},
    {"one": ints(1)},
    narrow={"c": 4},
)

BINARY: dict[str, Oracle] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Div": torch.div}
for _op, _oracle in BINARY.items():
    row(f"{_op} with itself", [node(_op, "a", "a")], lambda a, f=_oracle: f(a, a), {"a": positive(normal(3, 4))})
row(
    "a value that is read three times",
    [node("Relu", "x", out="r"), node("Sigmoid", "x", out="s"), node("Mul", "r", "s", out="m"), node("Add", "m", "x")],
    lambda x: x.relu() * x.sigmoid() + x,
    {"x": normal(4, 5)},
)


@st.composite
def broadcast(draw: st.DrawFn, count: int) -> list[tuple[int, ...]]:
    full = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    shapes = [tuple(d if draw(st.booleans()) else 1 for d in full) for _ in range(count)]
    return [shape[draw(st.integers(0, len(full) - 1)) :] for shape in shapes]


@pytest.mark.parametrize("op", BINARY)
@few
@given(shapes=broadcast(2))
def test_arithmetic_broadcasts(op: str, shapes: list[tuple[int, ...]]) -> None:
    data = {"a": normal(*shapes[0], seed=1), "b": np.abs(normal(*shapes[1], seed=2)) + np.float32(0.5)}
    check([node(op, "a", "b")], lambda a, b: BINARY[op](a, b), data, sums=True)


@few
@given(shapes=broadcast(3))
def test_where_broadcasts(shapes: list[tuple[int, ...]]) -> None:
    condition = normal(*shapes[0], seed=5) > 0
    arrays = {"a": normal(*shapes[1], seed=1), "b": normal(*shapes[2], seed=2)}
    oracle = lambda a, b: torch.where(torch.tensor(condition), a, b)  # noqa: E731
    check([node("Where", "t", "a", "b")], oracle, arrays, None, {"t": condition}, sums=True)


# -- products ---------------------------------------------------------------------------------------------------------


def gemm(ta: int, tb: int, alpha: float, beta: float) -> Oracle:
    def oracle(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None) -> torch.Tensor:
        y = alpha * (a.T if ta else a) @ (b.T if tb else b)
        return y if c is None else y + beta * c

    return oracle


for _ta, _tb, (_alpha, _beta), _bias in product(
    (0, 1), (0, 1), ((1.0, 1.0), (0.5, 2.0)), (None, (6,), (1, 6), (4, 6), (4, 1))
):
    _data = {"a": normal(*((5, 4) if _ta else (4, 5))), "b": normal(*((6, 5) if _tb else (5, 6)), seed=1)}
    _data |= {} if _bias is None else {"c": normal(*_bias, seed=2)}
    _nodes = [node("Gemm", *_data, transA=_ta, transB=_tb, alpha=_alpha, beta=_beta)]
    row(f"Gemm {_ta}{_tb} {_alpha} {_bias}", _nodes, gemm(_ta, _tb, _alpha, _beta), _data, sums=True)
row(
    "Gemm over widths",
    [node("Gemm", "a", "b", "c", transB=1)],
    gemm(0, 1, 1, 1),
    {"a": normal(3, 4), "b": normal(6, 4, seed=1), "c": normal(6, seed=2)},
    {"a": ("N", "i"), "b": ("o", "i"), "c": ("o",)},
    sums=True,
    narrow={"i": 2, "o": 5},
)

MATRICES: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
    *[((4, 5), (5, 3)), ((2, 4, 5), (5, 3)), ((2, 4, 5), (2, 5, 3)), ((2, 3, 4, 5), (3, 5, 2)), ((4, 5), (2, 5, 3))],
    *[((5,), (5,)), ((5,), (5, 3)), ((4, 5), (5,)), ((5,), (2, 5, 3)), ((2, 4, 5), (5,)), ((3, 2, 4, 5), (5,))],
]
for _a, _b in MATRICES:
    row(
        f"MatMul {_a} {_b}",
        [node("MatMul", "a", "b")],
        torch.matmul,
        {"a": normal(*_a), "b": normal(*_b, seed=1)},
        sums=True,
    )
row(
    "attention over heads and dims that vary",
    [node("MatMul", "q", "k", out="s"), node("Softmax", "s", axis=-1, out="p"), node("MatMul", "p", "v")],
    lambda q, k, v: (q @ k).softmax(-1) @ v,
    {"q": normal(3, 4, 5, 6), "k": normal(3, 4, 6, 5, seed=1), "v": normal(3, 4, 5, 6, seed=2)},
    {"q": ("N", "h", 5, "d"), "k": ("N", "h", "d", 5), "v": ("N", "h", 5, "d")},
    narrow={"h": 2, "d": 3},
)

EINSUMS: dict[str, list[Dims]] = {
    "bij,bjk->bik": [("N", 4, "c"), ("N", "c", 5)],
    "bhid,bhjd->bhij": [("N", "h", 4, "d"), ("N", "h", 5, "d")],
    "nchw,cdhw -> ndhw": [("N", "c", 2, 3), ("c", "d", 2, 3)],
    "ij,j": [("N", "c"), ("c",)],
    "i,j->ij": [("c",), ("d",)],
    "bi->b": [("N", "c")],
    "bij,k->bi": [("N", "c", 3), ("d",)],
    "...ij,...jk->...ik": [("N", "h", 4, "d"), ("h", "d", 5)],
    "b...,b...->...b": [("N", 3, "c"), ("N", 1, "c")],
    "ij,jk,kl->il": [("N", "c"), ("c", "d"), ("d", 5)],
    "bij->bji": [("N", "c", "d")],
}
SIZES = {"N": 3, "c": 4, "d": 6, "h": 2}
for _equation, _terms in EINSUMS.items():
    _data = {f"x{i}": normal(*(SIZES.get(str(d), d) for d in t), seed=i) for i, t in enumerate(_terms)}
    row(
        f"Einsum {_equation}",
        [node("Einsum", *_data, equation=_equation)],
        lambda *x, e=_equation: torch.einsum(e, *x),
        _data,
        {f"x{i}": t for i, t in enumerate(_terms)},
        sums=True,
        narrow={n: 2 if n != "h" else 1 for n in "cdh" if any(n in t for t in _terms)},
    )


@few
@given(data=st.data())
def test_products_over_broadcast_batches(data: st.DataObject) -> None:
    full = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    lead = [
        tuple(d if data.draw(st.booleans()) else 1 for d in full)[data.draw(st.integers(0, len(full))) :] for _ in "ab"
    ]
    m, k, n = (data.draw(st.integers(1, 4)) for _ in "mkn")
    arrays = {"a": normal(*lead[0], m, k), "b": normal(*lead[1], k, n, seed=1)}
    check([node("MatMul", "a", "b")], lambda a, b: a @ b, arrays, sums=True)


# -- reductions -------------------------------------------------------------------------------------------------------


def prod(x: torch.Tensor, axes: list[int], keep: bool) -> torch.Tensor:
    for a in sorted((a % x.ndim for a in axes), reverse=True):
        x = x.prod(a, keepdim=keep)
    return x


REDUCTIONS: dict[str, Oracle] = {
    "ReduceSum": lambda x, a, k: x.sum(a, keepdim=k),
    "ReduceMean": lambda x, a, k: x.mean(a, keepdim=k),
    "ReduceMax": lambda x, a, k: x.amax(a, keepdim=k),
    "ReduceMin": lambda x, a, k: x.amin(a, keepdim=k),
    "ReduceProd": prod,
    "ReduceL1": lambda x, a, k: x.abs().sum(a, keepdim=k),
    "ReduceL2": lambda x, a, k: torch.linalg.vector_norm(x, dim=a, keepdim=k),
    "ReduceSumSquare": lambda x, a, k: (x * x).sum(a, keepdim=k),
    "ReduceLogSumExp": lambda x, a, k: x.logsumexp(a, keepdim=k),
}


@pytest.mark.parametrize("op", REDUCTIONS)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
def test_reductions(op: str, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.permutations(["N", "c", "d", 2])))
    axes = data.draw(st.lists(st.sampled_from([0, 1, 2, -1]), min_size=1, unique=True) | st.none())
    keep = data.draw(st.booleans())
    x = normal(*({"N": 3, "c": 4, "d": 3}.get(str(d), d) for d in shape), seed=len(axes or ()))
    attrs: dict[str, Any] = {"keepdims": int(keep)}
    constants = {}
    if op == "ReduceSum" and axes is not None:
        constants = {"a": ints(*axes)}
    elif axes is not None:
        attrs["axes"] = axes
    oracle = lambda x: REDUCTIONS[op](x, axes or [0, 1, 2, 3], keep)  # noqa: E731
    linear, narrow = op in ("ReduceSum", "ReduceMean"), {"c": 2, "d": 2}
    check([node(op, "x", *constants, **attrs)], oracle, {"x": x}, {"x": shape}, constants, sums=linear, narrow=narrow)


for _zeros in range(3):
    _x = normal(3, 5)
    _x[0, :_zeros] = 0
    one(f"product with {_zeros} zeros", "ReduceProd", lambda x: x.prod(1, keepdim=True), _x, axes=[1])
_x = np.array([[900, 901, -900]], np.float32)
one("large exponents", "ReduceLogSumExp", lambda x: x.logsumexp(1, keepdim=True), _x, axes=[1])
row(
    "a reduction over no axes",
    [node("ReduceSum", "x", "a", noop_with_empty_axes=1, out="s"), node("Exp", "s")],
    torch.exp,
    {"x": normal(3, 4)},
    None,
    {"a": ints()},
)


def running(x: torch.Tensor, exclusive: int, reverse: int) -> torch.Tensor:
    y = x.flip(1).cumsum(1).flip(1) if reverse else x.cumsum(1)
    return y - x if exclusive else y


for _exclusive, _reverse in product((0, 1), (0, 1)):
    _how = {"exclusive": _exclusive, "reverse": _reverse}
    _along = {"constants": {"a": np.array(1, np.int64)}, "sums": True, "narrow": {"c": 2}}
    one(f"CumSum {_how}", "CumSum", partial(running, **_how), normal(3, 7, 4), ("N", 7, "c"), **_along, **_how)
for _op, _keep in product(("ArgMax", "ArgMin"), (0, 1)):
    # The gradient passes through what was picked, not through its place.
    _nodes = [node(_op, "x", axis=1, keepdims=_keep, out="i")]
    _nodes += [] if _keep else [node("Unsqueeze", "i", "one", out="j")]
    _nodes += [node("GatherElements", "x", "i" if _keep else "j", axis=1)]
    _pick = torch.amax if _op == "ArgMax" else torch.amin
    _data, _shapes = {"x": normal(3, 7, 4)}, {"x": ("N", 7, 4)}
    row(
        f"place of {_op} {_keep}",
        _nodes,
        lambda x, f=_pick: f(x, 1, keepdim=True),
        _data,
        _shapes,
        {"one": ints(1)},
        narrow={},
    )
one("GlobalAveragePool", "GlobalAveragePool", lambda x: x.mean((2, 3), keepdim=True), normal(3, 4, 5, 6))


# -- norms of single samples ------------------------------------------------------------------------------------------

OFFSETS = (0.0, 100.0)  # means of the input: where it is large, sums of squares lose their digits

for _op, _function in (("Softmax", F.softmax), ("LogSoftmax", F.log_softmax)):
    for _axis in (1, 2, -1):
        _oracle = partial(_function, dim=_axis)
        _x = 4 * normal(3, 5, 6, 2)
        one(f"{_op} {_axis}", _op, lambda x, f=_oracle: f(x), _x, ("N", "c", 6, 2), narrow={"c": 3}, axis=_axis)
    _x = np.array([[1000, 999, -1000], [-5000, 3, 2]], np.float32)
    one(f"{_op} of large numbers", _op, lambda x, f=_function: f(x, -1), _x)

for _axis, _biased, _offset in product((-1, 2, 1), (True, False), OFFSETS):
    _dims: Dims = ("N", 4, 5, "c")
    _sizes = [9 if d == "c" else int(d) for d in _dims[_axis:]]
    _data = {"x": normal(3, 4, 5, 9, offset=_offset), "w": normal(*_sizes, seed=1, offset=1.0)}
    _data |= {"b": normal(*_sizes, seed=2)} if _biased else {}
    row(
        f"LayerNormalization {_axis} {_biased} {_offset}",
        [node("LayerNormalization", *_data, axis=_axis)],
        lambda x, w, b=None: F.layer_norm(x, w.shape, w, b, 1e-5),
        _data,
        {n: _dims if n == "x" else _dims[_axis:] for n in _data},
        narrow={"c": 5},
    )
for _axis in (-1, 1):
    row(
        f"RMSNormalization {_axis}",
        [node("RMSNormalization", "x", "w", axis=_axis, epsilon=1e-6)],
        lambda x, w: F.rms_norm(x, w.shape, w, 1e-6),
        {"x": normal(3, 5, 8), "w": normal(*([8] if _axis == -1 else [5, 8]), seed=1)},
        {"x": ("N", 5, "c"), "w": ("c",) if _axis == -1 else (5, "c")},
        narrow={"c": 5},
    )


def norm_row(name: str, op: str, oracle: Oracle, x: Array, dims: Dims, narrow: dict[str, int], **attrs: Any) -> None:
    data = {"x": x, "w": normal(x.shape[1], seed=1, offset=1.0), "b": normal(x.shape[1], seed=2)}
    shapes = {"x": dims, "w": dims[1:2], "b": dims[1:2]}
    # The gradient of a single shift is one sum over all samples and positions, which may cancel.
    sums = x.shape[1] == 1
    row(name, [node(op, "x", "w", "b", **attrs)], oracle, data, shapes, narrow=narrow, sums=sums)


# Whole groups are cut where a channel takes all of one, positions of all groups where it lies in each.
for _channels, _spatial, _offset in product(("g*3", "4*g", 12), ((), (5,), (3, 4)), OFFSETS):
    norm_row(
        f"GroupNormalization {_channels} {_spatial} {_offset}",
        "GroupNormalization",
        lambda x, w, b, c=_channels: F.group_norm(x, x.shape[1] // 3 if c == "g*3" else 4, w, b, 1e-5),
        normal(4, 12, *_spatial, offset=_offset),
        ("N", _channels, *_spatial),
        {"g": 2},
        num_groups=4,
    )
_one_group = lambda x, w, b: F.group_norm(x, 1, w, b)  # noqa: E731
norm_row("one group", "GroupNormalization", _one_group, normal(3, 7, 4), ("N", "c", 4), {"c": 5}, num_groups=1)
_instance = lambda x, w, b: F.instance_norm(x, weight=w, bias=b)  # noqa: E731
for _shape in ((1, 3, 4), (2, 1, 5, 4), (3, 4, 3, 3), (2, 5, 3, 4, 3)):
    norm_row(f"InstanceNormalization {_shape}", "InstanceNormalization", _instance, normal(*_shape), _shape, {})
for _offset in OFFSETS:
    _x = normal(3, 6, 4, 5, offset=_offset)
    norm_row(f"instances {_offset}", "InstanceNormalization", _instance, _x, ("N", "c", 4, 5), {"c": 2})

for _p, _axis in product((1, 2), (1, -1)):
    _how = {"p": _p, "axis": _axis}
    _oracle = partial(F.normalize, p=_p, dim=_axis)
    one(f"LpNormalization {_how}", "LpNormalization", _oracle, normal(3, 5, 6), ("N", "c", 6), narrow={"c": 3}, **_how)

for _spatial in ((), (4, 5)):
    _data = {"x": normal(3, 6, *_spatial, offset=2.0), "w": normal(6, seed=1), "b": normal(6, seed=2)}
    row(
        f"BatchNormalization by frozen statistics {_spatial}",
        [node("BatchNormalization", "x", "w", "b", "m", "v", epsilon=1e-3)],
        lambda x, w, b, m, v: F.batch_norm(x, m.detach(), v.detach(), w, b, eps=1e-3),
        {**_data, "m": normal(6, seed=3), "v": np.abs(normal(6, seed=4)) + np.float32(0.2)},
        dict.fromkeys("wbmv", ("c",)) | {"x": ("N", "c", *_spatial)},
        frozen=("m", "v"),
        narrow={"c": 4},
    )
row(
    "BatchNormalization by computed statistics",
    [
        node("Tanh", "m", out="mean"),
        node("Exp", "v", out="var"),
        node("BatchNormalization", "x", "w", "b", "mean", "var", epsilon=1e-3),
    ],
    lambda x, w, b, m, v: (x - m.tanh()[:, None]) * ((v.exp() + 1e-3).rsqrt() * w)[:, None] + b[:, None],
    {"x": normal(3, 6, 4, offset=2.0)} | {n: normal(6, seed=i) for i, n in enumerate("wbmv", 1)},
    dict.fromkeys("wbmv", ("c",)) | {"x": ("N", "c", 4)},
    narrow={"c": 4},
)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "message"),
    [
        ("Det", {"x": ("N", 2, 2)}, {}, "no gradient rule"),
        ("MatMul", {"a": ("N", "c"), "b": ("d", 5)}, {}, "every width"),
        ("Einsum", {"x": ("N", 3, 3)}, {"equation": "bii->b"}, "diagonal"),
        ("Mul", {"x": ("N", "c"), "k": (4,)}, {}, "constant"),
    ],
)
def test_what_has_no_gradient_is_refused_by_name(op: str, shapes: dict[str, Dims], attrs: Any, message: str) -> None:
    sizes = {"N": 3, "c": 4, "d": 4}
    arrays = {n: normal(*(sizes.get(str(d), d) for d in dims)) for n, dims in shapes.items()}
    data = {n: a for n, a in arrays.items() if n != "k"}
    constants = {n: a for n, a in arrays.items() if n == "k"}
    with pytest.raises(ModelError, match=rf"the_{op}|constant k.*{message}"):
        gradient_session([node(op, *shapes, **attrs)], data, shapes, constants)


def test_an_operator_has_one_rule() -> None:
    before = RULES["Relu"]
    with pytest.raises(ModelError, match=r"Relu"):
        gradient_rule("Relu")(lambda tape, node: None)
    assert RULES["Relu"] is before
