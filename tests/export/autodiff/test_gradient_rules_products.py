"""Gradients of matrix products and einsums, of any rank and at two widths of one graph, against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ModelError
from support.oracles.differentiation import check, differentiated, node, normal

pytestmark = pytest.mark.torch


@pytest.mark.parametrize(
    ("a", "b"),
    [((5,), (5,)), ((5,), (5, 3)), ((4, 5), (5,)), ((5,), (2, 5, 3)), ((2, 4, 5), (5,)), ((3, 2, 4, 5), (5,))],
)
def test_products_with_vectors(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check([node("MatMul", "a", "b")], lambda a, b: a @ b, {"a": normal(*a), "b": normal(*b, seed=1)}, sums=True)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_products_over_broadcast_batches(data: st.DataObject) -> None:
    full = tuple(data.draw(st.lists(st.integers(1, 3), max_size=2)))
    lead = [
        tuple(d if data.draw(st.booleans()) else 1 for d in full)[data.draw(st.integers(0, len(full))) :] for _ in "ab"
    ]
    m, k, n = (data.draw(st.integers(1, 4)) for _ in "mkn")
    arrays = {"a": normal(*lead[0], m, k), "b": normal(*lead[1], k, n, seed=1)}
    check([node("MatMul", "a", "b")], lambda a, b: a @ b, arrays, sums=True)


def test_attention_over_heads_and_dims_that_vary() -> None:
    nodes = [
        node("MatMul", "q", "k", out="s"),
        node("Softmax", "s", axis=-1, out="p"),
        node("MatMul", "p", "v"),
    ]
    data = {"q": normal(3, 4, 5, 6), "k": normal(3, 4, 6, 5, seed=1), "v": normal(3, 4, 5, 6, seed=2)}
    shapes = {"q": ("N", "h", 5, "d"), "k": ("N", "h", "d", 5), "v": ("N", "h", 5, "d")}
    check(nodes, lambda q, k, v: (q @ k).softmax(-1) @ v, data, shapes, narrow={"h": 2, "d": 3})


def test_sizes_that_are_equal_at_full_width_alone_are_refused_by_name() -> None:
    data = {"a": normal(3, 4), "b": normal(4, 5, seed=1)}
    with pytest.raises(ModelError, match=r"the_MatMul.*every width"):
        differentiated([node("MatMul", "a", "b")], data, {"a": ("N", "c"), "b": ("d", 5)}, {})


EINSUMS = {
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


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation: str) -> None:
    terms = EINSUMS[equation]
    data = {f"x{i}": normal(*(SIZES.get(str(d), d) for d in t), seed=i) for i, t in enumerate(terms)}
    shapes = {f"x{i}": t for i, t in enumerate(terms)}
    oracle = lambda **x: torch.einsum(equation, *x.values())  # noqa: E731
    narrow = {n: 2 if n != "h" else 1 for n in "cdh" if any(n in t for t in terms)}
    nodes = [node("Einsum", *data, equation=equation)]
    check(nodes, oracle, data, shapes, sums=True, narrow=narrow)


def test_a_diagonal_is_refused_by_name() -> None:
    with pytest.raises(ModelError, match=r"the_Einsum.*diagonal"):
        differentiated([node("Einsum", "x", equation="bii->b")], {"x": normal(2, 3, 3)}, {"x": ("N", 3, 3)}, {})


def test_gemm_over_widths() -> None:
    data = {"a": normal(3, 4), "b": normal(6, 4, seed=1), "c": normal(6, seed=2)}
    shapes = {"a": ("N", "i"), "b": ("o", "i"), "c": ("o",)}
    nodes = [node("Gemm", "a", "b", "c", transB=1)]
    check(nodes, lambda a, b, c: a @ b.T + c, data, shapes, sums=True, narrow={"i": 2, "o": 5})
