"""`fedprune-server status`: boards first, with connection and reasons, then the latest rounds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from fedprune.coordination import Phase, State
from fedprune.coordination.events import DeviceBorn, Extracted, Ticked
from fedprune.core.disk import locked
from fedprune.core.errors import ExitCode
from fedprune.core.text import amount
from fedprune.jobs.job import Job
from fedprune.jobs.state import Device, Progress, Task
from fedprune.model.recipe import Recipe
from fedprune.planning.plan import plan
from fedprune.planning.probe_report import CUDA, ProbeReport
from fedprune.planning.profile_store import find
from fedprune.security.device_identity import DeviceIdentity
from fedprune.updates.privacy import Privacy
from fedprune_server.cli.main import main
from fedprune_server.cli.status import status, status_of_all
from fedprune_server.devices.quarantine import FILE, Quarantine
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.enrollment.service import EnrollmentService
from fedprune_server.maintenance.doctor import diagnose
from fedprune_server.monitoring.alert_book import AlertBook
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor import Monitor
from fedprune_server.storage.state_folder import folder_lock
from fedprune_server.storage.storage import Storage
from support.fakes import tiny_job as toy
from support.fakes.fleet import Fleet


@pytest.fixture
def fleet_state(stopped_state: Path) -> Iterator[Path]:
    """The same folder with a server that runs on it."""
    with locked(stopped_state / "lock", "busy", "wait"):
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
            "good": Device(1, True, profile, None, 300, widths=(3,)),
            "off": Device(1, False, profile, None, 200, widths=(3,)),
            "small": Device(1, True, profile, None, 100, excluded="no width fits: memory"),
            "full": Device(1, True, profile, None, 100, widths=(3,)),
        },
        tasks={"full": Task(1, (3,), progress=Progress.REFUSED, reason="disk full")},
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
    with Storage.at(tmp_path) as storage:
        storage.put_settings({"job": Job(name="leaves", rounds=20).to_dict(), "name": "n"})
        storage.put_outsiders({"odd": {"online": True, "profile": "toaster", "samples": 9, "excluded": "no profile"}})
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


def test_status_shows_what_trains_and_the_energy_of_a_round(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    orin = find("jetson-orin-nano")
    made = plan(toy.ARCHITECTURE, orin, Recipe(), 100)
    device = Device(1, True, orin.to_dict(), None, 100, made.to_dict(), made.widths)
    with Storage.at(tmp_path) as storage:
        storage.put_settings({"job": Job(name="leaves").to_dict(), "name": "n"})
        storage.save(State(model="0" * 64, devices={"orin": device}), (), 1.0)
    assert main(["status", "--state", str(tmp_path)]) == ExitCode.OK
    joules = amount(made.prediction.train_j or 0, "J")
    assert f"density 1, no limit binds, planned for its GPU, {joules} per round, " in capsys.readouterr().out
    device.probe = ProbeReport(6, 8 * 10**9, 6 * 10**9, 2.0, train_rate=1e12, unit=CUDA).to_dict()
    with Storage.at(tmp_path) as storage:
        storage.save(State(model="0" * 64, devices={"orin": device}), (), 2.0)
    main(["status", "--state", str(tmp_path)])
    assert ", trains on its GPU, " in capsys.readouterr().out


@pytest.mark.parametrize(("options", "first"), [(["--rounds", "2"], 11), (["--rounds", "50"], 1)])
def test_status_shows_as_many_rounds_as_asked(
    fleet_state: Path, options: list[str], first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["status", "--state", str(fleet_state), *options])
    rounds = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  round")]
    assert len(rounds) == 13 - first
    assert rounds[0].startswith(f"  round {first}:")


def test_status_as_json_has_excluded_boards_and_reasons(fleet_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--json", "--state", str(fleet_state)]) == ExitCode.OK
    body = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in body["devices"]}
    assert rows["odd"]["excluded"] == "no profile"
    assert rows["small"]["excluded"] == "no width fits: memory"
    assert (rows["full"]["progress"], rows["full"]["reason"]) == ("refused", "disk full")
    assert len({frozenset(row) for row in rows.values()}) == 1
    assert len(body["rounds"]) == 12


def test_status_says_that_no_server_runs_and_when_devices_were_heard_of(
    stopped_state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedprune_server.cli.status._clock", lambda at: f"{at:g} s")
    with Storage.at(stopped_state) as storage:
        state = storage.load()
        assert state is not None
        events = [DeviceBorn("good", 1, {}, 300), Extracted(13, "full", 1, {}), DeviceBorn("off", 1, {}, 200), Ticked()]
        for at, event in enumerate(events, 50):
            state.deadline = at  # only events that change something are logged
            storage.save(state, [event], at)
    assert main(["status", "--state", str(stopped_state)]) == ExitCode.OK
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == "job leaves: round 13 of 20, stopped while training"
    assert lines[1] == (
        f"no server is running; the last event was at 53 s; to go on: fedprune-server run --state {stopped_state}"
    )
    devices = {line.split()[1]: line.partition(": ")[2] for line in lines if line.startswith("device ")}
    assert devices["good"].startswith("offline, last heard from at 50 s, 300 samples")
    assert devices["off"].startswith("offline, last heard from at 52 s")
    assert all(devices[name].startswith("offline, ") for name in ("full", "odd", "small"))


def test_a_free_board_of_two_jobs_is_told_from_a_dead_one(
    fleet_state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedprune_server.cli.status._clock", lambda at: f"{at:g} s")
    boards = {n: Device(1, n == "a", {"name": "pi"}, None, 9, widths=(1,)) for n in "abc"}
    (fleet_state / "jobs" / "other").mkdir(parents=True)
    with Storage.at(fleet_state / "jobs" / "other") as storage:
        storage.put_settings({"job": Job(name="other").to_dict(), "name": "n"})
        storage.save(State(model="0" * 64, devices=boards), [DeviceBorn("c", 1, {}, 9)], 7.0)
    (fleet_state / "alerts.json").write_text(json.dumps({"turned_at": time.time(), "alerts": [], "free": ["b"]}))
    with locked(fleet_state / "jobs" / "other" / "lock", "busy", "wait"):
        main(["status", "--state", str(fleet_state)])
        main(["status", "--json", "--state", str(fleet_state)])
    text, _, body = capsys.readouterr().out.partition("\n{\n")
    lines = text.partition("job other")[2].splitlines()
    seen = [line.partition(": ")[2].rpartition(", 9 samples")[0] for line in lines if line.startswith("  device")]
    assert seen == ["at work for other", "free", "offline, last heard from at 7 s"]
    other = json.loads("{" + body)["jobs"][0]["devices"]
    assert [(d["online"], d["job"]) for d in other] == [(True, "other"), (True, None), (False, None)]


def test_without_a_broker_no_board_is_said_to_be_online(fleet_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = Alert("broker", "critical", 1.0, "there is no connection to the broker", "why", "do")
    (fleet_state / "alerts.json").write_text(json.dumps({"turned_at": time.time(), "alerts": [asdict(lost)]}))
    main(["status", "--state", str(fleet_state)])
    devices = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  device")]
    assert len(devices) == 5
    assert all(": connection not known, " in line for line in devices)


def test_a_reason_that_is_a_sentence_gets_no_second_full_stop(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alert = Alert("device-excluded", "warning", 1.0, "a can't take part: its data is gone.", "why", "do")
    (fleet_state / "alerts.json").write_text(json.dumps({"turned_at": time.time(), "alerts": [asdict(alert)]}))
    main(["status", "--state", str(fleet_state)])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if alert.what in line]
    assert ".." not in line
    assert line.endswith(alert.text)


def test_while_a_server_starts_nothing_is_said_that_only_its_last_run_knew(
    stopped_state: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    view = Fleet(tmp_path_factory.mktemp("fleet"), toy.JOB).daemon().first.view
    ended_at = time.time() - 1000.0

    def monitor(*alerts: Alert) -> Monitor:
        return Monitor(
            stopped_state, {}, [(view, stopped_state)], here=lambda: 3, book=AlertBook(alerts), clock=lambda: ended_at
        )

    def kinds() -> list[str]:
        return [alert["kind"] for alert in status_of_all(stopped_state)["alerts"]]

    with folder_lock(stopped_state):
        first = monitor(Alert("broker", "critical", ended_at, "there is no connection to the broker", "why", "do"))
        first.start()
        first.close()
        assert kinds() == ["server-hangs", "broker"]
    with folder_lock(stopped_state):
        assert kinds() == []
        assert all(device["online"] is not None for device in status_of_all(stopped_state)["devices"])
        assert "server-hangs" not in {finding.kind for finding in diagnose(stopped_state)}
        second = monitor()
        second.start()
        second.close()
        assert kinds() == ["server-hangs"]


def test_an_alert_whose_cause_has_gone_is_not_shown_while_it_stays_open(
    stopped_state: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    view = Fleet(tmp_path_factory.mktemp("fleet"), toy.JOB).daemon().first.view
    full = Alert("quarantine", "warning", 1.0, "no place is left", "why", "do", job=toy.JOB.name, delay_s=60.0)
    with folder_lock(stopped_state):
        monitor = Monitor(stopped_state, {}, [(view, stopped_state)], here=lambda: 3, book=AlertBook([full]))
        monitor.start()
        monitor.close()
        assert [alert["kind"] for alert in status_of_all(stopped_state)["alerts"]] == [full.kind]
        assert full.kind in {finding.kind for finding in diagnose(stopped_state)}
        monitor.look()
        monitor.start()
        monitor.close()
        assert status_of_all(stopped_state)["alerts"] == []
        assert full.kind not in {finding.kind for finding in diagnose(stopped_state)}
    assert monitor.book.open == [full]


def test_notes_come_after_all_else(fleet_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note, trouble = (Alert("rollout", severity, 1.0, f"a {severity}", "why", "do") for severity in ("info", "warning"))
    body = {"turned_at": time.time(), "alerts": [asdict(note), asdict(trouble)]}
    (fleet_state / "alerts.json").write_text(json.dumps(body))
    main(["status", "--state", str(fleet_state)])
    text = capsys.readouterr().out
    assert text.index("a warning") < text.index("  device") < text.index("a info")


def test_status_of_a_finished_job_asks_for_nothing(stopped_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Storage.at(stopped_state) as storage:
        state = storage.load()
        assert state is not None
        state.phase, state.round = Phase.FINISHED, 20
        storage.save(state, (), 1.0)
    main(["status", "--state", str(stopped_state)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["job leaves: round 20 of 20, finished", "  no server is running"]


def test_a_paused_job_is_said_to_be_paused(stopped_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Storage.at(stopped_state) as storage:
        state = storage.load()
        assert state is not None
        state.paused = True
        storage.save(state, (), 1.0)
    main(["status", "--state", str(stopped_state)])
    assert capsys.readouterr().out.startswith("job leaves: round 13 of 20, stopped while training, paused\n")


@pytest.mark.parametrize("running", [True, False])
def test_status_as_json_says_whether_a_server_runs(
    request: pytest.FixtureRequest, running: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    state = request.getfixturevalue("fleet_state" if running else "stopped_state")
    main(["status", "--json", "--state", str(state)])
    body = json.loads(capsys.readouterr().out)
    assert body["running"] is running
    assert any(row["online"] for row in body["devices"]) is running
    assert not any(p.name == "lock" for p in state.iterdir()) or running


def test_a_device_that_was_shut_out_is_revoked_and_not_online(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with IdentityFolder.make(fleet_state, "lab") as identity:
        board = DeviceIdentity(fleet_state / "board", "lab", "good")
        EnrollmentService(identity).answer(board.request(identity.claim("good", 3600)))
        assert status(fleet_state)["devices"][1]["online"]
        identity.revoke("good")
    body = {d["name"]: d for d in status(fleet_state)["devices"]}
    assert (body["good"]["revoked"], body["good"]["online"], body["full"]["revoked"]) == (True, False, False)
    assert main(["status", "--state", str(fleet_state)]) == ExitCode.OK
    assert "device good (pi): revoked" in capsys.readouterr().out


def test_a_job_that_a_total_ended_says_so(stopped_state: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(stopped_state)["ended_early"] is None
    with Storage.at(stopped_state) as storage:
        state = storage.load()
        assert state is not None
        state.round, state.phase, state.spent_bytes = 12, Phase.FINISHED, 3_000_000
        storage.put_settings({"job": Job(name="leaves", rounds=20, total_bytes=2_000_000).to_dict(), "name": "n"})
        storage.save(state, (), 1.0)
    said = status(stopped_state)["ended_early"]
    assert said.startswith("ended after round 12 of 20: ")
    assert "total_bytes" in said
    assert main(["status", "--state", str(stopped_state)]) == ExitCode.OK
    assert f"  {said}\n" in capsys.readouterr().out


def test_a_private_job_says_what_it_has_cost_whom(
    stopped_state: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(name="leaves", rounds=20, privacy=Privacy(clip=0.5, noise_multiplier=2.0, epsilon_budget=9.0))
    with Storage.at(stopped_state) as storage:
        state = storage.load()
        assert state is not None
        state.private = True
        state.devices["good"].releases = {"2.0": 4}
        storage.put_settings({"job": job.to_dict(), "name": "n"})
        storage.save(state, (), 1.0)
    found = status(stopped_state)["privacy"]["epsilon"]
    assert found["full"] == found["off"] == 0.0
    assert found["good"] == pytest.approx(4.3772, rel=1e-4)  # one release at multiplier 1
    assert main(["status", "--state", str(stopped_state)]) == ExitCode.OK
    text = capsys.readouterr().out
    assert "  private: ε at most 4.38 (good) at δ 1e-05, budget 9; local noise of 2 times the clip 0.5\n" in text
    assert ", 0 bytes up, ε 4.38\n" in text
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    main(["status", "--state", str(stopped_state)])
    assert "private: ε unknown without the extra privacy at δ" in capsys.readouterr().out


def test_a_device_in_quarantine_is_shown_with_what_it_sent(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quarantine = Quarantine(path=fleet_state / FILE)
    quarantine.know(["good", "full"])
    quarantine.save()
    while quarantine.hears("good", 100_000):
        pass
    quarantine._save_at = 0.0
    quarantine.save()

    assert main(["status", "--state", str(fleet_state)]) == ExitCode.OK
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("  device good"))
    assert "in quarantine until" in lines[at + 1]
    assert "(no. 1): too many messages; 1 messages dropped unread" in lines[at + 1]
    rows = {d["name"]: d["quarantine"] for d in status(fleet_state)["devices"]}
    assert rows["full"] is None
    assert rows["good"]["times"] == 1


def test_status_names_the_best_round_beside_the_latest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    part = {"progress": "folded", "reason": "", "metrics": {"accuracy_before": 0.25, "accuracy_after": 0.5}}
    scores = [{"accuracy": 0.5}, {"accuracy": 0.75}, {"accuracy": 0.75}, {"accuracy": 0.625}, {}]
    rows = [
        {"round": n, "at": float(n), "model": f"{n:064}", "metrics": metrics, "devices": {"a": part}}
        for n, metrics in enumerate(scores, 1)
    ]
    with Storage.at(tmp_path) as storage:
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


def test_status_names_no_best_round_where_nothing_was_evaluated(
    fleet_state: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = status(fleet_state)
    assert body["best"] is body["latest"] is None
    main(["status", "--state", str(fleet_state)])
    assert "best model" not in capsys.readouterr().out
