"""The demo's two jobs, and how it ends."""

import subprocess
import sys

import pytest

from fedprune.core.disk import file_lock
from fedprune.core.errors import ConfigError, ExitCode, StorageError
from fedprune_server.cli.demo import DemoFolder, run_demo, verdict
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.fleet.demo_fleet import DEMO_ROUNDS, too_few_rounds
from fedprune_server.simulation.results.record import DeviceRow, Record


def run(accuracy=0.9, sent=100, rounds=DEMO_ROUNDS):
    rows = [
        RoundRow(r, 1.0, "a" * 64, {"accuracy": accuracy, "loss": 0.5}, {"zero": 0.9}, 1, sent, sent)
        for r in range(1, rounds + 1)
    ]
    return Record("run", {}, (), (DeviceRow("zero", "", 1, (1,), 1.0, "", 1),), tuple(rows))


@pytest.mark.parametrize(
    ("accuracy", "sent", "rounds", "code"),
    [
        (0.9, 14, DEMO_ROUNDS, ExitCode.OK),
        (0.8, 14, DEMO_ROUNDS, ExitCode.CLAIM),
        (0.9, 16, DEMO_ROUNDS + 1, ExitCode.CLAIM),
        (0.8, 16, DEMO_ROUNDS - 1, ExitCode.OK),
    ],
)
def test_a_claim_that_fails_is_the_exit_code_if_there_are_rounds_enough(accuracy, sent, rounds, code):
    assert verdict(run(accuracy, sent, rounds), run(rounds=rounds)) is code
    assert bool(too_few_rounds(rounds)) is (rounds < DEMO_ROUNDS)


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"seed": -1}])
def test_a_wrong_number_costs_no_earlier_demo(tmp_path, wrong):
    DemoFolder.prepare(tmp_path / "demo", 0)
    (tmp_path / "demo" / "report.html").write_text("kept")
    with pytest.raises(ConfigError):
        run_demo(tmp_path / "demo", **wrong)
    assert (tmp_path / "demo" / "report.html").read_text() == "kept"


def test_a_second_demo_in_a_folder_leaves_the_first_one_alone(tmp_path):
    out = tmp_path / "demo-run"
    out.mkdir()
    (out / "demo.json").write_text("{}")
    with file_lock(tmp_path / ".demo-run.lock", "busy", "wait"), pytest.raises(StorageError, match="another demo runs"):
        run_demo(out)
    assert (out / "demo.json").exists()


def test_the_demo_imports_none_of_what_its_extras_leave_out():
    """`make demo` installs `server` and `board` alone; what else there is takes longer to fetch than all of these."""
    code = "import sys, fedprune_server.cli.demo; print(*{'ot', 'pyarrow', 'scipy', 'torch'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
