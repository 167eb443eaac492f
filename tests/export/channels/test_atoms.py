"""Atoms: units are what a plain union-find finds, and reshapes carry atoms as numpy carries elements."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_export.channels.atoms import Atoms, fixed_row
from fedprune_export.channels.factors import assignments, axis_runs, factor_run


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
    """One option per new axis that can take the atoms: what it takes says which of them every element is tied to."""
    old, new = shapes
    carrier %= len(old)
    row = np.arange(1, old[carrier] + 1)
    elements = np.broadcast_to(row.reshape([-1 if i == carrier else 1 for i in range(len(old))]), old).reshape(new)
    runs = axis_runs(old, new)
    assert [i for olds, _ in runs for i in olds] == list(range(len(old)))
    assert [i for _, news in runs for i in news] == list(range(len(new)))
    if old[carrier] == 1:
        return
    olds, news = next(p for p in runs if carrier in p[0])
    run = factor_run(olds, news, old, new)
    if run is None:
        return  # such atoms are fixed
    grids = [
        (row if i == carrier else fixed_row(old[i])).reshape([run.factors[f] for f in span])
        for i, span in zip(run.old_axes, run.old_factors, strict=True)
    ]
    options = assignments(run, grids, [False] * len(new))
    varying = [j for j in range(len(new)) if (elements != elements.take([0], axis=j)).any()]
    assert [option[olds.index(carrier)] for option in options] == varying
    assert all(j is None for option in options for i, j in zip(olds, option, strict=True) if i != carrier)


@settings(deadline=None, max_examples=200)
@given(ties=st.lists(st.tuples(st.integers(1, 30), st.integers(0, 30)), max_size=40), interval=st.integers(1, 5))
def test_units_can_be_asked_for_in_between(ties: list[tuple[int, int]], interval: int) -> None:
    at_once, in_parts = Atoms(), Atoms()
    at_once.fresh(30)
    in_parts.fresh(15)
    in_parts.units()
    in_parts.fresh(15)
    for i, (a, b) in enumerate(ties):
        for atoms in (at_once, in_parts):
            atoms.tie(np.array([a]), np.array([b]))
        if i % interval == 0:
            in_parts.units()
    assert in_parts.units().tolist() == at_once.units().tolist()
