"""The devices that a round may ask are those of the state, whatever happened since it was last asked."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination.ready_devices import ReadyDevices
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.state import JobDevice, State

pytestmark = pytest.mark.board

NAMES = st.sampled_from([f"d{i}" for i in range(12)])
STEPS = st.one_of(
    st.tuples(st.just("born"), NAMES),
    st.tuples(st.just("died"), NAMES),
    st.tuples(st.just("excluded"), NAMES, st.sampled_from(["", "no width fits"])),
    st.tuples(st.just("barred"), NAMES),
    st.tuples(st.just("gone"), NAMES),
    st.tuples(st.sampled_from(["ask", "replaced"])),
)


@given(st.lists(STEPS, max_size=40))
def test_ready_devices_are_those_of_the_state(steps: list[Any]) -> None:
    state, barred = State(model="m"), set[str]()
    ready = ReadyDevices(state, lambda name: name not in barred)
    for step in steps:
        match step:
            case "born", name:
                state.devices[name] = JobDevice(1, True, {"name": "pi"}, None, 10)
            case "died", name if name in state.devices:
                state.devices[name].online = False
            case "excluded", name, reason if name in state.devices:
                state.devices[name].excluded = reason
            case "barred", name if name in state.devices:
                barred.add(name)
                state.devices[name].releases = {"1.0": len(barred)}
            case "gone", name:
                state.devices.pop(name, None)
            case ("replaced",):
                state.devices = TrackedDict(dict(list(state.devices.items())[::2]))
            case ("ask",):
                check(ready, state, barred)
    check(ready, state, barred)


def check(ready: ReadyDevices, state: State, barred: set[str]) -> None:
    expected = sorted(n for n, d in state.devices.items() if d.online and not d.excluded and n not in barred)
    assert ready.names(ready.places()) == expected
