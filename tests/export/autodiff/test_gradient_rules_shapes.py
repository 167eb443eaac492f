"""Gradients of operators that move, pick, repeat and join elements, at two widths of one graph, against torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from fedprune_export.ir.graph import Node
from support.oracles.differentiation import Arrays, Oracle, check, differentiated, floats, ints, node, normal

pytestmark = pytest.mark.torch

F = torch.nn.functional
few = settings(max_examples=30, deadline=None)


def pieces(op: str, outputs: Sequence[str], *inputs: str, **attrs: Any) -> Node:
    return Node(op, list(inputs), list(outputs), attrs, f"the_{op}")


# -- reshape --------------------------------------------------------------------------------------------------------


def attention_views(x: torch.Tensor, heads: int, dims: int) -> torch.Tensor:
    q, k, v = x.reshape(x.shape[0], x.shape[1], 3, heads, dims).permute(2, 0, 3, 1, 4).unbind(0)
    return (q * k.exp() + v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)


@pytest.mark.parametrize("cut", ["heads", "dims"])
def test_channels_split_into_heads_of_which_either_factor_varies(cut: str) -> None:
    """[N, T, 3·h·d] as [N, T, 3, h, d], whether whole heads or the same positions of every head are cut."""
    heads, dims = 4, 6
    width = "3*g*6" if cut == "heads" else "12*g"
    apart = ("g", 6) if cut == "heads" else (4, "g")
    nodes = [
        node("Reshape", "x", "apart", out="r"),
        node("Transpose", "r", out="t", perm=[2, 0, 3, 1, 4]),
        pieces("Split", ["q1", "k1", "v1"], "t", "ones", axis=0),
        *[node("Squeeze", f"{c}1", "zero", out=c) for c in "qkv"],
        node("Exp", "k", out="e"),
        node("Mul", "q", "e", out="m"),
        node("Add", "m", "v", out="a"),
        node("Transpose", "a", out="b", perm=[0, 2, 1, 3]),
        node("Reshape", "b", "merged"),
    ]
    constants = {"apart": ints(0, 5, 3, 4, 6), "ones": ints(1, 1, 1), "zero": ints(0), "merged": ints(0, 5, 24)}
    values = {"r": ("N", 5, 3, *apart), "y": ("N", 5, "g*6" if cut == "heads" else "4*g")}
    oracle = lambda x: (  # noqa: E731
        attention_views(x, x.shape[2] // 18, 6) if cut == "heads" else attention_views(x, 4, x.shape[2] // 12)
    )
    data, shapes = {"x": normal(3, 5, 3 * heads * dims)}, {"x": ("N", 5, width)}
    check(nodes, oracle, data, shapes, constants, values=values, narrow={"g": 2})


def test_channel_shuffle() -> None:
    nodes = [
        node("Reshape", "x", "apart", out="r"),
        node("Transpose", "r", out="t", perm=[0, 2, 1, 3]),
        node("Reshape", "t", "merged", out="s"),
        node("Mul", "s", "x"),
    ]
    constants = {"apart": ints(0, 2, 6, 7), "merged": ints(-1, 12, 7)}
    values = {"r": ("N", 2, "g", 7), "s": ("N", "g*2", 7), "y": ("N", "g*2", 7)}
    oracle = lambda x: x.reshape(len(x), 2, -1, 7).transpose(1, 2).reshape(x.shape) * x  # noqa: E731
    data, shapes = {"x": normal(3, 12, 7)}, {"x": ("N", "2*g", 7)}
    check(nodes, oracle, data, shapes, constants, values=values, narrow={"g": 4})


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -4])
def test_flatten_in_all_forms(axis: int) -> None:
    oracle = lambda x: x.reshape(int(np.prod(x.shape[:axis])), -1).exp()  # noqa: E731
    nodes = [node("Flatten", "x", axis=axis, out="f"), node("Exp", "f")]
    check(nodes, oracle, {"x": normal(3, 4, 2, 5)}, {"x": ("N", "c", 2, "d")}, narrow={"c": 3, "d": 2})


def test_a_reshape_merges_batch_and_tokens_and_two_channel_axes() -> None:
    constants = {"s": ints(-1, 24)}
    data, shapes = {"x": normal(3, 5, 4, 6)}, {"x": ("N", 5, "h", "d")}
    oracle = lambda x: x.reshape(x.shape[0] * 5, -1)  # noqa: E731
    values = {"y": ("N", "h*6")}
    check([node("Reshape", "x", "s")], oracle, data, {"x": ("N", 5, "h", 6)}, constants, values=values, narrow={"h": 2})
    with pytest.raises(ModelError, match=r"the_Reshape.*splits"):
        differentiated([node("Reshape", "x", "s")], data, shapes, {"s": ints(0, 0, 24)}, {"y": ("N", 5, 24)})


def test_a_reshape_of_a_value_that_follows_the_batch_twice() -> None:
    """Similarities of all samples with all: what the target doesn't say, a trace does."""
    nodes = [
        node("Transpose", "x", perm=[1, 0], out="t"),
        node("MatMul", "x", "t", out="m"),
        node("Reshape", "m", "s", out="r"),
        node("Tanh", "r"),
    ]
    data, shapes = {"x": normal(3, 5)}, {"x": ("N", "c")}
    values = {"m": ("N", "N"), "r": ("N", 1, "N"), "y": ("N", 1, "N")}
    oracle = lambda x: (x @ x.T)[:, None].tanh()  # noqa: E731
    check(nodes, oracle, data, shapes, {"s": ints(0, 1, -1)}, values=values, narrow={"c": 3})


def test_a_reshape_apart_whose_sizes_all_vary() -> None:
    """Neither 0 nor -1 can say two sizes: one is computed at run time from a weight that has it."""
    nodes = [node("Reshape", "x", "s", out="r"), node("Mul", "r", "w")]
    data = {"x": normal(3, 20), "w": normal(4, 1, seed=1)}
    values = {"r": ("N", "c", "d"), "y": ("N", "c", "d")}
    shapes = {"x": ("N", "cd"), "w": ("c", 1)}
    with pytest.raises(ModelError, match="the_Reshape"):
        differentiated(nodes, data, shapes, {"s": ints(0, 4, 5)}, values | {"r": ("N", "c", 5), "y": ("N", "c", 5)})


# -- split, slice, concat -------------------------------------------------------------------------------------------


def test_split_along_channels_of_several_groups() -> None:
    """The last piece is read by nothing."""
    nodes = [
        pieces("Split", ["p", "q", "r", "s"], "x", "sizes", axis=1),
        node("Mul", "p", "a", out="pa"),
        node("Mul", "r", "b", out="rb"),
        node("Concat", "rb", "q", "pa", "k", axis=1),
    ]
    constants = {"sizes": ints(8, 5, 6, 2), "k": normal(3, 2, 4, seed=3)}
    data = {"a": normal(8, 1, seed=4), "b": normal(6, 1, seed=4), "x": normal(3, 21, 4)}
    shapes = {"a": ("f*2", 1), "b": ("g", 1), "x": (3, "f*2+5+g+2", 4)}

    def oracle(a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        p, q, r, _ = x.split([len(a), 5, len(b), 2], 1)
        return torch.cat([r * b, q, p * a, torch.tensor(constants["k"], dtype=x.dtype)], 1)

    check(nodes, oracle, data, shapes, constants, sums=True, narrow={"f": 2, "g": 3})


def test_split_into_equal_parts_without_sizes() -> None:
    nodes = [pieces("Split", ["p", "q"], "x", axis=-1), node("Sigmoid", "q", out="s"), node("Mul", "p", "s")]
    oracle = lambda x: F.glu(x, -1)  # noqa: E731
    check(nodes, oracle, {"x": normal(3, 4, 12)}, {"x": ("N", 4, "2*g")}, narrow={"g": 3})


def test_split_inside_a_run_of_channels_is_refused_by_name() -> None:
    nodes = [pieces("Split", ["p", "q"], "x", axis=1), node("Add", "p", "q")]
    with pytest.raises(ModelError, match=r"the_Split.*run of channels"):
        differentiated(nodes, {"x": normal(3, 6)}, {"x": ("N", "c")}, {})


SLICES: dict[str, tuple[dict[str, Any], Oracle]] = {
    "from": ({"b": ints(2), "e": ints(2**62), "a": ints(2)}, lambda x: x[:, :, 2:]),
    "negative": ({"b": ints(-3), "e": ints(-1), "a": ints(-1)}, lambda x: x[..., -3:-1]),
    "steps": ({"b": ints(1), "e": ints(7), "a": ints(2), "s": ints(3)}, lambda x: x[:, :, 1:7:3]),
    "flip": ({"b": ints(-1), "e": ints(-(2**62)), "a": ints(2), "s": ints(-1)}, lambda x: x.flip(2)),
    "back": ({"b": ints(6), "e": ints(1), "a": ints(2), "s": ints(-2)}, lambda x: x[:, :, 2:7].flip(2)[:, :, ::2]),
    "two_axes": (
        {"b": ints(1, 4), "e": ints(6, 0), "a": ints(2, 3), "s": ints(1, -2)},
        lambda x: x[:, :, 1:6, 1:5].flip(3)[..., ::2],
    ),
    "no_axes": ({"b": ints(0, 0, 1), "e": ints(2**31, 2**31, 4)}, lambda x: x[:, :, 1:4]),
    "whole": ({"b": ints(0), "e": ints(2**31), "a": ints(1)}, lambda x: x * 1),
}


@pytest.mark.parametrize("case", SLICES)
def test_slices(case: str) -> None:
    constants, oracle = SLICES[case]
    nodes = [node("Slice", "x", *constants, out="s"), node("Exp", "s")]
    check(
        nodes, lambda x: oracle(x).exp(), {"x": normal(3, 4, 7, 5)}, {"x": ("N", "c", 7, 5)}, constants, narrow={"c": 3}
    )


@pytest.mark.parametrize("part", [0, 1, 2])
def test_slices_of_whole_groups_of_channels(part: int) -> None:
    ends = [0, 8, 10, 15]
    constants = {"b": ints(ends[part]), "e": ints(ends[part + 1]), "a": ints(1)}
    nodes = [
        node("Slice", "x", "b", "e", "a", out="s"),
        node("Exp", "s", out="t"),
        node("ReduceSum", "w", out="sw", keepdims=0),
        node("Mul", "t", "sw"),
    ]
    data, shapes = {"w": normal(5, seed=1), "x": normal(3, 15, 4)}, {"w": ("d",), "x": ("N", "2*c*2+2+d", 4)}

    def oracle(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        first = x.shape[1] - 2 - len(w)
        parts = x.split([first, 2, len(w)], 1)
        return parts[part].exp() * w.sum()

    check(nodes, oracle, data, shapes, constants, narrow={"c": 1, "d": 2})


def test_a_slice_inside_a_run_of_channels_is_refused_by_name() -> None:
    constants = {"b": ints(1), "e": ints(4), "a": ints(1)}
    with pytest.raises(ModelError, match=r"the_Slice.*run of channels"):
        differentiated([node("Slice", "x", "b", "e", "a")], {"x": normal(3, 6)}, {"x": ("N", "c")}, constants)


# -- gather ---------------------------------------------------------------------------------------------------------


@few
@given(data=st.data())
def test_gathers_by_constant_indices(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 6))
    rank = data.draw(st.integers(0, 2))
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    count = int(np.prod(shape))
    picked = data.draw(st.lists(st.integers(-size, size - 1), min_size=count, max_size=count))
    axis = data.draw(st.sampled_from([1, 2, -1]))
    index = np.array(picked, np.int64).reshape(shape)
    x = normal(*(3, size, 2, 4) if axis == 1 else (3, 2, size, 4) if axis == 2 else (3, 2, 4, size))
    dims = ("N", size, "c", 4) if axis == 1 else ("N", "c", size, 4) if axis == 2 else ("N", "c", 4, size)

    def oracle(x: torch.Tensor) -> torch.Tensor:
        flat = x.index_select(axis, torch.tensor(index.reshape(-1) % size))
        at = axis % 4
        return flat.reshape(*x.shape[:at], *shape, *x.shape[at + 1 :])

    nodes = [node("Gather", "x", "i", axis=axis)]
    check(nodes, oracle, {"x": x}, {"x": dims}, {"i": index}, sums=True, narrow={"c": 1})


@pytest.mark.parametrize("shape", [(3,), (3, 5)])
def test_an_embedding_adds_up_the_gradients_of_equal_tokens(shape: tuple[int, ...]) -> None:
    tokens = np.random.default_rng(1).integers(0, 4, shape)
    tokens.flat[0] = -1
    data = {"w": normal(9, 6), "t": tokens}
    shapes = {"w": (9, "d"), "t": ("N", *shape[1:])}
    check([node("Gather", "w", "t")], lambda w, t: w[t], data, shapes, narrow={"d": 4})


def test_columns_by_indices_that_are_data() -> None:
    data = {"w": normal(6, 9), "t": np.random.default_rng(1).integers(0, 9, (3, 4))}
    shapes = {"w": ("d", 9), "t": ("N", 4)}
    check([node("Gather", "w", "t", axis=1)], lambda w, t: w[:, t], data, shapes, narrow={"d": 4})


def test_gather_elements() -> None:
    data = {"x": normal(3, 4, 6), "i": np.random.default_rng(1).integers(0, 6, (3, 4, 5))}
    shapes = {"x": ("N", 4, 6), "i": ("N", 4, 5)}
    nodes = [node("GatherElements", "x", "i", axis=2)]
    check(nodes, lambda x, i: x.gather(2, i), data, shapes, narrow={})


@pytest.mark.parametrize("batches", [0, 1])
def test_gather_nd(batches: int) -> None:
    places = np.random.default_rng(1).integers(0, 4, (4, 3, 1) if batches else (7, 2))

    def oracle(x: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
        return x[torch.arange(len(x))[:, None], i[..., 0]] if batches else x[i[:, 0], i[:, 1]]

    shapes = {"x": ("N", 5, "c"), "i": ("N", 3, 1)} if batches else {"x": (4, 5, "c"), "i": (7, 2)}
    nodes = [node("GatherND", "x", "i", batch_dims=batches)]
    check(nodes, oracle, {"x": normal(4, 5, 6), "i": places}, shapes, narrow={"c": 2})


@pytest.mark.parametrize("largest", [0, 1])
def test_top_k(largest: int) -> None:
    nodes = [pieces("TopK", ["y", "places"], "x", "k", axis=1, largest=largest)]
    oracle = lambda x: x.topk(3, 1, largest=bool(largest)).values  # noqa: E731
    check(nodes, oracle, {"x": normal(3, 7, 4)}, {"x": ("N", 7, "c")}, {"k": ints(3)}, narrow={"c": 2})


# -- expand, tile, pad ----------------------------------------------------------------------------------------------

EXPANDED: dict[str, tuple[tuple[int | str, ...], list[int], tuple[int | str, ...], tuple[int, ...]]] = {
    "numbers": ((1, 4, 1), [3, 1, 5], (3, 4, 5), (3, 4, 5)),
    "channels_stay": ((3, "c", 1), [3, 6, 5], (3, "c", 5), (3, -1, 5)),
    "new_axes": (("c", 1), [2, 3, 1, 7], (2, 3, "c", 7), (2, 3, -1, 7)),
}


@pytest.mark.parametrize("case", EXPANDED)
@pytest.mark.parametrize("analysed", [False, True])
def test_expand(case: str, analysed: bool) -> None:
    dims, target, out, sizes = EXPANDED[case]
    x = normal(*(6 if d == "c" else int(d) for d in dims))

    def oracle(x: torch.Tensor) -> torch.Tensor:
        return x.expand(sizes) * 2

    nodes = [node("Expand", "x", "t", out="e"), node("Add", "e", "e")]
    values = {"e": out, "y": out} if analysed else {}
    check(nodes, oracle, {"x": x}, {"x": dims}, {"t": ints(*target)}, values=values, sums=True, narrow={"c": 4})


def test_expand_to_the_batch_and_to_channels() -> None:
    """A class token is repeated for every sample, a number for every channel."""
    nodes = [
        node("Shape", "x", out="s"),
        node("Expand", "token", "s", out="t"),
        node("Mul", "t", "x"),
    ]
    data = {"x": normal(3, 5, 6), "token": normal(1, 5, 1, seed=1)}
    shapes = {"x": ("N", 5, "c"), "token": (1, 5, 1)}
    values = {"t": ("N", 5, "c"), "y": ("N", 5, "c")}
    check(nodes, lambda x, token: token * x, data, shapes, values=values, narrow={"c": 2})


@pytest.mark.parametrize("repeats", [(1, 1, 1), (2, 1, 3), (1, 2, 1)])
def test_tile(repeats: tuple[int, ...]) -> None:
    dims = ("N", "c", 4)
    check(
        [node("Tile", "x", "r")], lambda x: x.repeat(repeats), {"x": normal(3, 5, 4)}, {"x": dims},
        {"r": ints(*repeats)}, sums=True, narrow={"c": 2},
    )  # fmt: skip


PADS: dict[str, tuple[str, tuple[int, ...], Oracle]] = {
    "reflect": ("reflect", (0, 0, 2, 1, 0, 0, 3, 4), lambda x: F.pad(x, (1, 4, 2, 3), "reflect")),
    "edge": ("edge", (0, 0, 6, 0, 0, 0, 9, 1), lambda x: F.pad(x, (0, 1, 6, 9), "replicate")),
    "wrap": ("wrap", (0, 0, 2, 0, 0, 0, 1, 0), lambda x: F.pad(x, (0, 0, 2, 1), "circular")),
    "channels": ("constant", (0, 2, 0, 0, 0, 1, 0, 0), lambda x: F.pad(x, (0, 0, 0, 0, 2, 1))),
}


@pytest.mark.parametrize("case", PADS)
def test_pads(case: str) -> None:
    mode, pads, oracle = PADS[case]
    data, shapes = {"x": normal(3, 4, 5, 6)}, {"x": ("N", "c", 5, 6)}
    check(
        [node("Pad", "x", "p", mode=mode)],
        lambda x: oracle(x),
        data,
        shapes,
        {"p": ints(*pads)},
        sums=True,
        narrow={"c": 3},
    )


def test_a_reflection_of_more_than_there_is_is_refused_by_name() -> None:
    arrays: Arrays = {"x": normal(2, 3)}
    with pytest.raises(ModelError, match=r"the_Pad.*reflects"):
        differentiated([node("Pad", "x", "p", mode="reflect")], arrays, {"x": ("N", 3)}, {"p": ints(0, 3, 0, 0)})


def test_padding_channels_with_a_value() -> None:
    constants = {"p": ints(0, 1, 0, 2), "v": floats(3.0)}
    oracle = lambda x: F.pad(x, (1, 2), value=3.0) ** 2  # noqa: E731
    nodes = [node("Pad", "x", "p", "v", out="z"), node("Mul", "z", "z")]
    check(nodes, oracle, {"x": normal(3, 5)}, {"x": ("N", "c")}, constants, narrow={"c": 2})


# -- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["none", "add"])
def test_rows_written_at_places(reduction: str) -> None:
    data = {"x": normal(5, 6, 4), "u": normal(2, 4, seed=1)}
    shapes = {"x": (5, 6, "c"), "u": (2, "c")}

    def oracle(x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        where = (torch.tensor([0, 3]), torch.tensor([5, 2]))
        return x.exp().index_put(where, u, accumulate=reduction == "add")

    nodes = [node("Exp", "x", out="e"), node("ScatterND", "e", "i", "u", reduction=reduction)]
    check(nodes, oracle, data, shapes, {"i": np.array([[0, 5], [3, 2]])}, narrow={"c": 2})


def test_elements_written_at_places() -> None:
    data = {"x": normal(3, 6), "u": normal(3, 2, seed=1)}
    places = np.array([[0, 5], [3, 2], [1, 0]])
    oracle = lambda x, u: x.scatter(1, torch.tensor(places), u)  # noqa: E731
    check([node("ScatterElements", "x", "i", "u", axis=1)], oracle, data, None, {"i": places})


@pytest.mark.parametrize("upper", [0, 1])
def test_triangles(upper: int) -> None:
    function = torch.triu if upper else torch.tril
    data, shapes = {"x": normal(3, 4, 5)}, {"x": ("N", 4, 5)}
    nodes = [node("Trilu", "x", "k", upper=upper)]
    check(nodes, lambda x: function(x, 1), data, shapes, {"k": np.array(1, np.int64)}, sums=True, narrow={})


def test_vectors_of_places() -> None:
    nodes = [node("OneHot", "t", "depth", "values", out="o"), node("MatMul", "o", "w")]
    data = {"w": normal(6, 5), "t": np.array([0, 3, 3, 5])}
    constants = {"depth": ints(6), "values": np.array([0, 1], np.float32)}
    oracle = lambda w, t: F.one_hot(t, 6).to(w.dtype) @ w  # noqa: E731
    check(nodes, oracle, data, {"w": (6, "c"), "t": ("N",)}, constants, sums=True, narrow={"c": 2})


@pytest.mark.parametrize("op", ["Expand", "ConstantOfShape"])
def test_a_state_of_zeros_is_as_long_as_there_are_channels(op: str) -> None:
    """It is computed from the batch and numbers alone, one of which is a number of channels."""
    make = [node("Expand", "zero", "s", out="h")] if op == "Expand" else [node("ConstantOfShape", "s", out="h")]
    nodes = [
        node("Shape", "x", out="shape"),
        node("Slice", "shape", "from", "to", out="n"),
        node("Concat", "n", "six", out="s", axis=0),
        *make,
        node("MatMul", "h", "w", out="m"),
        node("Add", "m", "x"),
    ]
    data, shapes = {"x": normal(3, 6), "w": normal(6, 6, seed=1)}, {"x": ("N", "c"), "w": ("c", "c")}
    constants = {"from": ints(0), "to": ints(1), "six": ints(6), "zero": floats(0)}
    check(nodes, lambda x, w: (x * 0) @ w + x, data, shapes, constants, values={"h": ("N", "c")}, narrow={"c": 4})


def test_every_second_channel_where_each_has_two_indices() -> None:
    """GLU with neighbouring halves."""
    nodes = [
        node("Slice", "x", "zero", "end", "one", "two", out="p"),
        node("Slice", "x", "one", "end", "one", "two", out="q"),
        node("Sigmoid", "q", out="s"),
        node("Mul", "p", "s"),
    ]
    constants = {"zero": ints(0), "one": ints(1), "two": ints(2), "end": ints(2**62)}
    oracle = lambda x: x[:, ::2] * x[:, 1::2].sigmoid()  # noqa: E731
    check(nodes, oracle, {"x": normal(3, 12, 4)}, {"x": ("N", "g*2", 4)}, constants, narrow={"g": 2})


def test_a_step_across_channels_is_refused_by_name() -> None:
    constants = {"zero": ints(0), "one": ints(1), "two": ints(2), "end": ints(2**62)}
    nodes = [node("Slice", "x", "zero", "end", "one", "two")]
    with pytest.raises(ModelError, match=r"the_Slice.*step"):
        differentiated(nodes, {"x": normal(3, 12)}, {"x": ("N", "c")}, constants)


def test_whole_groups_of_channels_in_another_order() -> None:
    nodes = [
        node("Gather", "x", "i", axis=1, out="g"),
        node("Mul", "g", "w", out="m"),
        node("ReduceSum", "a", out="s", keepdims=0),
        node("Mul", "m", "s"),
    ]
    data = {"a": normal(3, seed=2), "x": normal(3, 12, 4), "w": normal(20, 1, seed=1)}
    shapes = {"a": ("f",), "x": ("N", "f+2+g", 4), "w": ("f+g+3+g", 1)}
    constants = {"i": ints(0, 1, 2, *range(5, 12), 3, 4, 3, *range(5, 12))}

    def oracle(a: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        f, two, g = x.split([len(a), 2, x.shape[1] - 2 - len(a)], 1)
        return torch.cat([f, g, two, two[:, :1], g], 1) * w * a.sum()

    check(nodes, oracle, data, shapes, constants, sums=True, narrow={"f": 2, "g": 3})


def test_a_fixed_index_among_channels_leaves_its_axis() -> None:
    data, shapes = {"a": normal(3, seed=2), "x": normal(3, 5, 4)}, {"a": ("f",), "x": ("N", "f+2", 4)}
    nodes = [node("Gather", "x", "i", axis=1, out="g"), node("ReduceSum", "a", out="s", keepdims=0)]
    nodes += [node("Mul", "g", "s")]
    oracle = lambda a, x: x[:, -2] * a.sum()  # noqa: E731
    check(nodes, oracle, data, shapes, {"i": np.array(-2, np.int64)}, sums=True, narrow={"f": 1})


def test_single_channels_of_a_run_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"the_Gather.*single channels"):
        differentiated([node("Gather", "x", "i", axis=1)], {"x": normal(3, 5)}, {"x": ("N", "c")}, {"i": ints(4, 0)})
