"""The demo as a user starts it: real processes that end well, end together, and stay lean."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedprune_server.simulation.fleet.demo_fleet import DEMO_BOARDS
from fedprune_server.simulation.results.record import Record
from fedprune_server.storage.storage import Storage
from support.waiting import until

pytestmark = pytest.mark.system

COMMAND = (sys.executable, "-m", "fedprune_server.cli.main", "demo")


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def descendants(pid: int) -> set[int]:
    """The processes that a process has started, and those that these have."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(path.parent.name)] = int(fields[1])
    family, last = set(), {pid}
    while last:
        last = {child for child, parent in parents.items() if parent in last}
        family |= last
    return family


def maps(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/maps").read_text()
    except OSError:
        return ""


@pytest.fixture
def demo(tmp_path, request):
    """A running demo; a quick one, unless the test names other options."""
    options = getattr(request, "param", ["--quick"])
    with (tmp_path / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*COMMAND, *options, "--out", tmp_path / "run"],
            stdout=output,
            stderr=subprocess.STDOUT,
            # A shell's background jobs ignore SIGINT, and so would the demo if the tests run in one.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def devices(demo: subprocess.Popen) -> dict[int, str]:
    lines = {pid: command_line(pid) for pid in descendants(demo.pid)}
    return {pid: line for pid, line in lines.items() if "fedprune_device.cli.main" in line}


def test_quick_demo_ends_well_and_its_devices_load_neither_torch_nor_onnx(demo, tmp_path):
    seen = {}
    while demo.poll() is None:
        for pid in devices(demo):
            text = maps(pid)
            if "onnxruntime" in text:
                seen[pid] = text
        time.sleep(0.1)
    assert demo.returncode == 0, (tmp_path / "output.txt").read_text()
    assert len(seen) >= 2 * len(DEMO_BOARDS)
    for text in seen.values():
        names = {part for line in text.splitlines() for part in line.split("/")[1:]}
        assert names.isdisjoint({"torch", "onnx", "scipy", "matplotlib", "sqlalchemy"})
    run = tmp_path / "run"
    said = (tmp_path / "output.txt").read_text()
    assert "Too few rounds to judge accuracies and bytes by: 2;" in said
    assert "FAIL" not in said + (run / "report.html").read_text()
    fleet, reference = (Record.load(run / name) for name in ("metrics.json", "reference/metrics.json"))
    assert len(fleet.rounds) == len(reference.rounds) == 2
    assert len({d.widths for d in fleet.devices}) > 1
    assert all(d.density == 1 for d in reference.devices)
    assert 0 < fleet.last.up < reference.last.up
    assert 0 < fleet.last.down < reference.last.down
    with Storage.open_existing(run / "fleet" / "server") as storage:
        down, up = (sum(of_all) for of_all in zip(*storage.traffic().values(), strict=True))
    assert 0.95 * down < fleet.last.down <= down
    assert 0.95 * up < fleet.last.up <= up
    assert set(fleet.last.local) == {b.name for b in DEMO_BOARDS}


# What a server does at SIGTERM is in `test_crashes.py` at every push.
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.soak), signal.SIGKILL]
)
@pytest.mark.at_push(1)
# So many rounds that all boards of both jobs are there at once.
@pytest.mark.parametrize("demo", [["--rounds", "1000"]], indirect=True)
def test_nothing_is_left_when_the_demo_is_ended(demo, number):
    until(lambda: len(devices(demo)) == 2 * len(DEMO_BOARDS))
    family = descendants(demo.pid)
    assert len(family) > 2 * len(DEMO_BOARDS) + 2  # two brokers, and the server of FedAvg's job
    demo.send_signal(number)
    demo.wait(30)
    assert demo.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 4)
    until(lambda: not any(Path(f"/proc/{pid}").exists() and maps(pid) for pid in family))
