"""Gradients of operators that move, pick, repeat, join and resample elements, one row per form, against torch."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Node
from support.oracles.differentiation import (
    Arrays,
    Dims,
    Oracle,
    Rows,
    Shapes,
    check,
    floats,
    gradient_session,
    ints,
    node,
    normal,
)

pytestmark = pytest.mark.torch

F = torch.nn.functional
ROWS = Rows()
row, one = ROWS.add, ROWS.one


@pytest.mark.parametrize("name", ROWS)
def test_result_and_gradients_are_torchs(name: str) -> None:
    ROWS[name]()


def pieces(op: str, outputs: Sequence[str], *inputs: str, **attrs: Any) -> Node:
    return Node(op, list(inputs), list(outputs), attrs, f"the_{op}")


# -- one operator of a map --------------------------------------------------------------------------------------------

MAPS: list[tuple[str, Arrays, dict[str, Any], Oracle]] = [
    ("Flatten", {}, {"axis": 1}, lambda x: x.flatten(1)),
    ("Flatten", {}, {"axis": 2}, lambda x: x.reshape(12, 20)),
    ("Reshape", {"s": ints(0, -1)}, {"values": {"y": ("N", "c*20")}}, lambda x: x.reshape(2, -1)),
    ("Reshape", {"s": ints(-1, 120)}, {"values": {"y": ("N", "c*20")}}, lambda x: x.reshape(2, 120)),
    ("Reshape", {"s": ints(0, 0, 20)}, {"values": {"y": ("N", "c", 20)}}, lambda x: x.reshape(2, 6, 20)),
    ("Reshape", {"s": ints(0, 0, 2, 2, 5)}, {"values": {"y": ("N", "c", 2, 2, 5)}}, lambda x: x.reshape(2, 6, 2, 2, 5)),
    ("Reshape", {"s": ints(-1, 1, 6, 4, 5)}, {"values": {"y": ("N", 1, "c", 4, 5)}}, lambda x: x[:, None]),
    ("Unsqueeze", {"a": ints(1, -1)}, {}, lambda x: x[:, None, ..., None]),
    ("Transpose", {}, {"perm": [0, 2, 3, 1]}, lambda x: x.permute(0, 2, 3, 1)),
    ("Transpose", {}, {}, lambda x: x.permute(3, 2, 1, 0)),
    ("Pad", {"p": ints(0, 0, 1, 2, 0, 0, 3, 0)}, {}, lambda x: F.pad(x, (2, 0, 1, 3))),
    ("Pad", {"p": ints(0, 0, 1, 0, 0, 0, 0, 1), "v": floats(2)}, {}, lambda x: F.pad(x, (0, 1, 1, 0), value=2.0)),
    ("Pad", {"p": ints(0, 0, -1, 0, 0, 0, 0, -2)}, {}, lambda x: x[:, :, 1:, :-2]),
    ("Slice", {"b": ints(1, -3), "e": ints(3, 2**31), "a": ints(2, 3)}, {}, lambda x: x[:, :, 1:3, -3:]),
    ("ReduceMean", {}, {"axes": [2, 3], "keepdims": 0}, lambda x: x.mean((2, 3))),
    ("ReduceMean", {}, {"axes": [-1], "keepdims": 1}, lambda x: x.mean(3, keepdim=True)),
    ("ReduceMean", {"a": ints(2)}, {"keepdims": 0}, lambda x: x.mean(2)),
]
for _i, (_op, _constants, _attrs, _oracle) in enumerate(MAPS):
    one(f"{_op} {_i}", _op, _oracle, normal(2, 6, 4, 5), ("N", "c", 4, 5), _constants, **_attrs)
one("Squeeze", "Squeeze", lambda x: x[..., 0, 0], normal(3, 5, 1, 1), ("N", "c", 1, 1), {"a": ints(-1, 2)})

for _axis in (0, 1, 2, 3, -1, -4):
    row(
        f"Flatten at {_axis}",
        [node("Flatten", "x", axis=_axis, out="f"), node("Exp", "f")],
        lambda x, a=_axis: x.reshape(int(np.prod(x.shape[:a])), -1).exp(),
        {"x": normal(3, 4, 2, 5)},
        {"x": ("N", "c", 2, "d")},
        narrow={"c": 3, "d": 2},
    )

SLICES: list[tuple[Arrays, Oracle]] = [
    ({"b": ints(2), "e": ints(2**62), "a": ints(2)}, lambda x: x[:, :, 2:]),
    ({"b": ints(-3), "e": ints(-1), "a": ints(-1)}, lambda x: x[..., -3:-1]),
    ({"b": ints(1), "e": ints(7), "a": ints(2), "s": ints(3)}, lambda x: x[:, :, 1:7:3]),
    ({"b": ints(-1), "e": ints(-(2**62)), "a": ints(2), "s": ints(-1)}, lambda x: x.flip(2)),
    ({"b": ints(6), "e": ints(1), "a": ints(2), "s": ints(-2)}, lambda x: x[:, :, 2:7].flip(2)[:, :, ::2]),
    (
        {"b": ints(1, 4), "e": ints(6, 0), "a": ints(2, 3), "s": ints(1, -2)},
        lambda x: x[:, :, 1:6, 1:5].flip(3)[..., ::2],
    ),
    ({"b": ints(0, 0, 1), "e": ints(2**31, 2**31, 4)}, lambda x: x[:, :, 1:4]),
    ({"b": ints(0), "e": ints(2**31), "a": ints(1)}, lambda x: x * 1),
]
for _i, (_constants, _oracle) in enumerate(SLICES):
    _nodes = [node("Slice", "x", *_constants, out="s"), node("Exp", "s")]
    _data, _shapes = {"x": normal(3, 4, 7, 5)}, {"x": ("N", "c", 7, 5)}
    row(f"slice {_i}", _nodes, lambda x, f=_oracle: f(x).exp(), _data, _shapes, _constants, narrow={"c": 3})

PADS: list[tuple[str, tuple[int, ...], Oracle]] = [
    ("reflect", (0, 0, 2, 1, 0, 0, 3, 4), lambda x: F.pad(x, (1, 4, 2, 3), "reflect")),
    ("edge", (0, 0, 6, 0, 0, 0, 9, 1), lambda x: F.pad(x, (0, 1, 6, 9), "replicate")),
    ("wrap", (0, 0, 2, 0, 0, 0, 1, 0), lambda x: F.pad(x, (0, 0, 2, 1), "circular")),
    ("constant", (0, 2, 0, 0, 0, 1, 0, 0), lambda x: F.pad(x, (0, 0, 0, 0, 2, 1))),
]
for _mode, _pads, _oracle in PADS:
    _options = {"sums": True, "narrow": {"c": 3}, "mode": _mode}
    one(f"pad {_mode}", "Pad", _oracle, normal(3, 4, 5, 6), ("N", "c", 5, 6), {"p": ints(*_pads)}, **_options)
row(
    "channels padded with a value",
    [node("Pad", "x", "p", "v", out="z"), node("Mul", "z", "z")],
    lambda x: F.pad(x, (1, 2), value=3.0) ** 2,
    {"x": normal(3, 5)},
    {"x": ("N", "c")},
    {"p": ints(0, 1, 0, 2), "v": floats(3.0)},
    narrow={"c": 2},
)

EXPANDED: list[tuple[Dims, list[int], Dims, tuple[int, ...]]] = [
    ((1, 4, 1), [3, 1, 5], (3, 4, 5), (3, 4, 5)),
    ((3, "c", 1), [3, 6, 5], (3, "c", 5), (3, -1, 5)),
    (("c", 1), [2, 3, 1, 7], (2, 3, "c", 7), (2, 3, -1, 7)),
]
for (_dims, _target, _out, _sizes), _analysed in product(EXPANDED, (False, True)):
    row(
        f"Expand {_dims} {_analysed}",
        [node("Expand", "x", "t", out="e"), node("Add", "e", "e")],
        lambda x, s=_sizes: x.expand(s) * 2,
        {"x": normal(*(6 if d == "c" else int(d) for d in _dims))},
        {"x": _dims},
        {"t": ints(*_target)},
        values={"e": _out, "y": _out} if _analysed else {},
        sums=True,
        narrow={"c": 4},
    )
row(
    "Expand to the batch and to channels",
    [node("Shape", "x", out="s"), node("Expand", "token", "s", out="t"), node("Mul", "t", "x")],
    torch.mul,
    {"x": normal(3, 5, 6), "token": normal(1, 5, 1, seed=1)},
    {"x": ("N", 5, "c"), "token": (1, 5, 1)},
    values={"t": ("N", 5, "c"), "y": ("N", 5, "c")},
    narrow={"c": 2},
)
for _repeats in ((1, 1, 1), (2, 1, 3), (1, 2, 1)):
    _oracle, _options = partial(torch.Tensor.repeat, repeats=_repeats), {"sums": True, "narrow": {"c": 2}}
    one(f"Tile {_repeats}", "Tile", _oracle, normal(3, 5, 4), ("N", "c", 4), {"r": ints(*_repeats)}, **_options)

for _op in ("Expand", "ConstantOfShape"):  # states of zeros, as long as there are channels
    row(
        f"zeros by {_op}",
        [
            node("Shape", "x", out="shape"),
            node("Slice", "shape", "from", "to", out="n"),
            node("Concat", "n", "six", out="s", axis=0),
            node(_op, *(("zero", "s") if _op == "Expand" else ("s",)), out="h"),
            node("MatMul", "h", "w", out="m"),
            node("Add", "m", "x"),
        ],
        lambda x, w: (x * 0) @ w + x,
        {"x": normal(3, 6), "w": normal(6, 6, seed=1)},
        {"x": ("N", "c"), "w": ("c", "c")},
        {"from": ints(0), "to": ints(1), "six": ints(6), "zero": floats(0)},
        values={"h": ("N", "c")},
        narrow={"c": 4},
    )
row(
    "zeros of a shape that is given",
    [node("ConstantOfShape", "s", out="h"), node("MatMul", "h", "w", out="m"), node("Add", "m", "x")],
    lambda x, w: (x * 0) @ w + x,
    {"x": normal(3, 6), "w": normal(6, 6, seed=1)},
    {"x": ("N", 6), "w": (6, 6)},
    {"s": ints(1, 6)},
)


# -- reshapes of channels, and by the batch ---------------------------------------------------------------------------


def attention_views(x: torch.Tensor, heads: int, dims: int) -> torch.Tensor:
    q, k, v = x.reshape(x.shape[0], x.shape[1], 3, heads, dims).permute(2, 0, 3, 1, 4).unbind(0)
    return (q * k.exp() + v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


for _cut, _width, _apart, _joined_axis in (("heads", "3*g*6", ("g", 6), "g*6"), ("dims", "12*g", (4, "g"), "4*g")):
    # [N, T, 3·h·d] as [N, T, 3, h, d], whether whole heads or the same positions of every head are cut.
    row(
        f"attention by {_cut}",
        [
            node("Reshape", "x", "apart", out="r"),
            node("Transpose", "r", out="t", perm=[2, 0, 3, 1, 4]),
            pieces("Split", ["q1", "k1", "v1"], "t", "ones", axis=0),
            *[node("Squeeze", f"{c}1", "zero", out=c) for c in "qkv"],
            node("Exp", "k", out="e"),
            node("Mul", "q", "e", out="m"),
            node("Add", "m", "v", out="a"),
            node("Transpose", "a", out="b", perm=[0, 2, 1, 3]),
            node("Reshape", "b", "merged"),
        ],
        lambda x, by=_cut: attention_views(x, *((x.shape[2] // 18, 6) if by == "heads" else (4, x.shape[2] // 12))),
        {"x": normal(3, 5, 72)},
        {"x": ("N", 5, _width)},
        {"apart": ints(0, 5, 3, 4, 6), "ones": ints(1, 1, 1), "zero": ints(0), "merged": ints(0, 5, 24)},
        values={"r": ("N", 5, 3, *_apart), "y": ("N", 5, _joined_axis)},
        narrow={"g": 2},
    )
row(
    "channel shuffle",
    [
        node("Reshape", "x", "apart", out="r"),
        node("Transpose", "r", out="t", perm=[0, 2, 1, 3]),
        node("Reshape", "t", "merged", out="s"),
        node("Mul", "s", "x"),
    ],
    lambda x: x.reshape(len(x), 2, -1, 7).transpose(1, 2).reshape(x.shape) * x,
    {"x": normal(3, 12, 7)},
    {"x": ("N", "2*g", 7)},
    {"apart": ints(0, 2, 6, 7), "merged": ints(-1, 12, 7)},
    values={"r": ("N", 2, "g", 7), "s": ("N", "g*2", 7), "y": ("N", "g*2", 7)},
    narrow={"g": 4},
)
one(
    "batch and tokens merged, and two channel axes",
    "Reshape",
    lambda x: x.reshape(x.shape[0] * 5, -1),
    normal(3, 5, 4, 6),
    ("N", 5, "h", 6),
    {"s": ints(-1, 24)},
    values={"y": ("N", "h*6")},
    narrow={"h": 2},
)
row(
    "similarities of all samples: the batch twice",
    [
        node("Transpose", "x", perm=[1, 0], out="t"),
        node("MatMul", "x", "t", out="m"),
        node("Reshape", "m", "s", out="r"),
        node("Reshape", "r", "flat", out="f"),
        node("Tanh", "f"),
    ],
    lambda x: (x @ x.T).reshape(-1).tanh(),
    {"x": normal(3, 5)},
    {"x": ("N", "c")},
    {"s": ints(0, 1, -1), "flat": ints(-1)},
    values={"m": ("N", "N"), "r": ("N", 1, "N")},
    narrow={"c": 3},
)

BATCH = [node("Shape", "x", out="shape"), node("Gather", "shape", "first", out="n")]
"""The batch as `n`, computed from the input's shape."""


@pytest.mark.parametrize(("batches", "rest"), [(1, [-1]), (1, [6, 20]), (1, [2, 3, -1]), (6, [4, 5]), (6, [-1])])
def test_a_reshape_to_a_multiple_of_the_batch(batches: int, rest: list[int]) -> None:
    x = normal(2, 6, 4, 5)
    nodes = [
        *BATCH,
        node("Mul", "n", "times", out="m"),
        node("Concat", "m", "rest", out="s", axis=0),
        node("Reshape", "x", "s"),
    ]
    constants = {"first": ints(0), "times": ints(batches), "rest": ints(*rest)}
    session = gradient_session(nodes, {"x": x}, {"x": ("N", *x.shape[1:])}, constants)
    want = x.reshape(2 * batches, *rest)
    got = session.run({"x": x, "dy": 2 * want})
    np.testing.assert_array_equal(want, got["result"])
    np.testing.assert_array_equal(2 * x, got["x::gradient"])


# -- split, slice, concat ---------------------------------------------------------------------------------------------

for _axis, _middle in ((1, "c2"), (-1, "c1")):
    _data = {"a": normal(2, 3, 4), "b": normal(2, 3 if _axis == -1 else 5, 4, seed=1), "c": normal(2, 3, 4, seed=2)}
    _shapes = {"a": ("N", "c1", 4), "b": ("N", _middle, 4), "c": ("N", "c1", 4)}
    _nodes = [node("Concat", "a", "b", "c", axis=_axis)]
    row(f"Concat {_axis}", _nodes, lambda *x, a=_axis: torch.cat(x, a), _data, _shapes)

_K = normal(3, 2, 4, seed=3)


def split_of_groups(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    p, q, r, _ = x.split([len(a), 5, len(b), 2], 1)
    return torch.cat([r * b, q, p * a, torch.tensor(_K, dtype=x.dtype)], 1)


row(
    "Split of several groups, whose last piece nothing reads",
    [
        pieces("Split", ["p", "q", "r", "s"], "x", "sizes", axis=1),
        node("Mul", "p", "a", out="pa"),
        node("Mul", "r", "b", out="rb"),
        node("Concat", "rb", "q", "pa", "k", axis=1),
    ],
    split_of_groups,
    {"a": normal(8, 1, seed=4), "b": normal(6, 1, seed=4), "x": normal(3, 21, 4)},
    {"a": ("f*2", 1), "b": ("g", 1), "x": (3, "f*2+5+g+2", 4)},
    {"sizes": ints(8, 5, 6, 2), "k": _K},
    sums=True,
    narrow={"f": 2, "g": 3},
)
row(
    "Split without sizes",
    [pieces("Split", ["p", "q"], "x", axis=-1), node("Sigmoid", "q", out="s"), node("Mul", "p", "s")],
    lambda x: F.glu(x, -1),
    {"x": normal(3, 4, 12)},
    {"x": ("N", 4, "2*g")},
    narrow={"g": 3},
)
for _index, (_begin, _end) in enumerate(pairwise([0, 8, 10, 15])):
    row(
        f"slice of whole groups {_index}",
        [
            node("Slice", "x", "b", "e", "a", out="s"),
            node("Exp", "s", out="t"),
            node("ReduceSum", "w", out="sw", keepdims=0),
            node("Mul", "t", "sw"),
        ],
        lambda w, x, i=_index: x.split([x.shape[1] - 2 - len(w), 2, len(w)], 1)[i].exp() * w.sum(),
        {"w": normal(5, seed=1), "x": normal(3, 15, 4)},
        {"w": ("d",), "x": ("N", "2*c*2+2+d", 4)},
        {"b": ints(_begin), "e": ints(_end), "a": ints(1)},
        narrow={"c": 1, "d": 2},
    )
_STEPS = {"zero": ints(0), "one": ints(1), "two": ints(2), "end": ints(2**62)}
row(
    "every second channel where each has two indices",
    [
        node("Slice", "x", "zero", "end", "one", "two", out="p"),
        node("Slice", "x", "one", "end", "one", "two", out="q"),
        node("Sigmoid", "q", out="s"),
        node("Mul", "p", "s"),
    ],
    lambda x: x[:, ::2] * x[:, 1::2].sigmoid(),
    {"x": normal(3, 12, 4)},
    {"x": ("N", "g*2", 4)},
    _STEPS,
    narrow={"g": 2},
)


# -- gather and scatter -----------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_gathers_by_constant_indices(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 6))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), max_size=2)))
    count = int(np.prod(shape))
    picked = data.draw(st.lists(st.integers(-size, size - 1), min_size=count, max_size=count))
    axis = data.draw(st.sampled_from([1, 2, -1]))
    index = np.array(picked, np.int64).reshape(shape)
    dims: list[int | str] = ["N", "c", 4]
    dims.insert(axis % 4, size)
    x = normal(*({"N": 3, "c": 2}.get(str(d), d) for d in dims))

    def oracle(x: torch.Tensor) -> torch.Tensor:
        flat = x.index_select(axis, torch.tensor(index.reshape(-1) % size))
        at = axis % 4
        return flat.reshape(*x.shape[:at], *shape, *x.shape[at + 1 :])

    nodes = [node("Gather", "x", "i", axis=axis)]
    check(nodes, oracle, {"x": x}, {"x": tuple(dims)}, {"i": index}, sums=True, narrow={"c": 1})


def picks(high: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(1).integers(0, high, shape)


for _shape in ((3,), (3, 5)):
    _tokens = picks(4, *_shape)
    _tokens.flat[0] = -1
    _data, _shapes = {"w": normal(9, 6), "t": _tokens}, {"w": (9, "d"), "t": ("N", *_shape[1:])}
    row(f"embedding {_shape}", [node("Gather", "w", "t")], lambda w, t: w[t], _data, _shapes, narrow={"d": 4})
row(
    "columns by indices that are data",
    [node("Gather", "w", "t", axis=1)],
    lambda w, t: w[:, t],
    {"w": normal(6, 9), "t": picks(9, 3, 4)},
    {"w": ("d", 9), "t": ("N", 4)},
    narrow={"d": 4},
)
row(
    "GatherElements",
    [node("GatherElements", "x", "i", axis=2)],
    lambda x, i: x.gather(2, i),
    {"x": normal(3, 4, 6), "i": picks(6, 3, 4, 5)},
    {"x": ("N", 4, 6), "i": ("N", 4, 5)},
    narrow={},
)
row(
    "GatherND",
    [node("GatherND", "x", "i")],
    lambda x, i: x[i[:, 0], i[:, 1]],
    {"x": normal(4, 5, 6), "i": picks(4, 7, 2)},
    {"x": (4, 5, "c"), "i": (7, 2)},
    narrow={"c": 2},
)
row(
    "GatherND within samples",
    [node("GatherND", "x", "i", batch_dims=1)],
    lambda x, i: x[torch.arange(len(x))[:, None], i[..., 0]],
    {"x": normal(4, 5, 6), "i": picks(4, 4, 3, 1)},
    {"x": ("N", 5, "c"), "i": ("N", 3, 1)},
    narrow={"c": 2},
)
for _largest in (0, 1):
    row(
        f"TopK {_largest}",
        [pieces("TopK", ["y", "places"], "x", "k", axis=1, largest=_largest)],
        lambda x, largest=_largest: x.topk(3, 1, largest=bool(largest)).values,
        {"x": normal(3, 7, 4)},
        {"x": ("N", 7, "c")},
        {"k": ints(3)},
        narrow={"c": 2},
    )

row(
    "numbers made of TopK's indices",
    [pieces("TopK", ["v", "places"], "x", "k", axis=1), node("Cast", "places", out="p", to=1), node("Mul", "v", "p")],
    lambda x: x.topk(3, 1).values * x.topk(3, 1).indices,
    {"x": normal(3, 7, 4)},
    {"x": ("N", 7, "c")},
    {"k": ints(3)},
    narrow={"c": 2},
)


def other_order(a: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    f, two, g = x.split([len(a), 2, x.shape[1] - 2 - len(a)], 1)
    return torch.cat([f, g, two, two[:, :1], g], 1) * w * a.sum()


row(
    "whole groups of channels in another order",
    [
        node("Gather", "x", "i", axis=1, out="g"),
        node("Mul", "g", "w", out="m"),
        node("ReduceSum", "a", out="s", keepdims=0),
        node("Mul", "m", "s"),
    ],
    other_order,
    {"a": normal(3, seed=2), "x": normal(3, 12, 4), "w": normal(20, 1, seed=1)},
    {"a": ("f",), "x": ("N", "f+2+g", 4), "w": ("f+g+3+g", 1)},
    {"i": ints(0, 1, 2, *range(5, 12), 3, 4, 3, *range(5, 12))},
    sums=True,
    narrow={"f": 2, "g": 3},
)
row(
    "a fixed index among channels",
    [node("Gather", "x", "i", axis=1, out="g"), node("ReduceSum", "a", out="s", keepdims=0), node("Mul", "g", "s")],
    lambda a, x: x[:, -2] * a.sum(),
    {"a": normal(3, seed=2), "x": normal(3, 5, 4)},
    {"a": ("f",), "x": ("N", "f+2", 4)},
    {"i": np.array(-2, np.int64)},
    sums=True,
    narrow={"f": 1},
)

for _reduction in ("none", "add"):
    row(
        f"ScatterND {_reduction}",
        [node("Exp", "x", out="e"), node("ScatterND", "e", "i", "u", reduction=_reduction)],
        lambda x, u, r=_reduction: x.exp().index_put(
            (torch.tensor([0, 3]), torch.tensor([5, 2])), u, accumulate=r == "add"
        ),
        {"x": normal(5, 6, 4), "u": normal(2, 4, seed=1)},
        {"x": (5, 6, "c"), "u": (2, "c")},
        {"i": np.array([[0, 5], [3, 2]])},
        narrow={"c": 2},
    )
_INDICES = np.array([[0, 5], [3, 2], [1, 0]])
row(
    "ScatterElements",
    [node("ScatterElements", "x", "i", "u", axis=1)],
    lambda x, u: x.scatter(1, torch.tensor(_INDICES), u),
    {"x": normal(3, 6), "u": normal(3, 2, seed=1)},
    None,
    {"i": _INDICES},
)


def kept_boxes_mask(boxes: torch.Tensor, scores: torch.Tensor, max_boxes: int, overlap: float) -> torch.Tensor:
    """1 for boxes that overlap with no better one that is kept, as a mask [N, boxes]."""
    low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
    common = torch.minimum(high[:, :, None], high[:, None]) - torch.maximum(low[:, :, None], low[:, None])
    shared, area = common.clamp(min=0).prod(-1), (high - low).prod(-1)
    ratio = shared / (area[:, :, None] + area[:, None] - shared)
    mask = torch.zeros_like(scores)
    for row, n in zip(mask, range(len(mask)), strict=True):
        for i in scores[n].argsort(descending=True):
            if row.sum() < max_boxes and not (ratio[n, i] * row > overlap).any():
                row[i] = 1
    return mask


_BOXES = normal(3, 12, 4)
row(
    "boxes that are kept",
    [
        node("NonMaxSuppression", "b", "s", "most", "overlap", out="k"),
        node("Gather", "k", "pair", axis=1, out="p"),
        node("GatherND", "b", "p", out="g"),
        node("Mul", "g", "g", out="q"),
        node("Sub", "b", "b", out="z"),
        node("ScatterND", "z", "p", "q"),
    ],
    lambda b, s: b**2 * kept_boxes_mask(b.detach(), s[:, 0].detach(), 6, 0.3)[..., None],
    {"b": _BOXES, "s": normal(3, 1, 12, seed=1)},
    {"b": ("N", 12, 4), "s": ("N", 1, 12)},
    {"most": ints(6), "overlap": np.array([0.3], np.float32), "pair": ints(0, 2)},
    frozen=["s"],
    narrow={},
)

for _upper, _function in enumerate((torch.tril, torch.triu)):
    _oracle, _options = partial(_function, diagonal=1), {"sums": True, "narrow": {}, "upper": _upper}
    one(f"Trilu {_upper}", "Trilu", _oracle, normal(3, 4, 5), ("N", 4, 5), {"k": np.array(1, np.int64)}, **_options)
row(
    "OneHot",
    [node("OneHot", "t", "depth", "values", out="o"), node("MatMul", "o", "w")],
    lambda w, t: F.one_hot(t, 6).to(w.dtype) @ w,
    {"w": normal(6, 5), "t": np.array([0, 3, 3, 5])},
    {"w": (6, "c"), "t": ("N",)},
    {"depth": ints(6), "values": np.array([0, 1], np.float32)},
    sums=True,
    narrow={"c": 2},
)


# -- resizing, space and depth ----------------------------------------------------------------------------------------

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nearest": ({"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, {}),
    "half_pixel": ({"coordinate_transformation_mode": "half_pixel"}, {"align_corners": False}),
    "align_corners": ({"coordinate_transformation_mode": "align_corners"}, {"align_corners": True}),
    "cubic": (
        {"coordinate_transformation_mode": "half_pixel", "cubic_coeff_a": -0.75},
        {"mode": "bicubic", "align_corners": False},
    ),
    "cubic_corners": (
        {"coordinate_transformation_mode": "align_corners", "cubic_coeff_a": -0.75},
        {"mode": "bicubic", "align_corners": True},
    ),
}
"""Attributes of a Resize, and torch's arguments."""


def resize(kind: str, rank: int, after: tuple[int, ...]) -> tuple[dict[str, Any], Oracle]:
    attrs, how = KINDS[kind]
    mode = "cubic" if "cubic" in kind else "nearest" if kind == "nearest" else "linear"
    theirs = {1: "linear", 2: "bilinear", 3: "trilinear"}[rank] if mode == "linear" else "nearest"
    return {"mode": mode, **attrs}, lambda x: F.interpolate(x, after, **{"mode": theirs, **how})


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_resizing_to_a_size(kind: str, data: st.DataObject) -> None:
    rank = data.draw(st.sampled_from([2] if "cubic" in kind else [1, 2, 2, 3] if kind == "nearest" else [2, 2, 3]))
    before = tuple(data.draw(st.integers(1, 6)) for _ in range(rank))
    after = tuple(data.draw(st.integers(1, 9)) for _ in range(rank))
    attrs, oracle = resize(kind, rank, after)
    # The batch of the traced graph isn't three: sizes of the batch and of channels come from the input.
    nodes, x = [node("Resize", "x", "", "", "sizes", **attrs)], normal(3, 4, *before)
    check(nodes, oracle, {"x": x}, {"x": x.shape}, {"sizes": ints(3, 4, *after)}, sums="cubic" not in kind)


for _kind, (_before, _times) in product(KINDS, (((4, 5), (2.0, 2.0)), ((3, 4), (2.0, 3.0)), ((6, 4), (0.5, 1.5)))):
    _attrs, _oracle = resize(_kind, 2, tuple(int(b * t) for b, t in zip(_before, _times, strict=True)))
    row(
        f"{_kind} {_times}",
        [node("Resize", "x", "", "scales", **_attrs)],
        _oracle,
        {"x": normal(3, 4, *_before)},
        {"x": ("N", "c", *_before)},
        {"scales": np.array([1, 1, *_times], np.float32)},
        sums="cubic" not in _kind,
        narrow={"c": 2},
    )


def by_depth(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, 2, 2, c // 4, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // 4, 2 * h, 2 * w)


def places_to_channels(x: torch.Tensor) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(n, 4 * c, h // 2, w // 2)


for _size in (2, 3):
    _dims, _options = ("N", f"c*{_size**2}", 2, 3), {"narrow": {"c": 1}, "blocksize": _size, "mode": "CRD"}
    _oracle = partial(F.pixel_shuffle, upscale_factor=_size)
    one(f"pixel shuffle {_size}", "DepthToSpace", _oracle, normal(3, 2 * _size**2, 2, 3), _dims, **_options)
_options = {"narrow": {"c": 2}, "blocksize": 2}
one("depth to space", "DepthToSpace", by_depth, normal(3, 12, 2, 3), ("N", "4*c", 2, 3), **_options)
one("space to depth", "SpaceToDepth", places_to_channels, normal(3, 5, 4, 6), ("N", "c", 4, 6), **_options)


# -- what is refused --------------------------------------------------------------------------------------------------

BY_BATCH = {"first": ints(0), "zero": ints(0), "axis": ints(1), "none": ints(0, 0, 0), "six": ints(6), "rest": ints(-1)}
AT_ROWS: Arrays = {"b": ints(1), "e": ints(4), "a": ints(1)}
CORNERS = np.array([0, 0, 0, 0, 1, 1, 0.5, 1], np.float32)
REFUSED: list[tuple[str, list[Node], Dims, Arrays, Shapes]] = [
    (
        "the_Reshape.*no linear form of the batch",
        [
            *BATCH,
            node("Div", "six", "n", out="m"),
            node("Concat", "m", "rest", out="s", axis=0),
            node("Reshape", "x", "s"),
        ],
        ("N", 6),
        BY_BATCH,
        {},
    ),
    ("the_Slice.*depends on the batch", [*BATCH, node("Slice", "x", "zero", "n", "axis")], ("N", 6), BY_BATCH, {}),
    (
        "the_Pad.*depends on the batch",
        [*BATCH, node("Concat", "none", "n", out="pads", axis=0), node("Pad", "x", "pads")],
        ("N", 6),
        BY_BATCH,
        {},
    ),
    ("the_Slice.*nothing", [node("Slice", "x", "e", "e", "a")], ("N", 6), AT_ROWS, {}),
    ("the_Slice.*run of channels", [node("Slice", "x", "b", "e", "a")], ("N", "c"), AT_ROWS, {}),
    ("the_Slice.*step", [node("Slice", "x", "zero", "end", "one", "two")], ("N", "c"), _STEPS, {}),
    ("the_Reshape", [node("Reshape", "x", "s")], ("N", "c", 4, 5), {"s": ints(0, 2, 3, 4, 5)}, {}),
    (
        "the_Reshape.*splits",
        [node("Reshape", "x", "s")],
        ("N", 5, "h", "d"),
        {"s": ints(0, 0, 24)},
        {"y": ("N", 5, 24)},
    ),
    (
        "the_Split.*run of channels",
        [pieces("Split", ["p", "q"], "x", axis=1), node("Add", "p", "q")],
        ("N", "c"),
        {},
        {},
    ),
    ("the_Gather.*single channels", [node("Gather", "x", "i", axis=1)], ("N", "c"), {"i": ints(4, 0)}, {}),
    ("the_Pad.*reflects", [node("Pad", "x", "p", mode="reflect")], ("N", 3), {"p": ints(0, 3, 0, 0)}, {}),
    ("the_Pad.*got 4", [node("Pad", "x", "p", mode="reflect")], ("N", 3), {"p": ints(0, 0, 0, 4)}, {}),
    (
        "the_Resize",
        [node("Resize", "x", "", "scales", mode="nearest")],
        ("N", "c", 3, 3),
        {"scales": np.array([1, 2, 1, 1], np.float32)},
        {},
    ),
    (
        "the_Resize",
        [node("Resize", "x", "roi", "", "sizes", mode="linear", coordinate_transformation_mode="tf_crop_and_resize")],
        (2, 4, 3, 3),
        {"roi": CORNERS, "sizes": ints(2, 4, 3, 3)},
        {},
    ),
    ("the_DepthToSpace", [node("DepthToSpace", "x", blocksize=2)], ("N", "c", 2, 3), {}, {}),
]


@pytest.mark.parametrize(("message", "nodes", "dims", "constants", "values"), REFUSED)
def test_what_has_no_form_at_every_width_is_refused_by_name(
    message: str, nodes: list[Node], dims: Dims, constants: Arrays, values: Shapes
) -> None:
    x = normal(*({"N": 2, "c": 12, "h": 4, "d": 6}.get(str(d), d) for d in dims))
    with pytest.raises(ModelError, match=message):
        gradient_session(nodes, {"x": x}, {"x": dims}, constants, values)


def test_a_reshape_apart_whose_sizes_all_vary_is_refused_by_name() -> None:
    """Neither 0 nor -1 can say two sizes."""
    nodes = [node("Reshape", "x", "s", out="r"), node("Mul", "r", "w")]
    data = {"x": normal(3, 20), "w": normal(4, 1, seed=1)}
    values = {"r": ("N", "c", 5), "y": ("N", "c", 5)}
    with pytest.raises(ModelError, match="the_Reshape"):
        gradient_session(nodes, data, {"x": ("N", "cd"), "w": ("c", 1)}, {"s": ints(0, 4, 5)}, values)
