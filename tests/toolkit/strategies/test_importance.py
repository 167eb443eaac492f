"""Importances of elements: what PR-FL makes of squared gradients, and when masks change."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.rng import keyed_generator
from fedprune.model.selection import ElementMask, Tensors, mesh
from fedprune.strategies.importance.element_ranking import prunable
from fedprune.strategies.methods.pr_fl import Importance, PrFl
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Submodel
from support.fakes.strategy_rounds import NET, Device, Play
from support.nets.drawn_models import model, seeds

pytestmark = pytest.mark.board

NAMES = prunable(NET)
Arrays = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


def is_submask(inner: ElementMask, outer: ElementMask) -> bool:
    return all(not (bits & ~outer[n]).any() for n, bits in inner.items())


def strategy(interval: int = 2, floor: float = 0.0) -> Strategy:
    return PrFl(importance=Importance(interval, floor), inputs="measurements")


def squares(submodel: Submodel, device: str, round_: int) -> Tensors:
    """Squared gradients of what is trained, 0 where masked and, by chance, elsewhere."""
    out = {}
    for spec in NET.trainable:
        random = keyed_generator(2, device, round_, spec.name)
        value = random.standard_normal(spec.shape) ** 2 * (random.random(spec.shape) < 0.6)
        value = value[mesh(submodel.selection.maps(spec.name))].astype(np.float32)
        if spec.name in submodel.mask:
            value = value * submodel.mask[spec.name]
        out[spec.name] = value
    return out


def by_hand(reports: list[Tensors], scores: Arrays, weights: Tensors) -> tuple[Arrays, Arrays]:
    """What is known after an interval, and the order that it makes, as PR-FL has it (1.4)."""
    total = {n: np.zeros(weights[n].shape) for n in NAMES}
    count = {n: np.zeros(weights[n].shape) for n in NAMES}
    for report in reports:
        low, high = (float(f([f(v) for v in report.values()])) for f in (np.min, np.max))
        for n in NAMES:
            share = (report[n].astype(np.float64) - low) / (high - low)
            total[n] += share
            count[n] += share != 0
    mean = {n: total[n] / np.maximum(count[n], 1) for n in NAMES}
    scores = {n: np.where(mean[n] != 0, mean[n], scores.get(n, np.zeros(weights[n].shape))) for n in NAMES}
    order = {}
    for n in NAMES:
        order[n] = np.where(scores[n] > 0, scores[n], scores[n][scores[n] > 0].min() * np.abs(weights[n]))
    return scores, order


def test_squared_gradients_are_stretched_averaged_and_kept() -> None:
    devices = {"a": Device(density=0.6, weight=2), "b": Device(density=0.9, weight=9)}
    play = Play(strategy(), model(NET, 1), devices, squares=squares)
    scores: Arrays = {}
    for _ in range(3):
        round_squares = []
        for _ in range(2):
            play.play()
            round_squares += [play.reports[d].squares for d in devices]
        scores, order = by_hand(round_squares, scores, play.model)
        got = play.strategy.rank(replace(play.scene(), round=play.round + 1)).order
        assert got is not None
        for n in NAMES:
            np.testing.assert_allclose(play.memory["importance"][n], scores[n], rtol=1e-5, atol=1e-9)
            np.testing.assert_allclose(got[n], order[n], rtol=1e-5, atol=1e-9)
        assert "importance/sum" not in play.memory


def test_an_update_that_comes_again_from_a_buffer_counts_once() -> None:
    play = Play(strategy(interval=3), model(NET, 1), {"a": Device(), "b": Device()}, squares=squares)
    play.play()
    first, learner, scene = play.reports["a"], play.strategy, play.scene
    fold = play.strategy.aggregator.fold(scene(), evidence=False)
    play.play()
    total = {n: np.array(v) for n, v in play.memory["importance/sum"].items()}
    second_memory = learner.learn(scene(), fold, lambda: iter([first, play.reports["b"]]))
    for n in NAMES:
        np.testing.assert_array_equal((play.memory | second_memory)["importance/sum"][n], total[n])


def test_masks_change_when_an_interval_ends_and_with_densities() -> None:
    device = Device(density=0.4)
    play = Play(strategy(interval=3), model(NET, 1), {"a": device}, squares=squares)
    masks = []
    for round_ in range(1, 9):
        device.density = 0.7 if round_ == 6 else 0.4
        play.play()
        mask = play.sent["a"].mask
        assert mask
        masks.append(mask)
    same = [is_submask(masks[i], masks[i + 1]) and is_submask(masks[i + 1], masks[i]) for i in (0, 1, 2, 3, 5, 6)]
    assert same == [True, True, False, True, False, True]  # the order of rounds 1 to 3, then of 4 to 6, then of 7 on
    assert is_submask(masks[4], masks[5])
    kept_counts = [sum(int(bits.sum()) for bits in mask.values()) for mask in masks]
    assert kept_counts[5] > kept_counts[4]


def test_what_devices_do_not_hold_keeps_what_was_known() -> None:
    play = Play(strategy(interval=1), model(NET, 1), {"a": Device()}, squares=squares)
    play.play()
    first = {n: np.array(play.memory["importance"][n]) for n in NAMES}
    play.devices = {"a": Device((2, 2))}
    play.play()
    for n in ("second.weight",):
        np.testing.assert_array_equal(play.memory["importance"][n][2:], first[n][2:])
        np.testing.assert_array_equal(play.memory["importance"][n][:, 2:], first[n][:, 2:])
        assert (play.memory["importance"][n][:2, :2] != first[n][:2, :2]).any()


@given(seeds, st.floats(0.05, 0.6), st.floats(0.05, 1))
def test_every_layer_keeps_its_floor(seed: int, floor: float, density: float) -> None:
    play = Play(strategy(1, floor), model(NET, seed), {"a": Device(density=density)})
    play.play(2)
    mask = play.sent["a"].mask
    if mask:
        for n, active in mask.items():
            assert active.sum() >= max(1, int(floor * active.size))
            assert active.ravel()[np.abs(play.reports["a"].cut.scene.model[n]).argmax()]
