"""`fedprune-server status`: boards first, with connection and reasons, then the latest rounds."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedprune.coordination import Phase, State
from fedprune.coordination.events import DeviceBorn
from fedprune.core.disk import file_lock
from fedprune.core.errors import ExitCode
from fedprune.jobs.job import Job
from fedprune.jobs.state import DeviceTask, JobDevice, Progress
from fedprune.security.device_identity import DeviceIdentity
from fedprune.updates.privacy import Privacy
from fedprune_server.cli.main import main
from fedprune_server.cli.status import job_status, server_status
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.maintenance.doctor import diagnose
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.storage.folder_lock import folder_lock
from fedprune_server.storage.storage import Storage
from support.fakes import tiny_job as toy


@pytest.fixture
def fleet_state(stopped_state: Path) -> Iterator[Path]:
    """The same folder with a server that runs on it."""
    with file_lock(stopped_state / "lock", "busy", "wait"):
        yield stopped_state


@pytest.fixture
def stopped_state(tmp_path: Path) -> Path:
    """A state folder after twelve rounds, with boards of every kind, which no server runs on."""
    profile = {"name": "pi"}
    state = State(
        model="0" * 64,
        round=13,
        phase=Phase.TRAINING,
        devices={
            "good": JobDevice(1, True, profile, None, 300, widths=(3,)),
            "off": JobDevice(1, False, profile, None, 200, widths=(3,)),
            "small": JobDevice(1, True, profile, None, 100, excluded="no width fits: memory"),
            "full": JobDevice(1, True, profile, None, 100, widths=(3,)),
        },
        tasks={"full": DeviceTask(1, (3,), progress=Progress.REFUSED, reason="disk full")},
        history=[
            {
                "round": n,
                "at": float(n),
                "model": "0" * 64,
                "metrics": {},
                "devices": {
                    "good": {"progress": "folded", "reason": "it stands out"},
                    "off": {"progress": "refused", "reason": f"too hot in {n}"},
                },
            }
            for n in range(1, 13)
        ],
    )
    with Storage.open_in(tmp_path) as storage:
        storage.put_settings({"job": Job(name="leaves", rounds=20).to_dict(), "name": "n"})
        storage.put_unplanned_devices(
            {"odd": {"online": True, "profile": "toaster", "samples": 9, "excluded": "no profile"}}
        )
        storage.save(state, (), 1.0)
    return tmp_path


def test_status_shows_devices_first_with_connection_and_reasons(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status", "--state", str(fleet_state)]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    begins = [
        "device full (pi): online, 100 samples",
        "round 13: refused: disk full",
        "device good (pi): online, 300 samples",
        "round 12: limited: it stands out",
        "device odd (toaster): online, 9 samples, excluded: no profile",
        "device off (pi): offline, 200 samples",
        "round 12: refused: too hot in 12",
        "device small (pi): online, 100 samples, excluded: no width fits",
        "the last 10 of 12 rounds:",
        "round 3: 1 of 2 devices",
        "good: limited: it stands out",
        "off: refused: too hot in 3",
    ]
    for line, begin in zip(lines[1:], begins, strict=False):
        assert line.strip().startswith(begin)


def test_status_as_json_has_excluded_boards_and_reasons(fleet_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--state", str(fleet_state)]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in body["devices"]}
    assert rows["odd"]["excluded"] == "no profile"
    assert rows["small"]["excluded"] == "no width fits: memory"
    assert (rows["full"]["progress"], rows["full"]["reason"]) == ("refused", "disk full")
    assert len({frozenset(row) for row in rows.values()}) == 1
    assert len(body["rounds"]) == 12


def test_a_free_board_of_two_jobs_is_told_from_a_dead_one(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boards = {n: JobDevice(1, n == "a", {"name": "pi"}, None, 9, widths=(1,)) for n in "abc"}
    (fleet_state / "jobs" / "other").mkdir(parents=True)
    with Storage.open_in(fleet_state / "jobs" / "other") as storage:
        storage.put_settings({"job": Job(name="other").to_dict(), "name": "n"})
        storage.save(State(model="0" * 64, devices=boards), [DeviceBorn("c", 1, {}, 9)], 7.0)
    (fleet_state / "alerts.json").write_text(json.dumps({"turned_at": time.time(), "alerts": [], "free_boards": ["b"]}))
    with file_lock(fleet_state / "jobs" / "other" / "lock", "busy", "wait"):
        main(["status", "--state", str(fleet_state)])
        main(["status", "--json", "--state", str(fleet_state)])
    text, _, body = capsys.readouterr().out.partition("\n{\n")
    lines = text.partition("job other")[2].splitlines()
    activities = [line.partition(": ")[2].partition(",")[0] for line in lines if line.startswith("  device")]
    assert activities == ["at work for other", "free", "offline"]
    other_devices = json.loads("{" + body)["jobs"][0]["devices"]
    assert [(d["online"], d["job"]) for d in other_devices] == [(True, "other"), (True, None), (False, None)]


def test_while_a_server_starts_nothing_is_said_that_only_its_last_run_knew(stopped_state: Path) -> None:
    ended_at = time.time() - 1000.0

    def monitor(*alerts: Alert) -> Monitor:
        folders = {toy.JOB.name: stopped_state}
        return Monitor(stopped_state, {}, folders, book=AlertBook(alerts), clock=lambda: ended_at)

    def kinds() -> list[str]:
        return [alert["kind"] for alert in server_status(stopped_state)["alerts"]]

    with folder_lock(stopped_state):
        first = monitor(Alert("broker", "critical", ended_at, "there is no connection to the broker", "why", "do"))
        first.start()
        first.close()
        assert kinds() == ["server-hangs", "broker"]
    with folder_lock(stopped_state):
        assert kinds() == []
        assert all(device["online"] is not None for device in server_status(stopped_state)["devices"])
        assert "server-hangs" not in {finding.kind for finding in diagnose(stopped_state)}
        second = monitor()
        second.start()
        second.close()
        assert kinds() == ["server-hangs"]


def test_a_device_that_was_shut_out_is_revoked_and_not_online(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with IdentityFolder.make(fleet_state, "lab") as identity:
        board = DeviceIdentity(fleet_state / "board", "lab", "good")
        EnrollmentService(identity).answer(board.request(identity.make_claim("good", 3600)))
        assert job_status(fleet_state)["devices"][1]["online"]
        identity.revoke("good")
    body = {d["name"]: d for d in job_status(fleet_state)["devices"]}
    assert (body["good"]["revoked"], body["good"]["online"], body["full"]["revoked"]) == (True, False, False)
    assert main(["status", "--state", str(fleet_state)]) == ExitCode.OK
    assert "device good (pi): revoked" in capsys.readouterr().out


def test_a_private_job_says_what_it_has_cost_whom(
    stopped_state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(name="leaves", rounds=20, privacy=Privacy(clip=0.5, noise_multiplier=2.0, epsilon_budget=9.0))
    with Storage.open_in(stopped_state) as storage:
        state = storage.load()
        assert state is not None
        state.private = True
        state.devices["good"].releases = {"2.0": 4}
        storage.put_settings({"job": job.to_dict(), "name": "n"})
        storage.save(state, (), 1.0)
    epsilon = job_status(stopped_state)["privacy"]["epsilon"]
    assert epsilon["full"] == epsilon["off"] == 0.0
    assert epsilon["good"] == pytest.approx(4.3772, rel=1e-4)  # one release at multiplier 1
    assert main(["status", "--state", str(stopped_state)]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "  private: ε at most 4.38 (good) at δ 1e-05, budget 9; local noise of 2 times the clip 0.5\n" in text
    assert ", 0 bytes up, ε 4.38\n" in text
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    main(["status", "--state", str(stopped_state)])
    assert "private: ε unknown without the extra privacy at δ" in capsys.readouterr().out


def test_status_names_the_best_round_beside_the_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    device_part = {"progress": "folded", "reason": "", "metrics": {"accuracy_before": 0.25, "accuracy_after": 0.5}}
    scores = [{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 0.75}, {"accuracy": 0.625}, {}]
    rows = [
        {"round": n, "at": float(n), "model": f"{n:064}", "metrics": metrics, "devices": {"a": device_part}}
        for n, metrics in enumerate(scores, 1)
    ]
    with Storage.open_in(tmp_path) as storage:
        storage.put_settings({"job": Job(name="leaves").to_dict(), "name": "n"})
        storage.save(State(model="0" * 64, round=5, history=rows), (), 1.0)
    assert main(["status", "--state", str(tmp_path), "--json", "--rounds", "1"]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    assert body["best"] == {"round": 2, "model": f"{2:064}", "metric": "accuracy", "score": 0.75}
    assert body["latest"] == {"round": 4, "model": f"{4:064}", "metric": "accuracy", "score": 0.625}
    assert main(["status", "--state", str(tmp_path)]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    assert "  round 4: 1 of 1 device, accuracy 62.5%, local accuracy 25.0% as received and 50.0% as trained" in lines
    assert "  best model: accuracy 75.0% after round 2; latest: accuracy 62.5% after round 4" in lines
