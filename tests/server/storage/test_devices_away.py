"""Plans and probes of devices that are away are in the database alone, and are there when they are needed."""

from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import State
from fedprune.coordination import events as on
from fedprune.core.errors import StorageError
from fedprune.jobs.state import DeviceTask, JobDevice
from fedprune_server.storage import storage as state_storage
from fedprune_server.storage.storage import Storage

PROFILE = {"name": "board"}
CODECS: list[str] = []


def probe(number: int) -> dict[str, Any]:
    return {"train_rate": number / 7, "memory_available": 1_000_000 + number, "onnxruntime": "1.22.1"}


def plan(number: int) -> dict[str, Any]:
    return {"widths": [4, 8], "limits": [{"name": f"limit {i}", "value": i / (number + 1)} for i in range(20)]}


def device(number: int, *, online: bool) -> JobDevice:
    return JobDevice(number, online, PROFILE, probe(number), 10, plan(number), (4, 8), codecs=CODECS)


def devices_in_memory(state: State) -> set[str]:
    """Devices whose plan is in memory."""
    names = set()
    for name, entry in state.devices.items():
        try:
            object.__getattribute__(entry, "plan")
        except AttributeError:
            continue
        names.add(name)
    return names


@pytest.fixture(autouse=True)
def memory_limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_storage, "MAX_AWAY_IN_MEMORY", getattr(request, "param", 0))


@pytest.fixture
def state() -> State:
    state = State(model="m" * 64)
    state.devices |= {name: device(i, online=name == "here") for i, name in enumerate(("a", "b", "c", "here"))}
    return state


def test_they_come_back_when_they_are_read(tmp_path: Path, state: State) -> None:
    with Storage.open_in(tmp_path) as storage:
        storage.save(state, (), 1.0)
        assert devices_in_memory(state) == {"here"}
        assert (dict(state.devices["b"].plan or {}), dict(state.devices["b"].probe or {})) == (plan(1), probe(1))
        assert devices_in_memory(state) == {"here", "b"}
        state.devices["a"].samples = 11
        storage.save(state, (), 2.0)
        assert devices_in_memory(state) == {"here"}
        with Storage.open_in(tmp_path) as reopened:
            assert reopened.load() == state


def test_changes_of_what_was_put_away_are_saved(tmp_path: Path, state: State) -> None:
    with Storage.open_in(tmp_path) as storage:
        storage.save(state, (), 1.0)
        state.devices["a"].plan = None
        state.devices["b"] = device(9, online=True)
        del state.devices["c"]
        storage.save(state, (), 2.0)
        with Storage.open_in(tmp_path) as reopened:
            assert reopened.load() == state


def test_a_device_that_is_taken_out_of_the_state_says_what_it_lacks(tmp_path: Path, state: State) -> None:
    with Storage.open_in(tmp_path) as storage:
        storage.save(state, (), 1.0)
        gone = state.devices.pop("a")
    with pytest.raises(StorageError, match="plan"):
        _ = gone.plan
    with pytest.raises(AttributeError):
        _ = gone.step_widths  # type: ignore[attr-defined]


def test_devices_of_a_round_are_put_away_once_the_next_one_is_over(tmp_path: Path, state: State) -> None:
    state.tasks["a"] = DeviceTask(1, (4, 8))
    with Storage.open_in(tmp_path) as storage:
        storage.save(state, (), 1.0)
        assert devices_in_memory(state) == {"here", "a"}
        summary = {"round": 1, "at": 2.0, "model": "m" * 64, "metrics": {}}
        state.history.append({**summary, "devices": {"a": state.tasks.pop("a").summary()}})
        storage.save(state, (), 2.0)
        assert devices_in_memory(state) == {"here", "a"}
        state.history.append({**summary, "round": 2, "devices": {}})
        storage.save(state, (), 3.0)
        assert devices_in_memory(state) == {"here"}


@pytest.mark.parametrize("memory_limit", [2], indirect=True)
def test_the_latest_that_have_left_are_kept_as_they_are(tmp_path: Path, state: State) -> None:
    with Storage.open_in(tmp_path) as storage:
        storage.save(state, (), 1.0)
        state.devices["here"].online = False
        storage.save(state, [on.Ticked()], 2.0)
        assert devices_in_memory(state) == {"c", "here"}
