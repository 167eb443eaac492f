"""`fedprune-simulate`: from a configuration to a report, and what it says to a wrong one."""

import re
from pathlib import Path

import numpy as np
import pytest

from fedprune.errors import ExitCode
from fedprune_server.digits import deal, digits_model, write_hand
from fedprune_server.record import Record
from fedprune_server.report import TAIL
from fedprune_server.simulate_cli import build_parser, main, read_plan

DOCS = Path(__file__).resolve().parents[2] / "docs" / "simulate.md"
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


def test_reference_is_fedavg_at_full_width(config, tmp_path):
    out = tmp_path / "out"
    assert main(["--config", config(), "--out", str(out), "--reference", "--rounds", "1"]) == ExitCode.OK
    reference = Record.load(out / "metrics-reference.json")
    assert {d.density for d in reference.devices} == {1.0}
    assert reference.job["recipe"]["logit_adjustment"] is False
    assert reference.last.up > 4 * Record.load(out / "metrics.json").last.up


def test_a_second_call_does_not_train_again(config, tmp_path, monkeypatch):
    arguments = ["--config", config(), "--out", str(tmp_path / "out")]
    assert main(arguments) == ExitCode.OK
    first = Record.load(tmp_path / "out" / "metrics.json")
    monkeypatch.setattr("fedprune_server.virtual_device.Bench.carry_out", lambda *_: pytest.fail("trained again"))
    assert main(arguments) == ExitCode.OK
    assert Record.load(tmp_path / "out" / "metrics.json") == first


@pytest.mark.parametrize("name", ["fedavg", "FedAvg", "run", "reference", "metrics.json"])
def test_no_name_of_a_job_collides_with_what_lies_in_the_folder(config, tmp_path, name):
    out = tmp_path / "out"
    text = CONFIG.replace('"yard"', f'"{name}"').replace("rounds = 2", "rounds = 1")
    assert main(["--config", config(text), "--out", str(out), "--reference"]) == ExitCode.OK
    run, reference = (Record.load(out / f"metrics{end}.json") for end in ("", "-reference"))
    assert (run.title, reference.title) == (name, "FedAvg")
    assert {d.density for d in run.devices} == {0.25}
    assert {d.density for d in reference.devices} == {1.0}


@pytest.mark.parametrize(
    ("line", "devices", "noted"), [("", 2, False), ("devices = 1\n", 1, False), ("devices = 5\n", 2, True)]
)
def test_rounds_wait_for_as_many_devices_as_the_configuration_says(config, tmp_path, capsys, line, devices, noted):
    text = CONFIG.replace("rounds = 2", f"{line}rounds = 1")
    assert main(["--config", config(text), "--out", str(tmp_path / "out")]) == ExitCode.OK
    record = Record.load(tmp_path / "out" / "metrics.json")
    assert (record.job["devices"], record.last.asked) == (devices, devices)
    assert ("note: [job] devices is 5" in capsys.readouterr().out) is noted


def test_calibration_samples_need_no_labels(config, tmp_path):
    assert main(["--config", config(), "--out", str(tmp_path / "plain"), "--rounds", "1"]) == ExitCode.OK
    np.savez(tmp_path / "calibration.npz", x=np.load(tmp_path / "server.npz")["x"])
    text = CONFIG + '\n[calibration]\ndata = "calibration.npz"\n'
    assert main(["--config", config(text), "--out", str(tmp_path / "out"), "--rounds", "1"]) == ExitCode.OK
    models = [Record.load(tmp_path / folder / "metrics.json").last.model for folder in ("plain", "out")]
    assert models[0] != models[1]


def test_the_example_of_the_docs_is_a_fleet(config, tmp_path):
    block = re.search(r"```toml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    path = Path(config(block.group(1)))
    plan = read_plan(path, build_parser().parse_args(["--config", str(path), "--out", "x"]))
    assert [d.name for d in plan.devices] == ["barn", "dock"]
    assert (plan.job.devices, plan.dropouts.probability) == (2, 0.1)


def test_the_docs_list_every_option():
    options = {o for action in build_parser()._actions for o in action.option_strings} - {"-h", "--help"}
    rows = "\n".join(line.split("|")[1] for line in DOCS.read_text().splitlines() if line.startswith("| `--"))
    assert set(re.findall(r"--[a-z]+", rows)) == options


@pytest.mark.parametrize(
    ("old", "new", "code", "named"),
    [
        ('data = "barn.npz"', 'data = "nothing.npz"', ExitCode.DATA, "nothing.npz"),
        ('profile = "jetson-orin-nano"', 'profile = "toaster"', ExitCode.PROFILE, "toaster"),
        ('name = "dock"\n', "", ExitCode.CONFIG, "[[devices]] 2"),
        ('name = "dock"\n', 'name = "barn"\n', ExitCode.CONFIG, "devices"),
        ("rounds = 2", "rounds = 0", ExitCode.CONFIG, "rounds"),
        ("[evaluation]", "[evaluations]", ExitCode.CONFIG, "evaluations"),
        ("[evaluation]", "[dropouts]\nprobability = 1.0\n[evaluation]", ExitCode.CONFIG, "drop-outs"),
        ("[evaluation]", '[dropouts]\nprobability = "often"\n[evaluation]', ExitCode.CONFIG, "probability"),
        ('path = "model.onnx"', 'path = "server.npz"', ExitCode.MODEL, "server.npz"),
    ],
)
def test_what_is_wrong_is_named(config, tmp_path, capsys, old, new, code, named):
    assert old in CONFIG
    assert main(["--config", config(CONFIG.replace(old, new, 1)), "--out", str(tmp_path / "out")]) == code
    assert named in capsys.readouterr().err
