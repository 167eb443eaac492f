"""What boards tell of their crashes, through a daemon and through a host of several jobs; and that watching a job
changes nothing."""

from pathlib import Path
from typing import Any

import pytest

from fedprune.wire.fleet_messages import CrashReport, CrashStored
from fedprune_server.devices.crash_store import CrashStore, read_crashes, read_warnings
from fedprune_server.monitoring.metrics import Metrics
from fedprune_server.observation.snapshot import JobSnapshot
from support.fakes.fleet import Fleet, ToyDevice, Watcher
from support.fakes.several_jobs import SeveralJobs, rename_job
from support.fakes.tiny_job import JOB


def report(name: str) -> CrashReport:
    return CrashReport(name, 7, 1, "killed", "no memory", (), "fedprune", "")


def crashes_once(board: ToyDevice) -> None:
    """Let a toy tell a crash, twice, after its birth."""
    birth = board.send_birth

    def born() -> None:
        birth()
        for _ in range(2):
            board.say(report(board.name))

    board.send_birth = born  # type: ignore[method-assign]


def answers(board: ToyDevice) -> set[int]:
    return {m.number for m in board.heard if isinstance(m, CrashStored)}


@pytest.mark.parametrize("several", [False, True])
def test_a_crash_is_stored_and_acknowledged(tmp_path: Path, several: bool) -> None:
    jobs = [rename_job(JOB, "one", rounds=1), rename_job(JOB, "two", rounds=1)]
    fleet: Any = SeveralJobs(tmp_path / "several", jobs, "abc") if several else Fleet(tmp_path / "alone", JOB)
    crashes_once(fleet.air.devices["a"])
    fleet.air.devices["b"].warnings = ({"at": 4, "text": "hot"},)
    with CrashStore(tmp_path) as crashes:
        if several:
            fleet.run(fleet.host(crashes=crashes))
        else:
            fleet.run(crashes=crashes)
    assert [(r.device, r.text) for r in read_crashes(tmp_path)] == [("a", "no memory")]
    assert read_warnings(tmp_path, "b") == [{"at": 4, "text": "hot"}]
    assert answers(fleet.air.devices["a"]) == {7}
    assert answers(fleet.air.devices["b"]) == set()


def test_nobody_else_tells_for_a_board_and_strangers_are_not_kept(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    raw = report("stranger").to_bytes()
    fleet.air.to_server("fedprune/1/default/stranger/-/up", raw)
    fleet.air.to_server("fedprune/1/default/a/-/up", raw)
    with CrashStore(tmp_path) as crashes:
        fleet.run(crashes=crashes)
    assert read_crashes(tmp_path) == []


def test_watching_changes_nothing_and_counts_what_happened(tmp_path: Path) -> None:
    plain = Fleet(tmp_path / "plain", JOB).run()
    metrics, fleet = Metrics(), Fleet(tmp_path / "watched", JOB)

    def fail_slowly(snapshot: JobSnapshot, what: object) -> None:
        fleet.air.now += 0.01
        raise OSError("no place is left")

    assert fleet.run(observers=[Watcher(fail_slowly), metrics]).model == plain.model
    text = metrics.text().decode()
    folded = sum(p["progress"] == "folded" for r in plain.history for p in r["devices"].values())
    assert f'fedprune_updates_counted_total{{job="{JOB.name}"}} {folded:.1f}' in text
    assert f'fedprune_rounds_finished_total{{job="{JOB.name}"}} {len(plain.history):.1f}' in text
    assert "fedprune_loop_turn_seconds_bucket" in text
