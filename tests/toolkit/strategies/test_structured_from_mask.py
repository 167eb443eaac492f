"""Structure that emerges from element masks: the cut network computes what the masked one did."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.model.architecture import Architecture, TensorKind
from fedprune.model.element_mask import apply_mask, gather_mask
from fedprune.model.selection import ElementMask, Selection, Tensors
from fedprune.strategies.importance.element_ranking import prunable
from fedprune.strategies.importance.structured_from_mask import surviving_selection, survivors
from support.nets.drawn_models import architectures, model, seeds, selections
from support.nets.written_nets import written_net

pytestmark = pytest.mark.board

NET = written_net(
    {"a": 5, "b": 4},
    {"first": ("a", 3), "branch": ("a", "a"), "second": ("b", "a"), "bias": ("b",), "head": (2, ("b", 2))},
    (3,),
    (2,),
    kinds={"bias": TensorKind.BIAS},
)


def run(
    weights: Tensors, x: np.ndarray[tuple[int, int], np.dtype[np.float64]]
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """The net's logits in float64, at whatever widths the weights have."""
    h = np.maximum(x @ weights["first"].T, 0)
    h = h + np.maximum(h @ weights["branch"].T, 0)
    h = np.maximum(h @ weights["second"].T + weights["bias"], 0)
    return np.repeat(h, 2, axis=1) @ weights["head"].T


def random_rows_mask(seed: int, share: float, *, rows: float = 0.3, columns: float = 0.3) -> ElementMask:
    """A random mask in which some whole rows and columns are masked as well."""
    random = np.random.default_rng(seed)
    active = {}
    for name in prunable(NET):
        shape = NET.by_name[name].shape
        bits = random.random(shape) < share
        bits &= random.random((shape[0], 1)) >= rows
        bits &= random.random((1, shape[1])) >= columns
        active[name] = bits
    return active


@given(seeds, st.floats(0.05, 1))
def test_the_cut_masked_net_is_the_masked_net(seed: int, share: float) -> None:
    """Without biases, all of whose weights are masked is 0; what nothing reads is nothing, biases or not."""
    mask, weights = random_rows_mask(seed, share), model(NET, seed)
    weights["bias"] = np.zeros(4, np.float32)
    alive = survivors(NET, mask)
    selection = surviving_selection(Selection.full(NET), alive)
    assert selection.widths == tuple(int(a.sum()) for a in alive)
    x = np.random.default_rng(seed).standard_normal((6, 3))
    masked_output = run(apply_mask(mask, weights), x)
    cut = run(apply_mask(gather_mask(mask, selection), selection.gather(weights)), x)
    np.testing.assert_allclose(cut, masked_output, atol=1e-12)


@given(seeds, st.floats(0.05, 1))
def test_what_nothing_reads_is_lost_without_a_trace_in_spite_of_its_bias(seed: int, share: float) -> None:
    mask, weights = random_rows_mask(seed, share, rows=0), model(NET, seed)
    for name in ("first", "branch", "second"):  # no channel is made of nothing
        mask[name][:, 0] = True
    alive = survivors(NET, mask)
    unread = ~mask["head"].reshape(2, 4, 2).any(axis=(0, 2))
    if not unread.all():
        np.testing.assert_array_equal(alive[1], ~unread)
    selection = surviving_selection(Selection.full(NET), alive)
    x = np.random.default_rng(seed).standard_normal((6, 3))
    cut = run(apply_mask(gather_mask(mask, selection), selection.gather(weights)), x)
    np.testing.assert_allclose(cut, run(apply_mask(mask, weights), x), atol=1e-12)


def test_a_channel_is_lost_when_all_layers_that_make_it_are_masked() -> None:
    mask = {n: np.ones(NET.by_name[n].shape, np.bool_) for n in prunable(NET)}
    mask["first"][2] = False
    assert all(a.all() for a in survivors(NET, mask))  # the branch still writes to it
    mask["branch"][2] = False
    assert survivors(NET, mask)[0].tolist() == [True, True, False, True, True]


@given(st.data(), architectures(), seeds, st.floats(0, 1), st.floats(0.05, 1))
def test_every_group_keeps_a_channel_and_more_masked_means_fewer(
    data: st.DataObject, architecture: Architecture, seed: int, share: float, lost: float
) -> None:
    random = np.random.default_rng(seed)
    active = {n: random.random(architecture.by_name[n].shape) < share for n in prunable(architecture)}
    alive = survivors(architecture, active, share=lost)
    assert all(a.any() for a in alive)
    assert all(s[a].all() or a.sum() == 1 for s, a in zip(survivors(architecture, active), alive, strict=True))
    selection: Selection = data.draw(selections(architecture))
    left = surviving_selection(selection, alive)
    for group, (rank, width) in enumerate(zip(left.ranks, left.widths, strict=True)):
        assert width <= selection.widths[group]
        assert alive[group][rank[:width]].all()
        order = selection.ranks[group]
        assert rank.tolist() == [*order[alive[group][order]], *order[~alive[group][order]]]


def test_a_mask_of_everything_loses_nothing_and_one_of_nothing_all_but_one() -> None:
    full = {n: np.ones(NET.by_name[n].shape, np.bool_) for n in prunable(NET)}
    assert surviving_selection(Selection.full(NET), survivors(NET, full)).is_full
    assert all(a.all() for a in survivors(NET, {}))
    empty = {n: np.zeros(NET.by_name[n].shape, np.bool_) for n in prunable(NET)}
    assert surviving_selection(Selection.full(NET), survivors(NET, empty)).widths == (1, 1)
