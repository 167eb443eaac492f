"""What boards say of their scores decides on densities, and on the end: how far one board's word goes."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fedprune.jobs.state import JobDevice, State
from fedprune.strategies.recovery import Recovery

pytestmark = pytest.mark.board

ANYTHING = st.floats(allow_nan=True, allow_infinity=True)


def suspects_after(recovery: Recovery, state: State, scores: dict[str, float], samples: dict[str, int]) -> set[str]:
    """One check in which devices report these accuracies; returns who grows."""
    for name, accuracy in scores.items():
        device = state.devices.setdefault(name, JobDevice(1, True, {}, None, samples.get(name, 10), widths=(1,)))
        device.density = 0.5
        recovery.learn(device, {"accuracy_validation": accuracy})
    return set(recovery.review(state, 0.5))


@example([1e308, 1e308], [0.0])
@example([1e308, -1e308], [0.0])
@given(st.lists(ANYTHING, min_size=1, max_size=6), st.lists(ANYTHING, min_size=1, max_size=6))
def test_no_number_stops_a_check(accuracies: list[float], losses: list[float]) -> None:
    recovery, state = Recovery(patience=1), State("m")
    for _ in accuracies:
        suspects_after(recovery, state, {str(i): a for i, a in enumerate(accuracies)}, {})
        for i, loss in enumerate(losses):
            recovery.learn(state.devices.setdefault(str(i), JobDevice(1, True, {}, None, 1)), {"loss_validation": loss})
        recovery.review(state, 0.5)
        assert State.from_json(state.to_json()) == state


@pytest.mark.parametrize("boards", [3, 10])
def test_one_inflated_score_makes_nobody_else_grow(boards: int) -> None:
    """The others still learn: without the inflated board all goes on, with it, it must go on alike."""
    recovery, state, honest = Recovery(patience=3), State("m"), [f"honest-{i}" for i in range(boards - 1)]
    for number in range(12):
        scores = {n: 0.3 + 0.02 * number + 0.001 * i for i, n in enumerate(honest)}
        # Once a score that nobody can beat, by a board that says that it has all the samples in the world.
        assert suspects_after(recovery, state, scores | {"zz": 1.0 if number == 0 else 0.2}, {"zz": 10**9}) <= {"zz"}
    assert state.allocation["floor"] == 0.5


def test_whose_score_only_falls_grows_at_every_check_but_the_first() -> None:
    recovery, state = Recovery(patience=1, delta=0.1), State("m")
    device = state.devices["a"] = JobDevice(1, True, {}, None, 10, widths=(1,), density=0.1)
    for check in range(1, 6):
        recovery.learn(device, {"accuracy_validation": 0.9 - 0.05 * check})
        grows = recovery.review(state, 0.1)
        assert list(grows) == ([] if check == 1 else ["a"])
        device.density = grows.get("a", device.density)
    assert device.density == pytest.approx(0.5)
