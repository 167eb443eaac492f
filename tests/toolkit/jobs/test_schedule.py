"""When rounds close and what updates count for: the papers' formulas, and sums that hold any fleet."""

from dataclasses import replace
from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedprune.aggregation.fixed_point import MAX_WEIGHT
from fedprune.aggregation.round_means import ServerStep
from fedprune.core.errors import ConfigError
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Decay, Mixing, Schedule, Staleness
from fedprune.jobs.update_weights import Arrival, staleness_share, step_size, update_weights
from fedprune.strategies import compose

pytestmark = pytest.mark.board

BUFFER = Schedule("asynchronous", arrivals=3, mixing="damped")
WINDOW = Schedule("asynchronous", window_s=10.0, least=2)


@pytest.mark.parametrize(
    ("staleness", "values"),
    [
        (Staleness("polynomial", a=0.5), [1, 2**-0.5, 3**-0.5, 0.5]),
        (Staleness("hinge", a=10, b=2), [1, 1, 1, 1 / 11]),
        (Staleness("hinge", a=0.6, b=0), [1, 1 / 1.6, 1 / 2.2, 1 / 2.8]),
    ],
)
def test_staleness_is_what_fedasync_says(staleness: Staleness, values: list[float]) -> None:
    assert [staleness(k) for k in range(4)] == pytest.approx(values, rel=1e-15)
    assert staleness(-1) == 1


@given(st.sampled_from(["polynomial", "hinge"]), st.floats(0.01, 20), st.integers(0, 9), st.integers(0, 500))
def test_what_is_staler_never_counts_for_more(decay: str, a: float, b: int, k: int) -> None:
    staleness = Staleness(decay, a, b)  # type: ignore[arg-type]
    assert 0 < staleness(k + 1) <= staleness(k) <= 1


def test_one_update_at_a_time_is_mixed_as_in_fedasync() -> None:
    schedule = Schedule("asynchronous", arrivals=1, mixing="damped", rate=0.6, staleness=Staleness("polynomial", a=0.5))
    update = Arrival(staleness=3, samples=17)
    assert step_size(schedule, [update], [], uniform=False) == pytest.approx(0.6 * 4**-0.5, rel=1e-15)


def test_a_buffer_is_averaged_as_in_fedbuff() -> None:
    """w ← w + η·(1/K)·Σ s(k_i)·Δ_i: shares times step are η·s_i / K."""
    schedule = replace(BUFFER, rate=0.7, staleness=Staleness("polynomial", a=0.5))
    updates = [Arrival(k, 5) for k in (0, 1, 8)]
    weights = update_weights(schedule, updates, 3, uniform=True)
    step = step_size(schedule, updates, [], uniform=True)
    for update, weight in zip(updates, weights, strict=True):
        share = step * weight / sum(weights)
        assert share == pytest.approx(0.7 * (update.staleness + 1) ** -0.5 / 3, rel=3 * 3 * 2**-24)


def test_all_that_is_normalised_goes_the_whole_way() -> None:
    schedule = Schedule("asynchronous", window_s=1.0, staleness=Staleness("hinge", a=1, b=2))
    assert step_size(schedule, [Arrival(9, 10), Arrival(0, 10)], [Arrival(30, 99)]) == 1.0


def test_frozen_staleness_is_that_of_the_arrival() -> None:
    schedule = replace(WINDOW, staleness=Staleness("polynomial", a=1))
    arrival = Arrival(5, 10, share=0.5)
    assert staleness_share(schedule, arrival) == pytest.approx(1 / 6)
    assert staleness_share(replace(schedule, staleness=Staleness("polynomial", a=1, frozen=True)), arrival) == 0.5


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 2**24)), min_size=1, max_size=9),
    st.lists(st.integers(1, 2**24), max_size=9),
    st.sampled_from([Staleness(), Staleness("polynomial", a=0.6), Staleness("hinge", a=0.6, b=2)]),
    st.booleans(),
)
def test_weights_fit_the_sums_and_keep_the_shares(
    arrival_pairs: list[tuple[int, int]], buffered_samples: list[int], staleness: Staleness, uniform: bool
) -> None:
    schedule = replace(BUFFER, staleness=staleness)
    arrivals = [Arrival(k, n) for k, n in arrival_pairs]
    total = (
        len(arrival_pairs) + len(buffered_samples)
        if uniform
        else sum(n for _, n in arrival_pairs) + sum(buffered_samples)
    )
    weights = update_weights(schedule, arrivals, total, uniform=uniform)
    assert min(weights) >= 1
    assert sum(weights) <= MAX_WEIGHT
    if len({k for k, _ in arrival_pairs}) == 1 and uniform:
        assert len(set(weights)) == 1
    order = sorted(
        range(len(arrival_pairs)),
        key=lambda i: staleness(arrival_pairs[i][0]) * (1 if uniform else arrival_pairs[i][1]),
    )
    assert [weights[i] for i in order] == sorted(weights)


def test_a_round_closes_with_the_last_update_that_it_waits_for() -> None:
    assert BUFFER.closes_at(0, [], 3, 5) is None
    assert BUFFER.closes_at(0, [1, 2], 1, 5) is None
    assert BUFFER.closes_at(0, [1, 2, 4], 0, 5) == 5
    assert BUFFER.closes_at(0, [1, 2], 0, 5) == 5, "nobody works: the third would never come"


@given(st.lists(st.floats(0, 50), max_size=6), st.integers(0, 3), st.floats(0, 60), st.integers(1, 4))
def test_more_arrivals_never_close_a_window_later(
    times: list[float], working: int, now: float, min_arrivals: int
) -> None:
    times = sorted(times)
    schedule = replace(WINDOW, least=min_arrivals)
    before = [schedule.closes_at(0, times[:i], working + 1, now) for i in range(len(times) + 1)]
    closing_times = [t for t in before if t is not None]
    assert before[len(before) - len(closing_times) :] == closing_times, "once it is known when, it stays known"
    assert len(set(closing_times)) <= 1
    assert all(t >= schedule.window_s for t in closing_times)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"kind": "asynchronous"}, "neither"),
        ({"kind": "asynchronous", "arrivals": 1, "window_s": 2}, "both"),
        ({"kind": "asynchronous", "arrivals": 4, "concurrent": 3}, "at most concurrent"),
        ({"kind": "asynchronous", "arrivals": 4, "mixing": "unbiased"}, "window_s above 0"),
    ],
)
def test_nonsense_is_refused_by_name(body: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Schedule.from_dict(body)


@pytest.mark.parametrize("strategy", ["fedasync", "fedfix", "fedbuff", "pr-fl"])
def test_a_rate_that_never_moves_the_model_is_refused_at_the_start(strategy: str) -> None:
    with pytest.raises(ConfigError, match="rate"):
        compose(Job(strategy=strategy, options={"rate": 0.0}))


@given(
    st.sampled_from(get_args(Mixing)),
    st.sampled_from(get_args(Decay)),
    st.floats(0, 1e6),
    st.floats(0, 1e3, exclude_min=True),
    st.lists(
        st.builds(Arrival, st.integers(0, 10**6), st.integers(0, 10**6), st.floats(0, 1e8)), min_size=1, max_size=3
    ),
    st.lists(st.builds(Arrival, st.integers(0, 10**6), st.integers(0, 10**6)), max_size=3),
)
@example("unbiased", "constant", 0.5, 1.0, [Arrival(1, 10, 300.0)], [Arrival(0, 10)])
@example("damped", "polynomial", 1100.0, 1.0, [Arrival(1, 1)], [])
@example("share", "polynomial", 1e6, 1e3, [Arrival(1, 1)], [Arrival(9, 9)])
def test_every_step_of_a_schedule_is_one_that_the_server_takes(
    mixing: Mixing, decay: Decay, a: float, rate: float, arrivals: list[Arrival], buffered_arrivals: list[Arrival]
) -> None:
    schedule = Schedule("asynchronous", window_s=0.1, staleness=Staleness(decay, a), mixing=mixing, rate=rate)
    for uniform in (False, True):
        ServerStep(step_size(schedule, arrivals, buffered_arrivals, uniform=uniform))
        assert all(w >= 1 for w in update_weights(schedule, arrivals, 1, uniform=uniform))
