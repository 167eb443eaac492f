"""Slabs: what widths add to each other makes them up again, to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import tensorfile
from fedprune.core.errors import BundleError
from fedprune.model.architecture import Architecture
from fedprune.model.element_mask import ElementMask
from fedprune.model.selection import Selection
from fedprune.updates.width_deltas import MAX_SLABS, chains, compose, own_share, places, slab
from support.nets.drawn_models import architectures, model, ranks, seeds, widths

pytestmark = pytest.mark.board


@st.composite
def ladders(draw: st.DrawFn) -> list[Selection]:
    """Selections of one ranking, each inside the next."""
    architecture = draw(architectures())
    order = draw(ranks(architecture))
    rows = [draw(widths(architecture)) for _ in range(draw(st.integers(1, 4)))]
    for i in range(1, len(rows)):
        rows[i] = tuple(map(max, rows[i], rows[i - 1]))
    return [Selection.of(architecture, row, order) for row in rows]


def travelled(tensors: Mapping[str, Any]) -> dict[str, Any]:
    return tensorfile.decode(tensorfile.encode(tensors))


@given(ladders(), seeds)
def test_slabs_make_up_every_width_to_the_bit(ladder: list[Selection], seed: int) -> None:
    full = model(ladder[0].architecture, seed)
    files = [s.gather(full) for s in ladder]
    held = travelled(files[0])
    for j in range(1, len(ladder)):
        entries = travelled(slab(files[j - 1], files[j], places(ladder[j - 1], ladder[j])))
        assert own_share(entries, files[j]) == 0  # every width is inside the next one
        values = sum(v.size for n, v in entries.items() if n.endswith("::slab"))
        assert values == sum(v.size for v in files[j].values()) - sum(v.size for v in files[j - 1].values())
        held = compose(held, entries)
        assert tensorfile.encode(held) == tensorfile.encode(files[j])


@given(ladders(), seeds, st.data())
def test_tensors_whose_values_differ_between_widths_travel_whole(
    ladder: list[Selection], seed: int, data: st.DataObject
) -> None:
    narrow, wide = ladder[0], ladder[-1]
    full = model(narrow.architecture, seed)
    below, above = narrow.gather(full), wide.gather(full)
    name = data.draw(st.sampled_from([n for n in below if below[n].size]))
    below[name] = below[name] + np.float32(1)

    entries = travelled(slab(below, above, places(narrow, wide)))

    assert np.array_equal(entries[name], above[name])
    assert tensorfile.encode(compose(below, entries)) == tensorfile.encode(above)


@given(st.data(), seeds)
def test_masks_inside_each_other_make_slabs_of_single_elements(data: st.DataObject, seed: int) -> None:
    architecture: Architecture = data.draw(architectures())
    whole, full = Selection.full(architecture), model(architecture, seed)
    rng = np.random.default_rng(seed)
    scores = {t.name: rng.random(t.shape) for t in architecture.trainable}
    small = ElementMask({n: v < 0.3 for n, v in scores.items()})
    large = data.draw(st.sampled_from([None, ElementMask({n: v < 0.8 for n, v in scores.items()})]))
    below, above = small.pack(full), full if large is None else large.pack(full)

    entries = travelled(slab(below, above, places(whole, whole, small, large)))

    assert own_share(entries, above) == 0
    assert tensorfile.encode(compose(below, entries)) == tensorfile.encode(above)


def test_bits_are_compared_and_not_numbers() -> None:
    """A zero of the other sign, or a NaN, is another file."""
    for value in (-0.0, np.nan):
        below, above = {"w": np.zeros(2, np.float32)}, {"w": np.array([0, value, 1], np.float32)}
        entries = slab(below, above, {"w": (np.arange(2),)})
        assert "w" in entries
        assert tensorfile.encode(compose(below, entries)) == tensorfile.encode(above)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), max_size=60))
def test_chains_hold_all_widths_once_and_each_holds_the_one_before(found: list[tuple[int, int]]) -> None:
    rows = sorted(found, key=lambda w: w[0] * w[1])
    made = chains(rows)
    assert sorted(i for c in made for i in c) == list(range(len(rows)))
    for chain in made:
        assert chain == sorted(chain)
        assert len(chain) <= MAX_SLABS
        for a, b in itertools.pairwise(chain):
            assert all(x <= y for x, y in zip(rows[a], rows[b], strict=True))


def test_nested_widths_are_one_chain() -> None:
    assert chains([(1, 1), (2, 2), (3, 3)]) == [[0, 1, 2]]
    assert chains([(1, 3), (3, 1), (3, 3)]) == [[0], [1, 2]]


BELOW = {"w": np.ones((2, 2), np.float32)}
GOOD = slab(BELOW, {"w": np.ones((3, 2), np.float32)}, {"w": (np.arange(2), np.arange(2))})


@pytest.mark.parametrize(
    "change",
    [
        {"::shapes": None}, {"::shapes": np.zeros(1, np.float32)}, {"::shapes": np.array([[2, 3, 2]])},
        {"::shapes": np.array([], np.int64)}, {"::shapes": np.array([9])}, {"::shapes": np.array([-1])},
        {"::shapes": np.array([2, 3])}, {"::shapes": np.array([1, 6])},
        {"::shapes": np.array([2, 2**31, 2**31])}, {"::shapes": np.array([2, 6, 1])},
        {"w::slab": np.zeros(3, np.float32)}, {"w::slab": np.zeros(2, np.int32)},
        {"w::slab": np.zeros((1, 2), np.float32)},
        {"v::slab": np.zeros(2, np.float32)}, {"w::kept": np.zeros(1, np.uint8)}, {"w::kept": np.zeros(2, np.uint8)},
        {"w::kept0": np.zeros(1, np.uint8)}, {"w::kept0": np.zeros(1, np.int32)},
        {"w::kept1": np.array([0x80], np.uint8)},
    ],
)  # fmt: skip
def test_a_slab_that_does_not_fit_is_an_error_and_nothing_else(change: dict[str, Any]) -> None:
    assert compose(BELOW, GOOD)["w"].shape == (3, 2)
    entries = {n: v for n, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(BundleError):
        compose(BELOW, entries)
