"""FIARSE: masks by size, and the mean of what devices changed."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.job import Job
from fedprune.model.selection import Tensors
from fedprune.strategies import compose
from fedprune.strategies.importance.element_ranking import prunable
from fedprune.strategies.strategy import Strategy
from fedprune.strategies.values import Submodel
from support.fakes.strategy_rounds import NET, Device, Play, identical, perturb_tensors
from support.nets.drawn_models import model, seeds

pytestmark = pytest.mark.board

NAMES = prunable(NET)
TIERS = {n: Device(density=d, weight=w) for n, d, w in (("a", 1.0, 3), ("b", 0.25, 5), ("c", 1 / 16, 4))}


def fiarse(**options: Any) -> Strategy:
    return compose(Job(strategy="fiarse", options=options))


@given(seeds, st.floats(0.02, 0.98))
def test_a_device_gets_the_largest_weights_of_the_whole_model(seed: int, density: float) -> None:
    weights = model(NET, seed)
    play = Play(fiarse(), weights, {"a": Device(density=density)})
    play.play()
    sizes = np.sort(np.concatenate([np.abs(weights[n]).ravel() for n in NAMES]))[::-1]
    theta = sizes[max(1, int(density * sizes.size + 1e-6)) - 1]
    sent = play.sent["a"]
    assert sent.mask
    assert set(sent.mask) == set(NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(sent.mask[name], np.abs(weights[name]) >= theta)
        np.testing.assert_array_equal(sent.tensors[name], np.where(np.abs(weights[name]) >= theta, weights[name], 0))
    for name in set(weights) - set(NAMES):
        np.testing.assert_array_equal(sent.tensors[name], weights[name])


def test_a_move_is_averaged_over_the_devices_that_moved() -> None:
    """w ← w + Σ Δ_k / |{k: Δ_k ≠ 0}|, whatever devices' samples; what nobody moved stays."""
    start = model(NET, 1)

    def some(submodel: Submodel, device: str, round_: int) -> Tensors:
        after = perturb_tensors(submodel, device, round_)
        still = {"a": slice(0, 2), "b": slice(1, 3), "c": slice(1, 2)}[device]
        after["head.bias"][still] = submodel.tensors["head.bias"][still]
        return after

    play = Play(fiarse(), start, TIERS, move=some)
    after = play.play()
    for spec in NET.trainable:
        deltas = np.stack([
            play.reports[d].trained.tensors[spec.name].astype(np.float64) - play.sent[d].tensors[spec.name]
            for d in TIERS
        ])  # fmt: skip
        movers = (deltas != 0).sum(axis=0)
        expected = start[spec.name] + deltas.sum(axis=0) / np.maximum(movers, 1)
        np.testing.assert_allclose(after[spec.name], expected, atol=1e-6)
        np.testing.assert_array_equal(after[spec.name][movers == 0], start[spec.name][movers == 0])
        if spec.name == "head.bias":
            assert movers.tolist() == [2, 0, 2]


def test_whole_devices_give_fedavg_of_equal_weights_bit_for_bit() -> None:
    full_devices = {n: Device(weight=4) for n in "abc"}
    expected = Play(compose(Job(scorer="ordered")), model(NET, 2), full_devices).play(3)
    assert identical(Play(fiarse(), model(NET, 2), full_devices).play(3), expected)
