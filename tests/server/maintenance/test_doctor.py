"""Each thing that can be wrong with a fleet is found where it is, and nowhere else."""

import json
import math
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fedprune.coordination import Phase, State
from fedprune.core.disk import file_lock
from fedprune.core.errors import ExitCode
from fedprune.core.lock_holders import LOCK_LIST
from fedprune.jobs.job import Job
from fedprune.jobs.state import JobDevice
from fedprune.model.recipe import Recipe
from fedprune.security.keys import SigningKey
from fedprune.wire.fleet_messages import CrashReport, ServerPresence
from fedprune_server.cli.main import main
from fedprune_server.devices.crash_store import CrashStore
from fedprune_server.enrollment.pki import IdentityFolder
from fedprune_server.maintenance import connection_checks, doctor
from fedprune_server.maintenance.backup_manifest import last_backup, record_backup
from fedprune_server.maintenance.connection_checks import CheckedSite
from fedprune_server.maintenance.finding import Finding, Severity, alert_finding
from fedprune_server.maintenance.job_checks import job_findings
from fedprune_server.maintenance.stored_job import StoredJob
from fedprune_server.monitoring import alerts
from fedprune_server.monitoring import site_facts as site_facts_module
from fedprune_server.monitoring.alert_rules import evaluate_alerts
from fedprune_server.monitoring.alerts import Alert
from fedprune_server.monitoring.monitor_record import ALERTS_FILE
from fedprune_server.monitoring.site_facts import site_facts
from fedprune_server.monitoring.situation import Situation
from fedprune_server.storage.storage import Storage
from support.paths import ROOT
from support.processes.machine import find_mosquitto, free_port, listens
from support.waiting import until

NOW = 1_800_000_000.0


def board(**values: Any) -> JobDevice:
    usual = {"session": 1, "online": True, "profile": {"name": "pi"}, "probe": None, "samples": 10, "widths": (8,)}
    return JobDevice(**{**usual, **values})


def row(number: int, parts_by_device: dict[str, tuple[str, str, str]], **metrics: float) -> dict[str, Any]:
    devices = {n: {"progress": p, "reason": r, "kind": k, "metrics": {}} for n, (p, r, k) in parts_by_device.items()}
    return {"round": number, "at": NOW, "model": "0" * 64, "metrics": metrics, "devices": devices}


HEALTHY = StoredJob(
    Path("state"),
    {"job": Job(name="leaves", rounds=20, devices=2).to_dict()},
    State(
        model="0" * 64,
        round=3,
        phase=Phase.TRAINING,
        devices={"a": board(), "b": board()},
        history=[row(n, {"a": ("folded", "", ""), "b": ("folded", "", "")}, loss=1.0 / n, samples=9) for n in (1, 2)],
    ),
    {},
    is_running=True,
    group_sizes=(8,),
    group_names=("conv1",),
)


def with_state(**values: Any) -> StoredJob:
    return replace(HEALTHY, state=replace(HEALTHY.state, **values))


SICK: dict[str, StoredJob] = {
    "server-not-running": replace(HEALTHY, is_running=False),
    "paused": with_state(paused=True),
    "no-devices": with_state(devices={}, history=[]),
    "too-few-devices": with_state(phase=Phase.WAITING, devices={"a": board(), "b": board(online=False)}),
    "excluded-devices": replace(HEALTHY, unplanned_devices={"odd": {"excluded": "no profile"}}),
    "deadline-too-short": with_state(history=[row(1, {"a": ("folded", "", ""), "b": ("refused", "x", "late")})]),
    "doubtful-claim": with_state(devices={"a": board(correction={"step": 0.01}), "b": board()}),
    "all-updates-refused": with_state(history=[row(1, {"a": ("refused", "tensor w has a wrong shape", "malformed")})]),
    "outlying-device": with_state(history=[row(1, {"a": ("folded", "x", ""), "b": ("folded", "", "")})]),
    "uncovered-channels": with_state(devices={"a": board(widths=(5,)), "b": board(widths=(6,))}),
    "training-diverges": with_state(
        history=[row(n, {"a": ("folded", "", "")}, loss=float(n), samples=9) for n in (1, 2, 3)]
    ),
}


def found_in(case: StoredJob) -> list[Finding]:
    """The doctor's findings on a job, by its own checks and by the alert rules."""
    situation = Situation(case.folder, [case.watched_job], case.watched_job.snapshot.able_devices, case.is_running)
    return [*job_findings(case), *map(alert_finding, evaluate_alerts(situation, NOW))]


def kinds(findings: Iterable[Finding]) -> set[str]:
    return {a.kind for a in findings}


def test_a_healthy_job_has_nothing() -> None:
    assert kinds(found_in(HEALTHY)) == set()


@pytest.mark.parametrize("kind", SICK)
def test_a_job_has_what_is_wrong_with_it_and_nothing_else(kind: str) -> None:
    findings = found_in(SICK[kind])
    assert [a.kind for a in findings] == [kind]
    assert all(findings[0].to_dict().values())


@pytest.mark.parametrize("kind", ["server-not-running", "deadline-too-short"])
def test_what_a_unit_runs_is_started_again_by_its_unit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    service = (ROOT / "deploy" / "systemd" / "fedprune-server.service").read_text()
    state = tmp_path / "a state"
    (tmp_path / "leaves.service").write_text(service.replace("--state /var/lib/fedprune", f"--state '{state}'"))
    monkeypatch.setattr(alerts, "UNIT_FOLDERS", (tmp_path,))
    (tmp_path / "systemctl").write_text(f'#!/bin/sh -e\nfor unit; do :; done\ncd {tmp_path}; ls "$unit"; echo "$1"\n')
    (tmp_path / "systemctl").chmod(0o755)
    (finding,) = found_in(replace(SICK[kind], folder=state))
    *changes, start = finding.advice.split(", then ")
    commands = [text.split("`")[1] for text in changes] + [start]
    shell = ["sh", "-c", f"PATH={tmp_path}:$PATH; eval $0"]
    answers = [subprocess.run([*shell, c], capture_output=True, check=True) for c in commands]
    assert [a.stdout.split()[-1] for a in answers] == [b"edit", b"restart"][-len(commands) :]
    assert "fedprune-server run" not in finding.advice
    (finding,) = found_in(replace(SICK[kind], folder=tmp_path / "another"))
    assert "fedprune-server run" in finding.advice


def job_of_scores(
    rounds: Iterable[tuple[float, float, float]], metric: str = "accuracy", *, risen: bool = False, **settings: Any
) -> StoredJob:
    """A job by the scores of its rounds: the global model's, then means of boards before and after training."""
    history = []
    for number, (global_score, before, after) in enumerate(rounds, 1):
        scores = {"loss": float(number) if risen else 1.0, metric: global_score}
        entry = row(number, {"a": ("folded", "", ""), "b": ("folded", "", "")}, samples=9, **scores)
        for name, shift in (("a", 0.01), ("b", -0.01)) if not math.isnan(before) else ():
            entry["devices"][name]["metrics"] = {f"{metric}_before": before + shift, f"{metric}_after": after + shift}
        history.append(entry)
    return replace(with_state(history=history), settings={"job": {**HEALTHY.settings["job"], **settings}})


REGRESSION = {"recipe": Recipe(loss="mse").to_dict()}


@pytest.mark.parametrize(
    ("case", "cause"),
    [
        (job_of_scores([(0.1, 0.1, 0.11)] * 6), "learn nothing"),
        (job_of_scores([(0.11, 0.1, 0.8)] * 6), "aggregation"),
        (job_of_scores([(4.0, 4.0, 0.5)] * 6, "loss", **REGRESSION), "aggregation"),
        (job_of_scores([(0.1, r / 10, r / 9) for r in range(1, 9)]), "evaluation"),
        (job_of_scores([(0.1, 0.97, 0.98)] * 6), "evaluation"),  # a model that was good when the job began
        # Samples on another scale: a lucky round, and a loss that rises because a good model is surely wrong there.
        (job_of_scores([(0.5 if r == 3 else 0.1, r / 10, r / 9) for r in range(1, 10)], risen=True), "evaluation"),
    ],
)
def test_a_global_model_that_does_not_move_has_one_of_three_causes(case: StoredJob, cause: str) -> None:
    (finding,) = found_in(case)
    assert (finding.kind, finding.is_wrong) == ("model-stalls", False)
    assert cause in finding.message.rpartition(":")[2]
    assert kinds(job_findings(replace(case, state=replace(case.state, phase=Phase.FINISHED)))) == {"model-stalls"}


HEALTHY_SCORES = {
    "too few rounds": job_of_scores([(0.1, 0.1, 0.1)] * 5),
    "converged far below what is good": job_of_scores([(0.3, 0.1, 0.3), *[(0.62, 0.6, 0.7), (0.6, 0.6, 0.7)] * 4]),
    "converged, by its loss": job_of_scores(
        [(max(0.5, 4 / r), 4 / r, 3 / r) for r in range(1, 15)], "loss", **REGRESSION
    ),
    "boards with few classes score higher": job_of_scores(
        [(min(0.6, 0.2 + r / 10), min(0.85, 0.5 + r / 10), 0.95) for r in range(14)]
    ),
    "parts stay on the boards": job_of_scores([(0.1, 0.9, 0.95)] * 8, strategy="fedper"),
    "private": job_of_scores([(0.1, math.nan, math.nan)] * 8),
}


def test_a_job_that_learns_or_has_learnt_does_not_stall() -> None:
    assert {name for name, case in HEALTHY_SCORES.items() if found_in(case)} == set()


def test_the_clock(tmp_path: Path) -> None:
    assert kinds(doctor.check_clock(CheckedSite(folder=tmp_path, last_event_at=NOW - 5, now=NOW))) == set()
    assert kinds(doctor.check_clock(CheckedSite(folder=tmp_path, last_event_at=NOW + 3600, now=NOW))) == {"clock"}
    assert kinds(doctor.check_clock(CheckedSite(folder=tmp_path, now=1000.0))) == {"clock"}


def test_backups_are_remembered(tmp_path: Path) -> None:
    assert kinds(doctor.check_backups(CheckedSite(folder=tmp_path, now=NOW))) == {"backup"}
    record_backup(tmp_path, NOW)
    assert last_backup(tmp_path) == NOW
    assert kinds(doctor.check_backups(CheckedSite(folder=tmp_path, now=NOW + 3600))) == set()
    assert kinds(doctor.check_backups(CheckedSite(folder=tmp_path, now=NOW + 30 * 86_400))) == {"backup"}


def test_who_waits_and_which_certificates_end(tmp_path: Path) -> None:
    def look(now: float) -> list[Alert]:
        return evaluate_alerts(Situation(tmp_path, site=replace(site_facts(tmp_path, {}), disk=None)), now)

    with IdentityFolder.make(tmp_path, "lab") as identity:
        assert look(time.time()) == []
        identity.store.request_approval("pi-1", SigningKey.make().verifying_key.hex, 5)
        [finding] = look(time.time())
        assert (finding.kind, finding.device) == ("devices-wait", "pi-1")
        advice = finding.todo[finding.todo.index("fedprune-server devices approve") :]
        assert main(shlex.split(advice)[1:]) == 0  # what it says can be done as it stands
        assert set(identity.store.members()) == {"pi-1"}
    assert {a.kind for a in look(time.time() + 300 * 365 * 86_400)} == {"certificate", "device-unheard"}
    (tmp_path / "identity" / "server.pem").write_text("no certificate")
    assert {(a.kind, a.severity) for a in look(time.time())} == {
        ("certificate", "critical"),
        ("device-unheard", "warning"),
    }
    (tmp_path / "identity" / "signing.key").unlink()
    assert "identity" in kinds(doctor.check_server_identity(tmp_path))


def test_crashes(tmp_path: Path) -> None:
    assert kinds(doctor.check_crashes(CheckedSite(folder=tmp_path, now=NOW))) == set()
    with CrashStore(tmp_path, clock=lambda: NOW) as crashes:
        crashes.add(CrashReport("a", 1, 1, "exception", "ValueError: no", (), "fedprune", ""))
        crashes.save()
    assert kinds(doctor.check_crashes(CheckedSite(folder=tmp_path, now=NOW + 60))) == {"crashes"}
    assert kinds(doctor.check_crashes(CheckedSite(folder=tmp_path, now=NOW + 3 * 86_400))) == set()


@pytest.mark.parametrize(
    ("running", "answers", "wrong_count"), [(True, 1, 0), (True, 2, 1), (False, 1, 1), (False, 0, 0)]
)
def test_a_server_on_a_copy_of_this_disk_is_another_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, running: bool, answers: int, wrong_count: int
) -> None:
    class Asking:
        def others(self) -> list[ServerPresence]:
            place = socket.gethostname(), str(tmp_path.resolve()), 1
            return [ServerPresence("ab" * 16, f"{n:032x}", *place, None) for n in range(answers)]

    IdentityFolder.make(tmp_path, "lab").close()
    monkeypatch.setattr(connection_checks, "second_server_guard", lambda *_, **__: nullcontext(Asking()))
    findings = list(
        connection_checks.check_other_servers(
            CheckedSite(folder=tmp_path, settings={"broker": "mqtts://broker.example"}, is_running=running)
        )
    )
    assert [(f.kind, "copy of this disk" in f.message) for f in findings] == [("second-server", True)] * wrong_count


_SERVER = """
import fcntl, sys
lock = open(sys.argv[1], "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not LOCK_LIST.exists(), reason="this kernel doesn't tell who holds a lock")
def test_a_server_that_was_suspended_is_named_with_what_continues_it(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / ALERTS_FILE).write_text(json.dumps({"turned_at": time.time(), "alerts": []}))
    command = [sys.executable, "-c", _SERVER, str(folder / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"
            assert "server-hangs" not in {f.kind for f in doctor.diagnose(folder)}
            server.send_signal(signal.SIGSTOP)
            os.waitpid(server.pid, os.WUNTRACED)
            (finding,) = [f for f in doctor.diagnose(folder) if f.kind == "server-hangs"]
            assert str(server.pid) in finding.message
            assert f"kill -CONT {server.pid}" in finding.advice
            assert main(["status", "--state", str(folder)]) == ExitCode.OK
            assert f"kill -CONT {server.pid}" in capsys.readouterr().out
        finally:
            server.kill()


def broker_findings(
    folder: Path, settings: dict[str, Any], *, is_running: bool = True, timeout_s: float = 1.0
) -> list[Finding]:
    site = CheckedSite(folder=folder, settings=settings, is_running=is_running, timeout_s=timeout_s)
    return list(connection_checks.check_broker(site))


def test_a_broker_that_is_not_there_and_one_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        server = {"broker": f"mqtt://anna:hunter2@127.0.0.1:{port}"}
        [finding] = broker_findings(tmp_path, server)
        assert finding.kind == "broker"
        assert "hunter2" not in str(finding)
        embedded = {"broker": "embedded", "port": port}
        assert kinds(broker_findings(tmp_path, embedded)) == {"broker"}
        assert kinds(broker_findings(tmp_path, embedded, is_running=False)) == set()
        beginning = StoredJob(tmp_path, {}, State(model=""), {}, is_running=True)  # it hasn't stored its settings yet
        site = CheckedSite(folder=tmp_path, jobs=[beginning], is_running=True, timeout_s=1.0)
        assert list(connection_checks.check_broker(site)) == []
        listening.listen()
        assert kinds(broker_findings(tmp_path, embedded)) == set()
        assert kinds(broker_findings(tmp_path, server, timeout_s=0.3)) == {"broker"}


@pytest.mark.mosquitto
@pytest.mark.system
def test_a_broker_that_takes_no_large_packets(tmp_path: Path) -> None:
    port, config = free_port(), tmp_path / "mosquitto.conf"
    config.write_text(f"listener {port} 127.0.0.1\nallow_anonymous true\nmax_packet_size 65536\n")
    with subprocess.Popen([find_mosquitto(), "-c", config], stderr=subprocess.DEVNULL) as broker:
        until(lambda: listens(port))
        server = {"broker": f"mqtt://127.0.0.1:{port}"}
        assert kinds(broker_findings(tmp_path, server)) == {"broker-packets"}
        assert kinds(broker_findings(tmp_path, server | {"max_packet": 50_000})) == set()
        broker.kill()


@contextmanager
def running(folder: Path) -> Iterator[None]:
    with file_lock(folder / "lock", "busy", "wait"):
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with Storage.open_in(tmp_path) as storage:
        storage.put_settings({**HEALTHY.settings, "name": "n", "server": {"broker": "embedded", "port": 0}})
        storage.save(HEALTHY.state, (), NOW)
    record_backup(tmp_path)
    return tmp_path


def reported_kinds(folder: Path, capsys: pytest.CaptureFixture[str], *codes: ExitCode) -> list[str]:
    capsys.readouterr()
    assert main(["doctor", "--state", str(folder), "--json"]) in (ExitCode.FINDINGS, *codes)
    return [f["kind"] for f in json.loads(capsys.readouterr().out)["findings"]]


@pytest.fixture
def roomy(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")(10**12, 0, 10**12 // 2)
    monkeypatch.setattr(site_facts_module.shutil, "disk_usage", lambda folder: usage)


@pytest.mark.usefixtures("roomy")
def test_the_command_says_what_why_and_what_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(folder):
        assert main(["doctor", "--state", str(folder)]) == ExitCode.OK
    assert "nothing is wrong" in capsys.readouterr().out
    assert main(["doctor", "--state", str(folder), "--json"]) == ExitCode.FINDINGS
    assert [f["kind"] for f in json.loads(capsys.readouterr().out)["findings"]] == ["server-not-running"]
    assert main(["doctor", "--state", str(folder)]) == ExitCode.FINDINGS
    assert capsys.readouterr().out.count("\n  do:  fedprune-server run --state") == 1


@pytest.mark.usefixtures("roomy")
def test_what_the_running_server_has_open_is_found_and_so_is_a_loop_that_hangs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def finding_kinds(turned_at: float) -> list[str]:
        alert = Alert("no-progress", "critical", turned_at, "nothing comes", "why", "todo", job="leaves")
        (folder / ALERTS_FILE).write_text(json.dumps({"turned_at": turned_at, "alerts": [asdict(alert)]}))
        return reported_kinds(folder, capsys)

    with running(folder):
        (folder / "quarantine.json").write_text(json.dumps({"a": {"until": time.time() + 50, "reason": "too many"}}))
        assert finding_kinds(time.time()) == ["quarantine", "no-progress"]
        (folder / "quarantine.json").unlink()
        assert finding_kinds(time.time() - 100) == ["server-hangs", "no-progress"]
        assert main(["status", "--state", str(folder)]) == ExitCode.OK
        output = capsys.readouterr().out
        assert "critical: nothing comes. To do: todo" in output
        assert "the server's loop has not turned for" in output
    assert finding_kinds(time.time() - 100) == ["server-not-running"], "what a dead server had open is past"
    assert main(["status", "--state", str(folder), "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out)["alerts"] == []


@pytest.mark.usefixtures("roomy")
def test_a_database_that_is_away_is_a_finding_of_a_fleet_with_members(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    IdentityFolder.make(folder, "default").close()
    before = reported_kinds(folder, capsys, ExitCode.OK)
    (folder / "database").write_text("postgresql+psycopg://fedprune@127.0.0.1:1/none\n")  # where nobody listens
    findings = reported_kinds(folder, capsys)
    assert findings.count("database") == 1
    assert {*findings} - {"database"} <= {*before}


def test_a_database_that_is_read_too_slowly_may_be_on_a_busy_machine(folder: Path) -> None:
    (finding,) = [f for f in doctor.diagnose(folder, timeout_s=0) if f.kind == "database"]
    assert finding.severity is Severity.UNKNOWN
    assert "--timeout" in finding.advice


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("locked", flush=True)
sys.stdin.read()
"""


@pytest.mark.usefixtures("roomy")
def test_who_keeps_the_databases_lock_is_named_where_no_server_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LOCK_TIMEOUT_S", 0.05)

    def findings_of_locks() -> list[str]:
        return [f.message for f in doctor.diagnose(folder) if f.kind == "database-locked"]

    assert findings_of_locks() == []
    command = [sys.executable, "-c", HOLDER, folder / "server.db"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        (what,) = findings_of_locks()
    assert f"process {holder.pid} " in what
    assert findings_of_locks() == []
