"""No single update decides the next model, and honest ones keep their bits."""

import math
import statistics
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination.limits import REJECT_FACTOR, limit_round
from fedprune.coordination.round import Round
from fedprune.coordination.update_lengths import ALL_TRAINED, measure_update
from fedprune.coordination.update_limits import RoundUpdate, UpdateLimits, shorten_update
from fedprune.coordination.weight_limits import capped_weights, weight_limit, weight_limit_of_counts
from fedprune.jobs.job import Job
from fedprune.model.architecture import widths_at
from fedprune.model.selection import ALL_ACTIVE, ElementMask, Selection, Tensors
from fedprune.strategies import compose
from fedprune.strategies.values import Cut, Scene, Submodel, Turn, UpdateReport
from support.fakes.strategy_rounds import NET, TRAINED

DICE = np.random.default_rng(0)
BASE: Tensors = {t.name: np.abs(DICE.standard_normal(t.shape)).astype(np.float32) for t in NET.tensors}


def report(shift: float = 0.0, density: float = 1.0, mask: ElementMask = ALL_ACTIVE, **changes: Any) -> UpdateReport:
    """An update whose every element moved so far; `changes` are further moves of single tensors."""
    selection = Selection.full(NET).with_widths(widths_at(NET, density))
    sent = Submodel(selection, selection.gather(BASE), mask)
    tensors: Tensors = {n: (v + np.float32(changes.get(n, shift))).astype(np.float32) for n, v in sent.tensors.items()}
    cut = Cut(Scene(NET, 0, 1, BASE), Turn(0, 1, "a", selection.widths), selection)
    return UpdateReport(cut, Submodel(selection, tensors, mask), 10, 1, lambda: sent)


def bounded(device_lengths: dict[str, Any], remembered: Any, times: float) -> Any:
    return limit_round(device_lengths, remembered, NET, BASE, times)


def limits(moves: dict[str, float], remembered: Any = None, times: float = 3.0) -> Any:
    return bounded({device: measure_update(report(shift)) for device, shift in moves.items()}, remembered or {}, times)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_length_is_how_far_the_update_alone_would_move_the_whole_model(density: float) -> None:
    one = report(0.25, density)
    still: Tensors = {n: np.zeros_like(v) for n, v in BASE.items()}
    difference = {n: v - one.sent.tensors[n] for n, v in one.trained.tensors.items()}
    changes = one.trained.selection.scatter(difference, still)
    update_lengths = measure_update(one)
    for name, change in changes.items():
        assert update_lengths[name] == pytest.approx(float(np.sqrt(np.mean(change**2))), rel=1e-4)
    full_change = np.concatenate([changes[n].reshape(-1) for n in TRAINED])
    assert update_lengths[ALL_TRAINED] == pytest.approx(float(np.sqrt(np.mean(full_change**2))), rel=1e-4)


@pytest.mark.parametrize("density", [1.0, 0.5])
def test_a_mask_leaves_elements_out_of_the_mean(density: float) -> None:
    name = NET.trainable[0].name
    active = np.zeros(report(0.0, density).trained.tensors[name].shape, np.bool_)
    active.reshape(-1)[0] = True
    masked = measure_update(report(0.5, density, {name: active}))
    assert masked[name] == pytest.approx(measure_update(report(0.5, density))[name], rel=1e-4)


def test_a_long_update_is_shortened_to_a_multiple_of_the_median_and_named() -> None:
    influence = limits({"a": 0.1, "b": 0.1, "c": 0.1, "far": 2.0})
    assert set(influence.reasons) == {"far"}
    assert "20 times" in influence.reasons["far"]
    after = measure_update(shorten_update(report(2.0), influence.shares["far"]))
    assert all(after[n] == pytest.approx(0.3, rel=1e-3) for n in TRAINED)


def test_an_update_far_beyond_the_limit_does_not_count_at_all() -> None:
    influence = limits({"a": 0.1, "b": 0.1, "c": 0.1, "far": 0.1 * 3 * REJECT_FACTOR * 1.1})
    assert set(influence.rejected) == {"far"}
    assert influence.shares.keys() == {"a", "b", "c"}


def test_boards_without_anything_new_silence_nobody() -> None:
    influence = limits({"a": 0.0, "b": 0.0, "c": 0.0, "d": 0.2})
    assert not any(influence.shares.values())
    assert not influence.rejected


@pytest.mark.parametrize("boards", [1, 2, 5])
def test_hostile_rounds_do_not_raise_the_limit_exponentially(boards: int) -> None:
    """All boards of a round double their update each time, as those that sit at the bound do."""
    remembered, length = limits({f"d{i}": 0.1 for i in range(boards)}).references, 0.1
    for _ in range(30):
        length *= 8
        influence = limits({f"d{i}": length for i in range(boards)}, remembered)
        remembered = influence.references
    scale = max(1.0, max(float(np.sqrt(np.mean(BASE[n].astype(np.float64) ** 2))) for n in TRAINED))
    assert all(float(v[0]) <= scale * 1.001 for n, v in remembered.items() if n in TRAINED)
    for device, shares in influence.shares.items():
        assert device in influence.reasons
        shortened_lengths = measure_update(shorten_update(report(length), shares))
        assert all(shortened_lengths[n] <= 3 * 2 * scale * 1.01 for n in TRAINED)


def test_a_reversed_update_counts_by_the_fourth_power_of_its_distance_from_the_mean() -> None:
    job, moves = Job(devices=4, strategy="fedavg"), np.array([0.1, 0.11, 0.09, -0.1])
    updates = [RoundUpdate(f"d{i}", i, 1, 1, partial(report, move)) for i, move in enumerate(moves)]
    closed = Round(compose(job), Scene(NET, 0, 1, BASE), UpdateLimits(job, uniform=True)).close(updates)
    # The limit is the median length, 0.1: the median distance is less.
    shares = np.minimum(1, 0.1 / np.abs(moves - moves.mean())) ** 4
    assert closed.model
    assert closed.reduced == 1
    for name, value in closed.model.items():
        assert np.allclose(value - BASE[name], np.mean((shares if name in TRAINED else 1) * moves), atol=1e-6)


def round_bounds(rounds: list[dict[str, float]], times: float = 1.5) -> list[Any]:
    """The bounds of rounds in which every tensor moves as far as its board."""
    remembered: Any = {}
    out = []
    for moves in rounds:
        device_lengths = {d: dict.fromkeys([*BASE, ALL_TRAINED], length) for d, length in moves.items()}
        out.append(bounded(device_lengths, remembered, times))
        remembered = out[-1].references
    return out


def test_one_of_two_boards_can_not_have_those_that_join_later_rejected() -> None:
    alone = {"honest": 0.1, "hostile": 1e-9}
    influences = round_bounds([*[alone] * 9, *[alone | dict.fromkeys("abc", 0.1)] * 10])
    assert not any(f.rejected for f in influences)
    assert not any(influences[-1].shares.values())


LENGTHS = st.floats(-12, 12).map(lambda exponent: 10.0**exponent) | st.just(0.0)


@given(st.lists(st.lists(LENGTHS, min_size=1, max_size=7), min_size=1, max_size=6), st.sampled_from([1.0, 1.5, 3.0]))
def test_fewer_than_half_of_any_round_are_rejected(rounds: list[list[float]], times: float) -> None:
    influences = round_bounds([dict(zip("abcdefg", moves, strict=False)) for moves in rounds], times)
    for moves, influence in zip(rounds, influences, strict=True):
        assert 2 * len(influence.rejected) < len(moves)


@given(
    st.lists(st.lists(st.floats(-12, -1), min_size=1, max_size=6), max_size=30),
    st.lists(st.floats(0.8, 1.0), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.1, 0.9]),
)
def test_boards_count_in_full_ten_rounds_after_their_moves_are_usual_again(
    quiet: list[list[float]], usual: list[float], scale: float
) -> None:
    rounds = [{f"d{i}": 10.0**m for i, m in enumerate(moves)} for moves in quiet]
    rounds += [{f"d{i}": scale * m for i, m in enumerate(usual)}] * 11
    influence = round_bounds(rounds)[-1]
    assert not influence.rejected
    assert not any(influence.shares.values())


@given(st.lists(st.integers(0, 40), min_size=3), st.floats(1, 5), st.integers(0, 100))
def test_the_median_of_samples_limits_weights(samples: list[int], times: float, max_weight: int) -> None:
    limit = math.ceil(times * max(1, statistics.median_low(samples)))
    limit = min(limit, max_weight or limit)
    assert weight_limit(samples, times, max_weight) == limit
    assert weight_limit_of_counts(Counter(samples), times, max_weight) == limit
    names = dict(enumerate(samples))
    assert capped_weights(names, times, max_weight) == {name: min(n, limit) for name, n in names.items()}
    assert capped_weights(names, 0.0) == names


def learning(rounds: int, last: float = 0.1) -> list[dict[str, float]]:
    """Two boards whose data the model learns, and one that keeps moving as far as all did at first."""
    return [{"a": 0.1 * 0.8**r, "b": 0.1 * 0.8**r, "unlike": last} for r in range(rounds)]


def test_a_board_that_moves_as_far_as_all_did_at_first_is_not_limited_when_others_have_learnt() -> None:
    assert not any(influence.reasons or influence.rejected for influence in round_bounds(learning(20)))


def test_such_a_board_moves_no_further_than_all_did_at_first() -> None:
    assert round_bounds(learning(20, last=0.4))[-1].reasons.keys() == {"unlike"}
    assert round_bounds(learning(20, last=3.0))[-1].rejected.keys() == {"unlike"}


def test_in_the_long_run_limits_follow_the_median() -> None:
    shares = round_bounds(learning(60))[-1].shares["unlike"]
    assert max(shares[n] for n in TRAINED) < 0.25
