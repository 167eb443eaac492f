"""AutoFLIP: explorers' guidance, masks made of it, damped momentum, and structure that emerges."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.job import Job
from fedprune.model.architecture import TensorKind
from fedprune.model.element_mask import gather_mask
from fedprune.model.recipe import Recipe
from fedprune.model.selection import Tensors
from fedprune.strategies import compose
from fedprune.strategies.aggregators import Mean
from fedprune.strategies.element_masks import MaskedElements, global_mask
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Turn
from support.fakes.strategy_rounds import NET, Device, Play, identical, perturb_tensors
from support.nets.drawn_models import model, seeds

pytestmark = pytest.mark.board

DEVICES = {"a": Device(weight=3), "b": Device(weight=5), "c": Device(weight=2, absent_rounds=frozenset({3}))}
RANKED = ("first.weight", "second.weight", "second.bias", "head.weight", "head.bias")


def autoflip(**options: Any) -> Strategy:
    """With masks of elements alone, unless a test asks for structure."""
    return compose(Job(strategy="autoflip", options={"structured": False, **options}))


def guidance(play: Play, devices: tuple[str, ...], start: Tensors) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Mean squared deviations, each tensor from 0 to 1; by hand."""
    out = {}
    for name in RANKED:
        squares = [(play.past[d].tensors[name].astype(np.float64) - start[name]) ** 2 for d in devices]
        mean = np.mean(squares, axis=0, dtype=np.float64)
        out[name] = (mean - mean.min()) / (mean.max() - mean.min())
    return out


def masks(play: Play, device: str) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    mask = play.sent[device].mask
    assert mask
    return mask


@given(seeds, st.floats(0.01, 0.9))
def test_a_share_of_all_elements_is_masked_by_the_participants_guidance(seed: int, share: float) -> None:
    start = model(NET, seed)
    play = Play(autoflip(pruned_share=share), start, DEVICES)
    play.play()
    for present in (("a", "b", "c"), ("a", "b")):  # in the third round one of them is away
        explored = Play(autoflip(), start, DEVICES)
        explored.play()
        scaled = guidance(explored, present, start)
        limit = np.quantile(np.concatenate([v.ravel() for v in scaled.values()]), share)
        play.play()
        active = masks(play, "a")
        assert set(active) == set(RANKED)
        near = 1e-6 * max(1.0, limit)  # guidance is kept as float32
        for name in RANKED:
            sure = np.abs(scaled[name] - limit) > near
            np.testing.assert_array_equal(active[name][sure], (scaled[name] > limit)[sure])
        assert all(np.array_equal(active[n], masks(play, "b")[n]) for n in active)
        size = sum(v.size for v in active.values())
        lost = size - sum(int(v.sum()) for v in active.values())
        # The least of every tensor is 0 on its own scale.
        assert abs(lost - max(len(RANKED), 1 + int(share * (size - 1)))) <= 1


def test_norms_and_statistics_are_never_masked() -> None:
    play = Play(autoflip(), model(NET, 1), DEVICES)
    play.play(2)
    assert {NET.by_name[n].kind for n in masks(play, "a")} == {TensorKind.WEIGHT, TensorKind.BIAS}


def test_without_pruning_it_is_fedavg_with_damped_momentum_bit_for_bit() -> None:
    damped = MaskedElements(inputs="updates", aggregator=Mean(server_momentum=0.9, damped=True), exploration_rounds=1)
    expected = Play(damped, model(NET, 1), DEVICES).play(5)
    assert identical(Play(autoflip(pruned_share=0.0), model(NET, 1), DEVICES).play(5), expected)


def test_what_the_first_mask_prunes_is_0_from_the_start_and_later_masks_take_the_rest_there() -> None:
    """With w_k = 0 where masked: v ← β·v + (1 − β)·(0 − w), w ← w + v (AutoFLIP, B6)."""
    fleet = {"a": Device(), "b": Device(absent_rounds=frozenset({2}))}
    play = Play(autoflip(server_momentum=0.8), model(NET, 1), fleet)
    play.play(2)
    first = ~masks(play, "a")["second.weight"]
    assert first.any()
    assert not play.model["second.weight"][first].any()
    before = play.model["second.weight"].astype(np.float64)
    speed = play.memory["velocity"]["second.weight"].astype(np.float64)
    play.play()  # by the guidance of both, which masks others
    now = ~masks(play, "a")["second.weight"]
    assert (now & ~first).any()
    expected = before + 0.8 * speed + 0.2 * (0 - before)
    np.testing.assert_allclose(play.model["second.weight"][now], expected[now], atol=1e-6)


def test_a_tensor_that_did_not_move_keeps_all_its_elements() -> None:
    def still(submodel: Any, device: str, round_: int) -> Tensors:
        return perturb_tensors(submodel, device, round_) | {"second.bias": submodel.tensors["second.bias"]}

    play = Play(autoflip(), model(NET, 1), DEVICES, move=still)
    play.play(2)
    assert masks(play, "a")["second.bias"].all()
    assert not all(m.all() for m in masks(play, "a").values())


def test_where_nothing_moved_nothing_is_masked() -> None:
    start = model(NET, 1)
    play = Play(autoflip(pruned_share=0.5), start, {"a": Device()}, move=lambda sent, *_: dict(sent.tensors))
    assert identical(play.play(2), start)
    assert not play.sent["a"].mask


def dead_rows(submodel: Any, device: str, round_: int) -> Tensors:
    """Two filters and a neuron don't move when exploring, so that all of what makes them is masked."""
    out = perturb_tensors(submodel, device, round_)
    if round_ == 1:
        for name, rows in (("first.weight", [1, 4]), ("second.weight", [2]), ("second.bias", [2])):
            out[name][rows] = submodel.tensors[name][rows]
    return out


def test_channels_without_weights_are_cut_by_default_and_come_back_as_they_were_sent() -> None:
    start = model(NET, 1)
    cut, uncut = (
        Play(strategy, start, {"a": Device(), "b": Device()}, move=dead_rows)
        for strategy in (compose(Job(strategy="autoflip", options={"pruned_share": 0.5})), autoflip(pruned_share=0.5))
    )
    for play in (cut, uncut):
        play.play()
        play.move = lambda submodel, device, round_: submodel.tensors  # so that both have the same model
        play.play()
    sent, full = cut.sent["a"], uncut.sent["a"]
    assert sent.selection.widths[0] <= 4
    assert sent.selection.widths[1] <= 3
    assert not set(sent.selection.ranks[0][: sent.selection.widths[0]]) & {1, 4}
    assert sent.mask
    mask = global_mask(uncut.reports["a"].cut)
    assert mask
    for name, bits in gather_mask(mask, sent.selection).items():
        np.testing.assert_array_equal(sent.mask[name], bits)
    assert full.selection.is_full
    assert identical(cut.model, uncut.model)


def test_exploring_is_long_and_the_learning_rate_decays_afterwards() -> None:
    objective, recipe = autoflip(exploration_epochs=20, lr_decay=0.9), Recipe(epochs=2, lr=0.1, max_steps=5)
    first, fifth = (objective.recipe(recipe, Turn(0, number, "a", NET.sizes)) for number in (1, 5))
    assert (first.epochs, first.best_epoch, first.max_steps, fifth.epochs) == (20, False, 0, 2)
    assert (first.lr, fifth.lr) == (0.1, pytest.approx(0.1 * 0.9**3))
