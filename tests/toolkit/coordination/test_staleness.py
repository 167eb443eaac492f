"""What an update counts for is guessed when it comes, and settled when its round closes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination.staleness import UpdateWeights
from fedprune.jobs.job import Job
from fedprune.jobs.schedule import Mixing, Schedule, Staleness
from fedprune.jobs.state import DeviceTask, JobDevice, Progress, State

pytestmark = pytest.mark.board


def basis(number: int) -> dict[str, Any]:
    return {"round": number, "model": "m", "ranking": "r", "order": None, "memory": {}}


def fleet(rounds: list[int], kept_rounds: list[int], samples: list[int], number: int = 9) -> State:
    """Devices with checked updates of these rounds, and further ones whose last updates are kept."""
    state = State(model="m", round=number)
    for i, n in enumerate(samples[: len(rounds) + len(kept_rounds)]):
        name = f"d{i}"
        state.devices[name] = JobDevice(1, True, {}, None, n, widths=(1,))
        if i < len(rounds):
            state.tasks[name] = DeviceTask(
                1, (1,), samples=n, basis=basis(rounds[i]), progress=Progress.FOLDED, seconds=7.0 + i
            )
        else:
            round_ = kept_rounds[i - len(rounds)]
            state.devices[name].buffer = {"round": round_, "samples": n, "seconds": 3.0, "share": 0.5**i}
    return state


SOME = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@given(
    st.sampled_from(["damped", "normalised", "share", "unbiased"]),
    st.sampled_from(["constant", "polynomial"]),
    st.tuples(st.booleans(), st.booleans(), st.booleans()),
    SOME,
    SOME,
    st.lists(st.integers(1, 10**6), min_size=8, max_size=8),
)
def test_where_all_that_is_there_enters_the_guess_is_what_counts(
    mixing: Mixing,
    decay: Any,
    flags: tuple[bool, bool, bool],
    rounds: list[int],
    kept_rounds: list[int],
    samples: list[int],
) -> None:
    frozen, keep, uniform = flags
    staleness = Staleness(decay, 0.6, frozen=frozen)
    schedule = Schedule("asynchronous", window_s=2.0, keep=keep, mixing=mixing, staleness=staleness)
    state = fleet(rounds, kept_rounds, samples)
    shares = UpdateWeights(state, schedule, Job(), uniform=uniform)
    weights = shares.closing_record(dict(state.tasks))["weights"]
    assert {n: shares.weight(n) for n in state.tasks} == {n: weights[n] for n in state.tasks}


def test_another_sample_count_changes_what_all_updates_weigh() -> None:
    schedule = Schedule("asynchronous", window_s=2.0, keep=True, staleness=Staleness("polynomial"))
    state = fleet([8] * 8, [], [10] * 8)
    shares = UpdateWeights(state, schedule, Job(), uniform=False)
    shares.weight("d0")
    for name in ("d5", "d0", "d1", "d2", "d3", "d4"):  # the last ones move the limit
        state.devices[name].samples = state.tasks[name].samples = 1000
        fresh = UpdateWeights(state, schedule, Job(), uniform=False)
        assert [shares.weight(n) for n in state.tasks] == [fresh.weight(n) for n in state.tasks]
