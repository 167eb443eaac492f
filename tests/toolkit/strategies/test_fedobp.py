"""FedOBP: what stays a device's own, and that nothing else differs from FedAvg."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.jobs.job import Job
from fedprune.model.architecture import TensorKind
from fedprune.model.selection import Selection, Tensors
from fedprune.strategies import compose
from fedprune.strategies.strategy import Strategy
from support.fakes.strategy_rounds import NET, Device, Play, identical
from support.nets.drawn_models import model, seeds

pytestmark = pytest.mark.board

DEVICES = {"a": Device(weight=3), "b": Device(weight=5), "c": Device(weight=1, absent_rounds=frozenset({1}))}
MIXED = {
    "a": Device((6, 4), weight=3),
    "b": Device((4, 2), weight=5),
    "c": Device((2, 3), absent_rounds=frozenset({1, 3})),
}
TRAINED = [t.name for t in NET.trainable]
SIZE = sum(int(np.prod(t.shape)) for t in NET.trainable)


def fedobp(**options: Any) -> Strategy:
    return compose(Job(strategy="fedobp", options=options))


def own(play: Play, device: str, before: Tensors) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    """Where a device was sent something other than the global model, of its submodel."""
    sent = play.sent[device]
    plain = sent.selection.gather(before)
    return {n: sent.tensors[n] != plain[n] for n in plain}


@pytest.mark.parametrize("devices", [DEVICES, MIXED], ids=["whole", "mixed"])
def test_at_q_1_it_is_fedavg_bit_for_bit(devices: dict[str, Device]) -> None:
    expected = Play(compose(Job(scorer="ordered", rule="coverage")), model(NET, 1), devices).play(4)
    assert identical(Play(fedobp(q=1.0), model(NET, 1), devices).play(4), expected)


@given(seeds, st.floats(0.001, 0.999))
def test_own_are_the_elements_that_are_furthest_away(seed: int, q: float) -> None:
    """(θ_i − θ_g)² ranks as |θ_i − θ_g|; about (1 − q) of all elements are own, as they were handed in last."""
    play = Play(fedobp(q=q), model(NET, seed), DEVICES)
    before, past = play.play(2), play.past["b"].tensors
    play.play()
    own_mask = own(play, "b", before)
    far = np.concatenate([np.abs(past[n].astype(np.float64) - before[n]).ravel() for n in TRAINED])
    chosen = np.concatenate([own_mask[n].ravel() for n in TRAINED])
    np.testing.assert_array_equal(chosen, far > np.quantile(far, q, method="lower"))
    assert chosen.sum() == SIZE - 1 - int(q * (SIZE - 1))
    for name in TRAINED:
        np.testing.assert_array_equal(play.sent["b"].tensors[name][own_mask[name]], past[name][own_mask[name]])


def test_statistics_are_always_the_global_ones() -> None:
    play = Play(fedobp(q=0.0), model(NET, 1), DEVICES)
    before = play.play(3)
    play.play()
    statistics = [t.name for t in NET.tensors if t.kind in (TensorKind.STAT_MEAN, TensorKind.STAT_VAR)]
    assert not any(own(play, "a", before)[n].any() for n in statistics)


@given(seeds, st.floats(0, 0.99))
def test_a_submodel_is_compared_where_old_and_new_one_overlap(seed: int, q: float) -> None:
    """A device that was narrow, and is wide now, has nothing of its own in the channels that are new to it."""
    start, device = model(NET, seed), Device((3, 2))
    play = Play(fedobp(q=q), start, {"a": device, "b": Device()})
    before, past = play.play(2), play.past["a"]
    device.widths = (5, 1)
    play.play()
    own_mask = own(play, "a", before)
    overlap = sum(int(np.prod(Selection.of(NET, (3, 1)).shapes()[n])) for n in TRAINED)
    assert sum(int(own_mask[n].sum()) for n in TRAINED) == overlap - 1 - int(q * (overlap - 1))
    for name in TRAINED:
        overlap_mask = past.selection.coverage_mask(name)[np.ix_(*play.sent["a"].selection.maps(name))]
        assert not own_mask[name][~overlap_mask].any()
