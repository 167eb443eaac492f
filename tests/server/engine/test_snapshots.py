"""What a snapshot shows of a job's devices, and that it looks at none before somebody asks."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedprune.coordination import Phase, State
from fedprune.jobs.change_tracking import TrackedDict
from fedprune.jobs.schedule import SYNCHRONOUS_SCHEDULE
from fedprune.jobs.state import DeviceTask, JobDevice, Progress
from fedprune_server.devices.registry import DeviceRegistry
from fedprune_server.engine.snapshots import SnapshotMaker
from fedprune_server.observation.snapshot import AT_OTHER_JOB, OFFLINE, FleetSnapshot
from support.fakes.fleet import Watcher
from support.fakes.several_jobs import SeveralJobs, rename_job
from support.fakes.tiny_job import ARCHITECTURE, JOB

NOTHING: Any = SimpleNamespace(waiting=0, queued=0, progress=lambda name: None, devices=list)


def maker(state: State, members: Any = None) -> SnapshotMaker:
    registry = DeviceRegistry(JOB, ARCHITECTURE, state, dict.fromkeys(state.devices, (0, 0)))
    return SnapshotMaker(
        JOB, state, registry, NOTHING, NOTHING, NOTHING, schedule=SYNCHRONOUS_SCHEDULE, clock=lambda: 5.0,
        members=members,
    )  # fmt: skip


def board(*, online: bool = True, **fields: Any) -> JobDevice:
    return JobDevice(1, online, {"name": "pi"}, None, 10, **fields)


class Unseen(TrackedDict[Any]):
    """Entries at which nobody may look."""

    def __iter__(self) -> Iterator[str]:
        raise AssertionError("a turn must cost the same in every fleet")

    keys = values = items = __iter__  # type: ignore[assignment]


def test_a_snapshot_looks_at_no_device_by_itself() -> None:
    state = State("m" * 64, phase=Phase.TRAINING)

    def members() -> set[str]:
        raise AssertionError("a turn must not read the database")

    snapshots = maker(state, members)
    state.devices = Unseen({"a": board(), "b": board(online=False)})
    state.tasks = Unseen({"a": DeviceTask(1, (2,))})
    snapshot = snapshots.snapshot(FleetSnapshot())
    assert (snapshot.able_devices, snapshot.known_devices, snapshot.parts_by_progress[Progress.EXTRACTING]) == (1, 2, 1)
    assert snapshot.devices["a"].part_progress == "extracting"
    with pytest.raises(AssertionError):
        len(snapshot.device_states)


def test_devices_are_counted_by_state_and_revoked_ones_apart() -> None:
    members = [{"a", "b"}]
    devices = {"a": board(), "b": board(online=False), "c": board(online=False), "d": board(excluded="too small")}
    snapshots = maker(State("m" * 64, devices=TrackedDict(devices)), lambda: members[0])

    def counts() -> dict[str, int]:
        return {state: n for state, n in snapshots.snapshot(FleetSnapshot()).device_states.items() if n}

    assert counts() == {"idle": 1, "offline": 1, "revoked": 1, "excluded": 1}
    members[0] = {"a", "b", "c", "d"}
    assert counts() == {"idle": 1, "offline": 2, "excluded": 1}


def test_a_device_is_offline_or_at_another_job() -> None:
    snapshots = maker(State("m" * 64, devices=TrackedDict({n: board(online=False) for n in "ab"})))
    devices = snapshots.snapshot(FleetSnapshot(connected_devices=("a",))).devices
    assert {n: (d.activity, d.connected, d.online) for n, d in devices.items()} == {
        "a": (AT_OTHER_JOB, True, False), "b": (OFFLINE, False, False),
    }  # fmt: skip
    assert "c" not in devices


def test_every_round_and_the_end_of_each_job_are_shown_once_and_in_order(tmp_path: Path) -> None:
    several, watcher = (
        SeveralJobs(tmp_path, [rename_job(JOB, "one"), rename_job(JOB, "two", rounds=2)], "abc"),
        Watcher(),
    )
    kinds: dict[str, list[str]] = {"one": [], "two": []}
    watcher = Watcher(lambda snapshot, what: kinds[snapshot.name].append(type(what).__name__))
    several.run(several.host(observers=[watcher]))
    for name, rounds in (("one", 3), ("two", 2)):
        assert (kinds[name].count("RoundEnded"), kinds[name].count("Finish")) == (rounds, 1)
        assert kinds[name].index("Folded") < kinds[name].index("Closed") < kinds[name].index("RoundEnded")
        assert kinds[name][-1] == "ServerEnding"
    assert watcher.jobs["one"].fleet.has_several_jobs
