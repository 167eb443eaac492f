"""Atoms: units are what a plain union-find finds, and reshapes carry atoms as numpy carries elements."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_export.channels.atoms import ANCHORED, Atoms, still
from fedprune_export.channels.shapes import _runs, _spread


@settings(deadline=None)
@given(count=st.integers(2, 40), ties=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=60))
def test_units_are_what_union_find_finds(count: int, ties: list[tuple[int, int]]) -> None:
    atoms = Atoms()
    atoms.fresh(count)
    parent = list(range(count + 1))

    def root(atom: int) -> int:
        while parent[atom] != atom:
            atom = parent[atom]
        return atom

    for a, b in ties:
        a, b = a % (count + 1), b % (count + 1)
        atoms.tie(np.array([a]), np.array([b]))
        low, high = sorted((root(a), root(b)))
        parent[high] = low

    assert atoms.units().tolist() == [root(a) for a in range(count + 1)]


def test_long_chains_are_one_unit() -> None:
    atoms = Atoms()
    row = atoms.fresh(5000)
    order = np.random.default_rng(0).permutation(row)

    atoms.tie(order[:-1], order[1:])

    assert set(atoms.units()[row].tolist()) == {1}


def test_what_is_tied_to_a_fixed_index_stays() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(4), atoms.fresh(4)
    atoms.tie(a, b)
    atoms.fix(b[1:2])

    assert (atoms.units()[a] == ANCHORED).tolist() == [False, True, False, False]


def test_an_axis_of_one_index_stays() -> None:
    assert Atoms().fresh(1).tolist() == [ANCHORED]


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    """Two shapes of equal size."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 5]), min_size=1, max_size=5))

    def grouped() -> list[int]:
        shape, at = [], 0
        while at < len(factors):
            take = draw(st.integers(1, len(factors) - at))
            shape.append(int(np.prod(factors[at : at + take])))
            at += take
        return shape

    return grouped(), grouped()


@settings(deadline=None, max_examples=300)
@given(shapes=reshapes(), carrier=st.integers(0, 4))
def test_reshaped_rows_say_where_numpy_puts_the_elements(shapes: tuple[list[int], list[int]], carrier: int) -> None:
    old, new = shapes
    carrier %= len(old)
    rows = [np.arange(1, n + 1) if i == carrier else still(n) for i, n in enumerate(old)]
    places = [-1 if i == carrier else 1 for i in range(len(old))]
    elements = np.broadcast_to(rows[carrier].reshape(places), old).reshape(new)
    runs = _runs(old, new)

    assert [i for olds, _ in runs for i in olds] == list(range(len(old)))
    assert [i for _, news in runs for i in news] == list(range(len(new)))
    out = [still(n) for n in new]
    for olds, news in runs:
        carried = _spread([rows[i] for i in olds], [new[i] for i in news])
        if carried is None:
            return  # such atoms are fixed
        for i, row in zip(news, carried, strict=True):
            out[i] = row
    moving = [i for i, row in enumerate(out) if row.any()]
    if old[carrier] == 1:
        assert moving == [] or out[moving[0]].size == 1
        return
    assert len(moving) == 1
    shape = [-1 if i == moving[0] else 1 for i in range(len(new))]
    np.testing.assert_array_equal(np.broadcast_to(out[moving[0]].reshape(shape), new), elements)
