"""The indexes of an asynchronous job agree with a look at all devices, whatever has changed since."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination.availability import WORKING_PROGRESS, DeviceIndex
from fedprune.core.rng import keyed_generator
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.state import DeviceTask, JobDevice, Progress, State

pytestmark = pytest.mark.board

NAMES = st.sampled_from([f"d{i}" for i in range(8)])
TIMES = st.none() | st.sampled_from([1.0, 2.0, 3.0])
STEPS = st.one_of(
    st.tuples(st.just("device"), NAMES, st.booleans(), st.sampled_from(["", "no width fits"]), st.integers(0, 2)),
    st.tuples(st.just("task"), NAMES, st.sampled_from(Progress), TIMES, TIMES),
    st.tuples(st.just("no task"), NAMES),
    st.tuples(st.sampled_from(["ask", "over"])),
)


def turn(state: State, name: str) -> float:
    last = state.devices[name].last_offered_round
    return last + keyed_generator(0, last, name).random()


@given(st.lists(STEPS, max_size=60), st.booleans())
def test_indexes_say_what_the_state_says(steps: list[Any], drawn: bool) -> None:
    state = State(model="m")
    availability = DeviceIndex(state, lambda name: name != "d7", (lambda name: turn(state, name)) if drawn else None)
    for step in steps:
        match step:
            case "device", name, online, excluded, last:
                state.devices[name] = JobDevice(1, online, {}, None, 10, excluded=excluded, last_offered_round=last)
            case "task", name, progress, arrived, deadline:
                state.tasks[name] = DeviceTask(1, (), progress=progress, arrived_at=arrived, deadline=deadline)
            case "no task", name:
                state.tasks.pop(name, None)
            case ("over",):
                state.tasks = TrackedDict()
            case ("ask",):
                check(availability, state, drawn)
    check(availability, state, drawn)


def check(availability: DeviceIndex, state: State, drawn: bool) -> None:
    tasks = state.tasks
    rest = {n for n, d in state.devices.items() if not d.excluded and (n not in tasks or failed(tasks[n]))}
    away = {n for n in rest if not state.devices[n].online}
    idle = {n for n in rest - away - {"d7"} if n not in tasks or tasks[n].deadline is None}
    order = sorted(idle, key=lambda n: (turn(state, n) if drawn else 0.0, n))
    done = sorted((t.arrived_at or 0.0, n) for n, t in tasks.items() if t.progress is Progress.FOLDED)
    due = {n: t.deadline for n, t in tasks.items() if t.deadline is not None}
    stored = sorted(n for n, t in tasks.items() if t.progress is Progress.STORED)
    assert availability.idle_count == len(idle)
    assert [availability.first_idle(limit) for limit in range(4)] == [sorted(order[:limit]) for limit in range(4)]
    assert availability.arrival_times == [at for at, _ in done]
    assert availability.checked_updates() == [(n, tasks[n]) for _, n in done]
    assert availability.next_deadline == min(due.values(), default=None)
    assert availability.late_devices(2.0) == sorted(n for n, at in due.items() if at <= 2.0)
    assert availability.unchecked_updates() == [(n, tasks[n]) for n in stored]
    assert availability.failed_devices() == {n for n, t in tasks.items() if failed(t)}
    assert availability.has_absent_device == bool(away)
    assert availability.may_bring_update == (
        bool(stored) or bool(idle) or any(t.progress in WORKING_PROGRESS for t in tasks.values())
    )


def failed(task: DeviceTask) -> bool:
    return task.progress is Progress.REFUSED
