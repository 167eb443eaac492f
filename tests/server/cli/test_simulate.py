"""`fedprune-simulate`: from a configuration to a report, and what it says to a wrong one."""

import csv
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ExitCode
from fedprune.output.extras import install_command
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.fleet.demo_fleet import demo_plan
from fedprune_server.simulation.fleet.device_runner import DeviceRunner
from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.tables import TAIL_ROUNDS
from support.fakes.digits_simulation import YARD, write_yard, yard_config
from support.fakes.opened_job import read_config
from support.paths import ROOT

DOCS = ROOT / "docs" / "simulate.md"
CONFIG = yard_config("seed = 5\nrecipe = { max_steps = 2, logit_adjustment = true }")


@pytest.fixture
def config(tmp_path):
    """Writes a configuration beside model and data, and gives its path."""
    write_yard(tmp_path)

    def write(text=CONFIG):
        (tmp_path / "fleet.toml").write_text(text)
        return str(tmp_path / "fleet.toml")

    return write


def test_a_configuration_becomes_a_report(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", config(), "--out", str(out)]) == ExitCode.OK
    record = Record.load(out / "metrics.json")
    assert [d.name for d in record.devices] == list(YARD)
    assert len(record.rounds) == 2
    assert record.last.metrics.get("accuracy") is not None
    printed = capsys.readouterr().out
    assert f"{record.final(TAIL_ROUNDS)[1]:.1%}" in printed
    assert "means over the last 2 rounds" in printed
    assert (out / "report.html").is_file()
    assert (out / "metrics.json").stat().st_size > 1000


def test_the_strategy_is_said_on_the_command_line(config, tmp_path, capsys):
    out, arguments = tmp_path / "out", ["--config", config(), "--rounds", "1"]
    assert main([*arguments, "--out", str(out), "--strategy", "fedavg"]) == ExitCode.OK
    assert Record.load(out / "metrics.json").job["strategy"] == "fedavg"
    assert main([*arguments, "--out", str(tmp_path / "no"), "--strategy", "fedavgg"]) == ExitCode.CONFIG
    assert "fedavgg" in capsys.readouterr().err
    assert demo_plan(strategy="heterofl").job.strategy == demo_plan(strategy="heterofl").title == "heterofl"
    assert demo_plan(strategy="heterofl").reference_experiment().job == demo_plan().reference_experiment().job


def test_results_are_json_on_request(config, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["--config", config(), "--out", str(out), "--reference", "--json"]) == ExitCode.OK
    results = json.loads(capsys.readouterr().out)
    run, reference = (Record.load(out / name) for name in ("metrics.json", "reference/metrics.json"))
    assert results["report"] == str(out / "report.html")
    assert results["claims"] == []
    assert (results["run"]["run"], results["run"]["rounds"], results["run"]["model"]) == ("yard", 2, run.last.model)
    assert results["run"]["mean_rounds"] == 2
    assert results["run"]["bytes_up"] == run.last.up < results["reference"]["bytes_up"] == reference.last.up
    assert results["run"]["global_accuracy"] == pytest.approx(sum(r.metrics.get("accuracy") for r in run.rounds) / 2)

    reference = str(out / "reference")
    compared = ["compare", str(out), reference, "--out", str(tmp_path / "both"), "--target", "0", "--target", "1.5"]
    assert main([*compared, "--json", "--csv", str(tmp_path / "both.csv")]) == ExitCode.OK
    results = json.loads(capsys.readouterr().out)
    first = run.rounds[0]
    assert results["report"] == str(tmp_path / "both" / "comparison.html")
    assert [row["rounds"] for row in results["runs"]] == [2, 2]
    assert {row["cost"] for row in results["equal_cost"]} == {"rounds", "training_macs", "bytes", "seconds"}
    reached, never = results["runs"][0]["targets"]
    assert (reached["round"], reached["seconds"], reached["bytes"]) == (1, first.elapsed_s, first.down + first.up)
    assert (never["target"], never["round"]) == (1.5, None)
    with (tmp_path / "both.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["seed"], row["round"]) for row in rows[:2]] == [("yard", "5", "1"), ("yard", "5", "2")]
    assert [float(row["accuracy"]) for row in rows[:2]] == [r.metrics.get("accuracy") for r in run.rounds]
    assert len(rows) == 4


def test_a_signal_ends_a_simulation_that_the_same_command_goes_on_with(config, tmp_path, capsys):
    trained = []
    train = DeviceRunner.train

    def carry_out(bench, device, offer, round_):
        trained.append((device.name, round_))
        if len(trained) == 4:
            signal.raise_signal(signal.SIGTERM)
        return train(bench, device, offer, round_)

    out, arguments = tmp_path / "out", ["--config", config(), "--rounds", "3", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeviceRunner, "train", carry_out)
        assert main([*arguments, str(out)]) == ExitCode.INTERRUPTED
    assert str(out) in capsys.readouterr().err
    assert main([*arguments, str(out)]) == ExitCode.OK
    assert "yard: continues after round 1 of 3\n" in capsys.readouterr().err
    assert [r for _, r in trained].count(1) == 2
    assert main([*arguments, str(tmp_path / "whole")]) == ExitCode.OK
    run, uninterrupted = (Record.load(f / "metrics.json") for f in (out, tmp_path / "whole"))
    assert run == uninterrupted


@pytest.mark.parametrize(("line", "devices"), [("devices = 1\n", 1), ("devices = 5\n", 2)])
def test_rounds_wait_for_as_many_devices_as_the_configuration_says_and_has(config, tmp_path, line, devices):
    text = CONFIG.replace("rounds = 2", f"{line}rounds = 1")
    assert main(["--config", config(text), "--out", str(tmp_path / "out")]) == ExitCode.OK
    record = Record.load(tmp_path / "out" / "metrics.json")
    assert (record.job["devices"], record.last.asked) == (devices, devices)


def test_the_example_of_the_docs_is_a_fleet(config, tmp_path):
    plan = read_fleet_plan(Path(config(re.search(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL).group(1))))
    assert [d.name for d in plan.devices] == ["barn", "dock"]
    assert (plan.job.devices, plan.dropouts.probability) == (2, 0.1)


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ('data = "barn.npz"', 'data = "nothing.npz"', ExitCode.DATA, "devices[0].data: "),
        ('profile = "jetson-orin-nano"', 'profile = "toaster"', ExitCode.PROFILE, "devices[1].profile: "),
        ('name = "dock"\n', 'name = "barn"\n', ExitCode.CONFIG, "devices[0]"),
        ("[evaluation]", "[evaluations]", ExitCode.CONFIG, "evaluations"),
        ("[evaluation]", "[dropouts]\nprobability = 1.0\n[evaluation]", ExitCode.CONFIG, "dropouts.probability: "),
        ('path = "model.onnx"', 'path = "server.npz"', ExitCode.MODEL, "model.path: "),
        ('path = "model.onnx"', 'path = "model.onnx"\nloss = "nowhere:loss"', ExitCode.MODEL, "model.loss: "),
        ('path = "model.onnx"', 'path = "model.onnx"\nloss = "server.npz"', ExitCode.MODEL, "model.loss: "),
        ('data = "server.npz"', 'data = "model.onnx"', ExitCode.DATA, "evaluation.data: "),
    ],
)
def test_what_is_wrong_is_named(config, tmp_path, capsys, old, new, code, named):
    assert old in CONFIG
    text = CONFIG.replace("max_steps = 2, logit_adjustment = true", 'loss = "custom"') if "loss" in new else CONFIG
    assert main(["--config", config(text.replace(old, new, 1)), "--out", str(tmp_path / "out")]) == code
    err = capsys.readouterr().err
    assert named in err
    assert "fleet.toml: " in err
    assert err.count("\n") == 1


def test_data_that_the_model_cannot_take_is_named_before_the_first_round(config, tmp_path, capsys):
    file, out, message = config(), tmp_path / "out", "shape of one sample: "
    with np.load(tmp_path / "dock.npz") as hand:
        x, y = hand["x_train"].transpose(0, 2, 3, 1), hand["y_train"]
    np.savez(tmp_path / "dock.npz", x=x, y=y)
    assert main(["--config", file, "--out", str(out)]) == ExitCode.DATA
    err = capsys.readouterr().err
    assert f"devices[1].data: {tmp_path / 'dock.npz'}: {message}" in err
    assert err.count("\n") == 1
    assert not out.exists()
    np.savez(tmp_path / "all.npz", x=x, y=y)
    dealt = CONFIG.partition("[[devices]]")[0] + (
        '[data]\nsource = "all.npz"\ndevices = 3\npartition = "iid"\n[[devices]]\nprofile = "jetson-orin-nano"\n'
    )
    assert main(["--config", config(dealt), "--out", str(out)]) == ExitCode.DATA
    assert f"fleet.toml: data.device-000: {message}" in capsys.readouterr().err


def test_a_device_that_is_lost_on_the_way_is_told_of(config, tmp_path, capsys):
    file = config()
    with np.load(tmp_path / "dock.npz") as hand:
        np.savez(tmp_path / "dock.npz", **{**hand, "x_train": hand["x_train"] * np.float32(1e30)})
    assert main(["--config", file, "--out", str(tmp_path / "out")]) == ExitCode.OK
    printed = capsys.readouterr()
    assert printed.err.count("device dock refuses round ") == 2
    assert "\ndock: " in printed.out
    assert "barn:" not in printed.out
    assert Record.load(tmp_path / "out" / "metrics.json").devices[1].missed == 2


def test_one_file_serves_simulator_and_server(config, tmp_path):
    text = CONFIG + '\n[dropouts]\nprobability = 0.1\n[server]\nprofiles = "nowhere"\n'
    assert main(["--config", config(text), "--out", str(tmp_path / "out"), "--rounds", "1"]) == ExitCode.OK
    (tmp_path / "nowhere").mkdir()
    assert read_config(tmp_path / "fleet.toml").job.name == "yard"


def test_a_missing_extra_is_named(config, tmp_path):
    code = (
        "import sys\n"
        "sys.modules['onnx'] = None\n"
        "from fedprune_server.cli.simulate import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    words = [sys.executable, "-c", code, "--config", config(), "--out", str(tmp_path / "out")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == ExitCode.MISSING_EXTRA
    assert done.stderr.count("\n") == 1
    assert install_command("server") in done.stderr


def test_a_folder_of_something_else_is_left_alone(config, tmp_path, capsys):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "report.md").write_text("mine")
    assert main(["--config", config(), "--out", str(out)]) == ExitCode.USAGE
    assert "holds something that is not a run's" in capsys.readouterr().err
    assert [p.name for p in out.iterdir()] == ["report.md"]
    assert (out / "report.md").read_text() == "mine"
