"""`fedprune-simulate`: from a configuration to a report, and what it says to a wrong one."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.output.extras import install_command
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.digits import deal, digits_model, write_hand
from fedprune_server.simulation.fleet import simulated_fleet
from fedprune_server.simulation.fleet.device_runner import DeviceRunner
from fedprune_server.simulation.fleet.simulated_fleet import demo_plan, read_plan
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.tables import TAIL
from support.fakes.opened_job import read_config
from support.paths import ROOT

DOCS = ROOT / "docs" / "simulate.md"
NAMES = ("barn", "dock")
CONFIG = """
[job]
name = "yard"
rounds = 2
density = 0.25
seed = 5
recipe = { max_steps = 2, logit_adjustment = true }

[model]
path = "model.onnx"

[evaluation]
data = "server.npz"

[[devices]]
name = "barn"
profile = "raspberry-pi-zero-2w"
data = "barn.npz"

[[devices]]
name = "dock"
profile = "jetson-orin-nano"
data = "dock.npz"
"""


@pytest.fixture
def config(tmp_path):
    """Writes a configuration beside model and data, and gives its path."""
    data = deal(NAMES, seed=5)
    (tmp_path / "model.onnx").write_bytes(digits_model())
    np.savez(tmp_path / "server.npz", x=data.x, y=data.y)
    for name in NAMES:
        write_hand(tmp_path / f"{name}.npz", data.devices[name])

    def write(text=CONFIG):
        (tmp_path / "fleet.toml").write_text(text)
        return str(tmp_path / "fleet.toml")

    return write


def test_a_configuration_becomes_a_report(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", config(), "--out", str(out)]) == ExitCode.OK
    record = Record.load(out / "metrics.json")
    assert [d.name for d in record.devices] == list(NAMES)
    assert len(record.rounds) == 2
    assert record.last.accuracy is not None
    assert f"{record.final(TAIL)[1]:.1%}" in capsys.readouterr().out
    assert (out / "report.html").is_file()
    assert (out / "metrics.json").stat().st_size > 1000


def test_reference_is_fedavg_at_full_width(config, tmp_path):
    out = tmp_path / "out"
    assert main(["--config", config(), "--out", str(out), "--reference", "--rounds", "1"]) == ExitCode.OK
    reference = Record.load(out / "reference" / "metrics.json")
    assert {d.density for d in reference.devices} == {1.0}
    assert reference.job["recipe"]["logit_adjustment"] is False
    assert reference.last.up > 4 * Record.load(out / "metrics.json").last.up


def test_the_strategy_is_said_on_the_command_line(config, tmp_path, capsys):
    out, arguments = tmp_path / "out", ["--config", config(), "--rounds", "1"]
    assert main([*arguments, "--out", str(out), "--strategy", "fedavg"]) == ExitCode.OK
    record = Record.load(out / "metrics.json")
    assert record.job["strategy"] == "fedavg"
    assert main([*arguments, "--out", str(tmp_path / "no"), "--strategy", "fedavgg"]) == ExitCode.CONFIG
    assert "fedavgg" in capsys.readouterr().err
    assert demo_plan(strategy="heterofl").job.strategy == demo_plan(strategy="heterofl").title == "heterofl"
    assert demo_plan(strategy="heterofl").reference_experiment().job == demo_plan().reference_experiment().job


def test_a_second_call_does_not_train_again(config, tmp_path, monkeypatch, capsys):
    arguments = ["--config", config(), "--out", str(tmp_path / "out")]
    assert main(arguments) == ExitCode.OK
    first = Record.load(tmp_path / "out" / "metrics.json")
    again = "fedprune_server.simulation.fleet.device_runner.DeviceRunner.carry_out"
    monkeypatch.setattr(again, lambda *_: pytest.fail("trained again"))
    capsys.readouterr()
    assert main(arguments) == ExitCode.OK
    assert capsys.readouterr().err == "yard: all 2 rounds were done before; nothing is trained again\n"
    assert Record.load(tmp_path / "out" / "metrics.json") == first


def test_results_are_json_on_request(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", config(), "--out", str(out), "--reference", "--json"]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    run, reference = (Record.load(out / name) for name in ("metrics.json", "reference/metrics.json"))
    assert found["report"] == str(out / "report.html")
    assert found["claims"] == []
    assert (found["run"]["run"], found["run"]["rounds"], found["run"]["model"]) == ("yard", 2, run.last.model)
    assert found["run"]["bytes_up"] == run.last.up < found["reference"]["bytes_up"] == reference.last.up
    assert found["run"]["global_accuracy"] == pytest.approx(sum(r.accuracy for r in run.rounds) / 2)

    reference = str(out / "reference")
    compared = ["compare", str(out), reference, "--out", str(tmp_path / "both"), "--target", "0", "--target", "1.5"]
    assert main([*compared, "--json", "--csv", str(tmp_path / "both.csv")]) == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    first = run.rounds[0]
    assert found["report"] == str(tmp_path / "both" / "comparison.html")
    assert [row["rounds"] for row in found["runs"]] == [2, 2]
    assert {row["cost"] for row in found["equal_cost"]} == {"rounds", "training_macs", "bytes", "seconds"}
    reached, never = found["runs"][0]["targets"]
    assert (reached["round"], reached["seconds"], reached["bytes"]) == (1, first.at, first.down + first.up)
    assert (never["target"], never["round"]) == (1.5, None)
    with (tmp_path / "both.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["round"]) for row in rows[:2]] == [("yard", "5", "1"), ("yard", "5", "2")]
    assert [float(row["accuracy"]) for row in rows[:2]] == [r.accuracy for r in run.rounds]
    assert len(rows) == 4
    written = (tmp_path / "both.csv").read_bytes()
    assert main([*compared[:-4], "--csv", str(tmp_path / "both" / "again.csv")]) == ExitCode.OK
    assert (tmp_path / "both" / "again.csv").read_bytes() == written


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_simulation_that_the_same_command_goes_on_with(config, tmp_path, capsys, number):
    trained = []
    whole = DeviceRunner.carry_out

    def carry_out(bench, device, offer, round_):
        trained.append((device.name, round_))
        if len(trained) == 4:
            signal.raise_signal(number)
        return whole(bench, device, offer, round_)

    out, arguments = tmp_path / "out", ["--config", config(), "--rounds", "3", "--out"]
    # A shell starts what runs in the background with Ctrl-C ignored, tests too.
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DeviceRunner, "carry_out", carry_out)
            assert main([*arguments, str(out)]) == ExitCode.INTERRUPTED
    finally:
        signal.signal(signal.SIGINT, ignored)
        assert f"interrupted: the same command continues with what {out} holds\n" in capsys.readouterr().err
        assert main([*arguments, str(out)]) == ExitCode.OK
    assert "yard: continues after round 1 of 3\n" in capsys.readouterr().err
    assert [r for _, r in trained].count(1) == 2
    assert main([*arguments, str(tmp_path / "whole")]) == ExitCode.OK
    run, other = (Record.load(f / "metrics.json") for f in (out, tmp_path / "whole"))
    assert run == other


@pytest.mark.parametrize(
    ("line", "devices", "noted"), [("", 2, False), ("devices = 1\n", 1, False), ("devices = 5\n", 2, True)]
)
def test_rounds_wait_for_as_many_devices_as_the_configuration_says(config, tmp_path, capsys, line, devices, noted):
    text = CONFIG.replace("rounds = 2", f"{line}rounds = 1")
    assert main(["--config", config(text), "--out", str(tmp_path / "out")]) == ExitCode.OK
    record = Record.load(tmp_path / "out" / "metrics.json")
    assert (record.job["devices"], record.last.asked) == (devices, devices)
    assert ("note: [job] devices is 5" in capsys.readouterr().err) is noted


def test_calibration_samples_need_no_labels(config, tmp_path):
    assert main(["--config", config(), "--out", str(tmp_path / "plain"), "--rounds", "1"]) == ExitCode.OK
    np.savez(tmp_path / "calibration.npz", x=np.load(tmp_path / "server.npz")["x"])
    text = CONFIG + '\n[calibration]\ndata = "calibration.npz"\n'
    assert main(["--config", config(text), "--out", str(tmp_path / "out"), "--rounds", "1"]) == ExitCode.OK
    models = [Record.load(tmp_path / folder / "metrics.json").last.model for folder in ("plain", "out")]
    assert models[0] != models[1]


def test_the_example_of_the_docs_is_a_fleet(config, tmp_path):
    block = re.search(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    plan = read_plan(Path(config(block.group(1))))
    assert [d.name for d in plan.devices] == ["barn", "dock"]
    assert (plan.job.devices, plan.dropouts.probability) == (2, 0.1)


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ('data = "barn.npz"', 'data = "nothing.npz"', ExitCode.DATA, "devices[0].data: "),
        (
            'profile = "jetson-orin-nano"',
            'profile = "toaster"',
            ExitCode.PROFILE,
            "devices[1].profile: there is no",
        ),
        ('name = "dock"\n', "", ExitCode.CONFIG, "devices[1].name: expected name, profile and data, got nothing"),
        ('name = "dock"\n', 'name = "barn"\n', ExitCode.CONFIG, "got 'barn' as devices[0]"),
        ('name = "dock"\n', "name = 3\n", ExitCode.CONFIG, "devices[1].name: expected a text, got 3"),
        ("[evaluation]", "[evaluations]", ExitCode.CONFIG, "evaluations"),
        (
            "[evaluation]",
            "[dropouts]\nprobability = 1.0\n[evaluation]",
            ExitCode.CONFIG,
            "dropouts.probability: expected",
        ),
        ("[evaluation]", "[dropouts]\naway = 9\n[evaluation]", ExitCode.CONFIG, "dropouts.away: unknown key"),
        ('path = "model.onnx"', 'path = "server.npz"', ExitCode.MODEL, "model.path: "),
        ('data = "server.npz"', 'data = "model.onnx"', ExitCode.DATA, "evaluation.data: "),
        ("[evaluation]", '[calibration]\ndata = "no.npz"\n[evaluation]', ExitCode.DATA, "calibration.data: "),
    ],
)
def test_what_is_wrong_is_named(config, tmp_path, capsys, old, new, code, named):
    assert old in CONFIG
    assert main(["--config", config(CONFIG.replace(old, new, 1)), "--out", str(tmp_path / "out")]) == code
    err = capsys.readouterr().err
    assert named in err
    assert "fleet.toml: " in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, y: (x, y + 7), "a label is out of range: expected 0 to 9"),
        (lambda x, y: (x.transpose(0, 2, 3, 1), y), "shape of one sample: expected (1, 8, 8), got (8, 8, 1)"),
        (lambda x, y: (np.zeros(x.shape, np.int64), y), "type of inputs"),
    ],
)
def test_data_that_the_model_cannot_take_is_named_before_the_first_round(config, tmp_path, capsys, change, said):
    file, out = config(), tmp_path / "out"
    with np.load(tmp_path / "dock.npz") as hand:
        x, y = change(hand["x_train"], hand["y_train"])
    np.savez(tmp_path / "dock.npz", x=x, y=y)
    assert main(["--config", file, "--out", str(out)]) == ExitCode.DATA
    err = capsys.readouterr().err
    assert f"devices[1].data: {tmp_path / 'dock.npz'}: {said}" in err
    assert err.count("\n") == 1
    assert not out.exists()
    np.savez(tmp_path / "all.npz", x=x, y=y)
    dealt = CONFIG.partition("[[devices]]")[0] + (
        '[data]\nsource = "all.npz"\ndevices = 3\npartition = "iid"\n[[devices]]\nprofile = "jetson-orin-nano"\n'
    )
    assert main(["--config", config(dealt), "--out", str(out)]) == ExitCode.DATA
    assert f"fleet.toml: data.device-000: {said}" in capsys.readouterr().err


def test_a_device_that_is_lost_on_the_way_is_told_of(config, tmp_path, capsys):
    file = config()
    with np.load(tmp_path / "dock.npz") as hand:
        np.savez(tmp_path / "dock.npz", **{**hand, "x_train": hand["x_train"] * np.float32(1e30)})
    assert main(["--config", file, "--out", str(tmp_path / "out")]) == ExitCode.OK
    said = capsys.readouterr()
    assert "device dock refuses round 1: " in said.err
    assert "device dock refuses round 2: " in said.err
    assert "\ndock: no update in 2 of 2 rounds, lastly: " in said.out
    assert "barn:" not in said.out
    assert "no update in 2 of 2 rounds" in (tmp_path / "out" / "report.html").read_text()
    assert Record.load(tmp_path / "out" / "metrics.json").devices[1].missed == 2


def test_one_file_serves_simulator_and_server(config, tmp_path):
    text = CONFIG + '\n[dropouts]\nprobability = 0.1\n[server]\nprofiles = "nowhere"\n'
    assert main(["--config", config(text), "--out", str(tmp_path / "out"), "--rounds", "1"]) == ExitCode.OK
    (tmp_path / "nowhere").mkdir()
    assert read_config(tmp_path / "fleet.toml").job.name == "yard"


def test_the_demo_s_claims_are_judged_after_rounds_enough(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for enough, judged in ((1, True), (2, False)):  # the second only judges: all rounds are done
        monkeypatch.setattr(simulated_fleet, "DEMO_ROUNDS", enough)
        assert main(["--demo", "--out", str(out), "--rounds", "1"]) == ExitCode.OK
        said = capsys.readouterr().out
        assert ("Too few rounds to judge accuracies and bytes by: 1;" in said) is not judged
        for text in (said, (out / "report.html").read_text()):
            assert (re.search("PASS|FAIL", text) is not None) is judged


@pytest.mark.parametrize("option", [["--version"], ["--help"]])
def test_what_needs_no_package_of_an_extra_works_without(option):
    done = without_onnx(option)
    assert (done.returncode, done.stderr) == (0, "")
    assert "fedprune" in done.stdout


def test_a_missing_extra_is_named(config, tmp_path):
    done = without_onnx(["--config", config(), "--out", str(tmp_path / "out")])
    assert done.returncode == ExitCode.MISSING_EXTRA
    assert done.stderr.count("\n") == 1
    assert install_command("server") in done.stderr


def without_onnx(arguments):
    code = (
        "import sys\n"
        "sys.modules['onnx'] = None\n"
        "from fedprune_server.cli.simulate import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)


def test_a_folder_of_something_else_is_left_alone(config, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.md").write_text("mine")
    assert main(["--config", config(), "--out", str(out)]) == ExitCode.USAGE
    assert "holds something that is not a run's" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["report.md"]
    assert (out / "report.md").read_text() == "mine"


def test_a_folder_whose_state_was_deleted_begins_anew(config, tmp_path):
    command = ["--config", config(), "--out", str(tmp_path / "out")]
    assert main(command) == ExitCode.OK
    shutil.rmtree(tmp_path / "out" / "run")
    assert main(command) == ExitCode.OK


def test_a_budget_of_energy_that_no_device_keeps_names_device_and_setting(config, tmp_path, capsys):
    text = CONFIG.replace("density = 0.25", "energy_budget = 1e-6")
    assert main(["--config", config(text), "--out", str(tmp_path / "out")]) == ExitCode.PLAN
    said = capsys.readouterr().err
    assert "standstill. Device barn (and 1 other): no width of " in said
    assert "more energy per round (energy_budget = " in said
    assert "--joules" not in said


def test_the_examples_in_python_run(config, tmp_path, monkeypatch, capsys):
    config()
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text().partition("## From Python")[2], re.DOTALL)

    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), {"__name__": "example"})  # noqa: S102 - the page's own examples

    lines = capsys.readouterr().out.splitlines()
    (_, _, first, second) = [line.split("|")[1] for line in lines if line.startswith("|")]
    assert ("heterofl" in first, "fedavg" in second) == (True, True)  # two runs of one job
    assert (tmp_path / "curves.html").is_file()
