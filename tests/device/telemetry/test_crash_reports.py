"""What a board tells its server of its crashes: little, private, once, and still there after a crash."""

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import BrokerError, ConfigError, FedpruneError, IdentityError, JoinError
from fedprune.wire.fleet_messages import MAX_CRASH_TEXT, CrashReport, CrashStored
from fedprune.wire.messages import MAX_WARNING_TEXT, MAX_WARNINGS, Birth, parse_message
from fedprune_device.hardware.thermal_guard import ThermalGuard
from fedprune_device.network.connection import BoardConnection, MessageChannel
from fedprune_device.privacy.redaction import OTHER_MODULE, module_of, module_of_file, redact
from fedprune_device.telemetry.crash_reporter import CrashReporter
from fedprune_device.telemetry.crash_reports import CrashReports, WarningLog

pytestmark = pytest.mark.board


class Time:
    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


class Wire:
    """A connection whose other end is the test."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    def publish(self, topic: str, payload: bytes, qos: int = 1) -> bool:
        self.messages.append(parse_message(payload))
        return True


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("can't read /home/anna/clinic/patients.npz", "anna"),
        ("no broker at mqtts://anna:hunter2@broker.example:8883", "hunter2"),
        ("the claim FP1-ABCDEFGH-IJKLMNOP-QRSTUVWX is used", "ABCDEFGH"),
        ("sample [0.125, 0.25, 0.375, 0.5] is odd", "0.375"),
        (r"can't read C:\Users\anna\x.csv", "anna"),
    ],
)
def test_what_is_the_owners_alone_does_not_leave_the_board(text: str, secret: str) -> None:
    line = redact(text, 500)
    assert secret not in line
    assert line.split()[0] == text.split()[0]


@given(st.text(), st.integers(10, 200))
@settings(max_examples=100, deadline=None)
def test_a_private_text_is_one_short_printable_line(text: str, limit: int) -> None:
    line = redact(text, limit)
    assert len(line) <= limit
    assert line.isprintable()
    CrashReport("pi", 1, 1, "error", line, (), "fedprune", "")


def test_the_last_warnings_are_few_short_lines_without_what_is_private() -> None:
    private, log = [False], logging.getLogger("fedprune.device")
    warnings = WarningLog(lambda: private[0])
    with warnings.watch_log():
        for number in range(2 * MAX_WARNINGS):
            log.warning("row %d of /home/anna/clinic.csv\x1b[2J%s", number, "!" * MAX_WARNING_TEXT)
        log.info("all is well")
        for _ in range(2):
            log.error("unexpected", exc_info=ValueError("/home/anna"))
    log.warning("after the end")
    report = warnings.report()
    assert Birth("pi", 1, "", 1, "", warnings=report).warnings == report
    assert [w["text"].split()[1] for w in report[:-1]] == [str(n) for n in range(MAX_WARNINGS + 1, 2 * MAX_WARNINGS)]
    assert report[-1]["text"].startswith("unexpected: ValueError")
    assert not [w for w in report if "anna" in w["text"] or not w["text"].isprintable()]
    private[0] = True
    assert not [w for w in warnings.report() if "row" in w["text"] or "unexpected" in w["text"]]
    assert OTHER_MODULE in warnings.report()[-1]["text"]  # where it is in the program may be said


def test_modules_of_others_are_not_named() -> None:
    assert module_of("fedprune_device.agent.agent") == "fedprune_device.agent.agent"
    assert module_of("numpy.linalg.linalg") == "numpy"
    assert module_of("annas_clinic.load") == module_of("__main__") == OTHER_MODULE
    assert module_of_file("/opt/slots/a/fedprune_device/api/http_server.py") == "fedprune_device.api.http_server"
    assert module_of_file("/usr/lib/python3/dist-packages/numpy/core.py") == "numpy"
    assert module_of_file("/home/anna/clinic/load.py") == OTHER_MODULE


def crash(folder: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), CrashReports(folder).watch_run():
        raise error


def test_an_exception_that_ends_the_run_is_reported_by_module_and_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError), CrashReports(tmp_path).watch_run():
        ThermalGuard(10, 20)
    body = CrashReports(tmp_path).report
    assert body is not None
    report = CrashReport("pi", **body)
    assert report.cause == "error"
    assert "ConfigError" in report.text
    assert report.frames[0]["module"] == "fedprune_device.hardware.thermal_guard"
    assert report.frames[0]["line"] > 0
    assert {"module": OTHER_MODULE, "line": 0, "function": ""} in report.frames  # the test, which is nobody's module
    assert report.memory_total
    assert str(tmp_path) not in json.dumps(body)


@pytest.mark.parametrize(
    "error", [IdentityError("pi isn't a member of site default yet"), JoinError("refused"), BrokerError("refused")]
)
def test_a_board_that_is_not_let_in_has_not_crashed(tmp_path: Path, error: FedpruneError) -> None:
    crash(tmp_path, error)
    assert CrashReports(tmp_path).report is None
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_ends_well_leaves_nothing(tmp_path: Path) -> None:
    with CrashReports(tmp_path).watch_run():
        assert (tmp_path / "running.json").exists()
    with pytest.raises(KeyboardInterrupt), CrashReports(tmp_path).watch_run():
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_reported(tmp_path: Path) -> None:
    def work() -> None:
        raise ValueError("in a thread")

    with CrashReports(tmp_path).watch_run():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    body = CrashReports(tmp_path).report
    assert (body["cause"], body["text"]) == ("thread", "ValueError: in a thread")


def report_after(folder: Path, how: str, boot: str = "b") -> dict[str, Any] | None:
    """What the next run, of the boot `b`, knows of one that ended so."""
    script = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from fedprune_device.telemetry.crash_reports import CrashReports\n"
        f"with CrashReports(Path(sys.argv[1]), boot=lambda: {boot!r}).watch_run():\n    {how}\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=False, capture_output=True, timeout=60)
    with CrashReports(folder, boot=lambda: "b").watch_run():
        pass
    return CrashReports(folder).report


def test_a_fault_in_native_code_is_reported_at_the_next_start(tmp_path: Path) -> None:
    body = report_after(tmp_path, "os.kill(os.getpid(), signal.SIGSEGV)")
    assert (body["cause"], body["text"]) == ("signal", "Segmentation fault")
    CrashReport("pi", **body)


def test_a_run_that_was_killed_is_reported_but_no_power_cut(tmp_path: Path) -> None:
    killed = "os.kill(os.getpid(), signal.SIGKILL)"
    assert report_after(tmp_path, killed)["cause"] == "killed"
    CrashReports(tmp_path).delete_report()
    assert report_after(tmp_path, killed, boot="before the power came back") is None


def test_a_crash_is_told_after_a_birth_and_until_the_server_has_it(tmp_path: Path) -> None:
    wire, time = Wire(), Time()
    crash(tmp_path, ValueError("no" * MAX_CRASH_TEXT))
    reporter = CrashReporter(BoardConnection(wire, MessageChannel("pi", "lab")), CrashReports(tmp_path, time), time)
    reporter.turn()
    assert wire.messages == []
    reporter.on_birth()
    reporter.turn()
    reporter.turn()
    time.now += 61
    reporter.turn()
    first, second = wire.messages
    assert first == second
    reporter.on_disconnect()
    time.now += 61
    reporter.turn()
    assert len(wire.messages) == 2
    reporter.on_birth()
    reporter.on_stored(CrashStored(first.number))
    for _ in range(5):
        reporter.turn()
        time.now += 61
    assert len(wire.messages) == 2
