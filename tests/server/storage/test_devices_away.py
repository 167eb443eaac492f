"""Devices that are away are in the database alone, and are there when they are needed."""

from __future__ import annotations

import gc
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.coordination import State
from fedprune.coordination import commands as do
from fedprune.coordination import events as on
from fedprune.core.errors import StorageError
from fedprune.jobs import packed_json
from fedprune.jobs.failure_kind import FailureKind
from fedprune.jobs.job import Job
from fedprune.jobs.state import Device, Task
from fedprune_server.storage import devices_away
from fedprune_server.storage.devices_away import DevicesAway
from fedprune_server.storage.storage import Storage
from fedprune_server.storage.tables import DeviceRows
from support.fakes import tiny_job
from support.fakes.synchronous_shell import Shell

PROFILE = {"name": "board"}
CODECS: list[str] = []


def probe(number: int) -> dict[str, Any]:
    return {"train_rate": number / 7, "memory_available": 1_000_000 + number, "onnxruntime": "1.22.1"}


def plan(number: int) -> dict[str, Any]:
    return {"widths": [4, 8], "limits": [{"name": f"limit {i}", "value": i / (number + 1)} for i in range(20)]}


def device(number: int, *, online: bool) -> Device:
    return Device(number, online, PROFILE, probe(number), 10, plan(number), (4, 8), codecs=CODECS)


def held(state: State) -> set[str]:
    """Devices that are in memory."""
    return {name for name, entry in state.devices.items() if not entry.away}


@pytest.fixture
def none_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices_away, "KEPT", 0)


@pytest.fixture
def state() -> State:
    found = State(model="m" * 64)
    found.devices |= {name: device(i, online=name == "here") for i, name in enumerate(("a", "b", "c", "here"))}
    return found


@pytest.mark.usefixtures("none_kept")
def test_they_come_back_when_they_are_read(tmp_path: Path, state: State) -> None:
    with Storage.at(tmp_path) as storage:
        storage.save(state, (), 1.0)
        assert held(state) == {"here"}
        assert (dict(state.devices["b"].plan or {}), dict(state.devices["b"].probe or {})) == (plan(1), probe(1))
        assert held(state) == {"here", "b"}
        state.devices["a"].samples = 11
        storage.save(state, (), 2.0)
        assert held(state) == {"here"}
        with Storage.at(tmp_path) as other:
            assert other.load() == state


@pytest.mark.usefixtures("none_kept")
def test_changes_of_what_was_put_away_are_saved(tmp_path: Path, state: State) -> None:
    with Storage.at(tmp_path) as storage:
        storage.save(state, (), 1.0)
        state.devices["a"].plan = None
        state.devices["b"] = device(9, online=True)
        del state.devices["c"]
        storage.save(state, (), 2.0)
        with Storage.at(tmp_path) as other:
            assert other.load() == state


@pytest.mark.usefixtures("none_kept")
def test_a_device_that_is_taken_out_of_the_state_says_what_it_lacks(tmp_path: Path, state: State) -> None:
    with Storage.at(tmp_path) as storage:
        storage.save(state, (), 1.0)
        gone = state.devices.pop("a")
    with pytest.raises(StorageError, match=r"attributes .* taken out"):
        _ = gone.plan
    with pytest.raises(StorageError, match=r"attributes .* taken out"):
        gone.failures = 1  # which others have in common with it
    assert (gone.samples, gone.widths, gone.past, state.devices["b"].failures) == (10, (4, 8), None, 0)
    with pytest.raises(AttributeError):
        _ = gone.plans  # type: ignore[attr-defined]


@pytest.mark.usefixtures("none_kept")
def test_devices_of_a_round_are_put_away_once_the_next_one_is_over(tmp_path: Path, state: State) -> None:
    state.tasks["a"] = Task(1, (4, 8))
    with Storage.at(tmp_path) as storage:
        storage.save(state, (), 1.0)
        assert held(state) == {"here", "a"}
        summary = {"round": 1, "at": 2.0, "model": "m" * 64, "metrics": {}}
        state.history.append({**summary, "devices": {"a": state.tasks.pop("a").summary()}})
        storage.save(state, (), 2.0)
        assert held(state) == {"here", "a"}
        state.history.append({**summary, "round": 2, "devices": {}})
        storage.save(state, (), 3.0)
        assert held(state) == {"here"}


def test_the_latest_that_have_left_are_kept_as_they_are(
    tmp_path: Path, state: State, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices_away, "KEPT", 2)
    with Storage.at(tmp_path) as storage:
        storage.save(state, (), 1.0)
        state.devices["here"].online = False
        storage.save(state, [on.Ticked()], 2.0)
        assert held(state) == {"c", "here"}


def test_a_device_that_is_away_takes_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 230 bytes, its name included; in memory as a whole it would take 1,200."""
    monkeypatch.setattr(devices_away, "KEPT", 10)
    boards, state = 2000, State(model="m" * 64)
    with Storage.at(tmp_path) as storage:
        storage.save(state, (), 1.0)
        tracemalloc.start()
        try:
            before, _ = tracemalloc.get_traced_memory()
            for first in range(0, boards, 100):  # as many connect at a time
                names = [f"board-{i:05}" for i in range(first, first + 100)]
                state.devices |= {name: device(i, online=True) for i, name in enumerate(names, first)}
                storage.save(state, (), 2.0)
                for name in names:
                    state.devices[name].online = False
                storage.save(state, (), 3.0)
            packed_json._read.cache_clear()
            gc.collect()
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    per_board = (after - before) / boards
    assert 150 < per_board < 280, per_board


JOB = replace(tiny_job.JOB, rounds=6, devices=2, participation=0.6, fairness=0.5, over_selection=0.5)
STEPS = st.one_of(
    st.tuples(st.just("born"), st.sampled_from("abcdef"), st.sampled_from(["", "north"]), st.integers(10, 12)),
    st.tuples(st.just("died"), st.sampled_from("abcdef")),
    st.tuples(st.just("refuse"), st.sampled_from("abcdef")),
    st.tuples(st.sampled_from(["answer", "answers", "late"])),
)


class SavingShell(Shell):
    """A shell whose state is saved after every event; devices that are away are read from what was saved."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.saved: dict[str, str] = {}
        self._rows, self._away = DeviceRows(), DevicesAway(lambda name: json.loads(self.saved[name]))
        self._rounds = 0

    def feed(self, event: on.Event) -> list[do.Command]:
        commands = super().feed(event)
        state = self.state
        for name in state.devices.changed:
            self.saved[name] = self._rows.row(name, state.devices[name])["body"]
        self._away.saved(state, state.devices.changed, round_over=len(state.history) > self._rounds)
        self._rounds = len(state.history)
        state.settle()
        return commands


def steps_of(shell: Shell, steps: list[Any]) -> list[Any]:
    """What the coordinator says in each step, and the state at the end."""
    found: list[Any] = []
    for session, step in enumerate(steps, 1):
        events: list[on.Event] = []
        match step:
            case "born", name, region, samples:
                events = [on.DeviceBorn(name, session, {"name": "toy"}, samples, region=region)]
            case "died", name if (known := shell.state.devices.get(name)) is not None:
                events = [on.DeviceDied(name, known.session)]
            case "refuse", name if (task := shell.state.tasks.get(name)) is not None:
                events = [on.OfferRefused(name, shell.state.round, task.attempt, "no room", FailureKind.OTHER)]
            case ("answer",):
                events = [shell.inbox.pop(0)] if shell.inbox else []
            case ("answers",):
                events, shell.inbox = shell.inbox, []
            case ("late",):
                shell.now += JOB.deadline_s
                events = [on.Ticked()]
        found += [shell.feed(event) for event in events]
    return [*found, shell.state.to_json()]


@pytest.mark.usefixtures("none_kept")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(STEPS, max_size=60))
def test_rounds_are_the_same_whether_devices_are_in_memory_or_not(steps: list[Any]) -> None:
    born = [("born", name, "", 10) for name in "abcd"]
    assert steps_of(SavingShell(JOB), [*born, *steps]) == steps_of(Shell(JOB), [*born, *steps])
