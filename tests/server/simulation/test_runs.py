"""Many runs: whatever one of them meets, the others end; how many go at a time changes nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedprune.core.errors import ConfigError, ExitCode, MissingExtraError, StorageError
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.digits import deal, digits_model, write_hand
from fedprune_server.simulation.fleet.simulated_fleet import read_tables
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.runs import DONE, RunSpec, RunStatus, carry_out
from fedprune_server.simulation.sweep import read_sweep, simulate_run
from support.fakes.run_works import drawn
from support.paths import ROOT

RUNS = [RunSpec(f"run-{i}", {"seed": i}) for i in range(3)]
WRONG = [RunSpec(f"wrong-{kind}", {"seed": 0, "fail": kind}) for kind in ("refused", "broken", "killed")]
CONFIG = """
[job]
name = "yard"
rounds = 2
density = 0.25
recipe = { max_steps = 2 }

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
SWEEP = """
config = "fleet.toml"
seeds = [3, 4]

[[runs]]
name = "quarter"

[[runs]]
name = "long"
seeds = [3]
[runs.job]
rounds = 3
recipe = { lr = 0.01 }
"""


@pytest.mark.soak
def test_runs_end_as_they_would_alone(tmp_path: Path) -> None:
    one = carry_out(drawn, [*RUNS, *WRONG], tmp_path / "one", workers=1)
    seen: list[list[RunStatus]] = []
    two = carry_out(drawn, [*RUNS, *WRONG], tmp_path / "two", workers=2, watch=lambda s: seen.append(list(s)))
    assert [(e.name, e.result, e.error.splitlines()[-1:]) for e in one] == [
        (e.name, e.result, e.error.splitlines()[-1:]) for e in two
    ]
    assert [e.result is None for e in one] == [False] * 3 + [True] * 3
    assert "no device can take part. Try another." in one[3].error
    assert "ZeroDivisionError: by nothing" in one[4].error
    assert "exit code -9" in one[5].error
    assert [s.state for s in seen[-1]] == ["done"] * 3 + ["failed"] * 3
    assert max(sum(s.state == "running" for s in row) for row in seen) <= 2


def test_what_has_finished_is_not_done_again(tmp_path: Path) -> None:
    first = carry_out(drawn, [RUNS[0], WRONG[0]], tmp_path)
    again = carry_out(drawn, [RUNS[0], WRONG[0], RUNS[1]], tmp_path, workers=2)
    assert again[0] == first[0]
    assert [len((tmp_path / r.name / "calls").read_text()) for r in (RUNS[0], WRONG[0], RUNS[1])] == [1, 2, 1]
    with pytest.raises(StorageError, match=r"other settings: got seed \(stored \d, given 9\)\. .* or delete "):
        carry_out(drawn, [RunSpec(RUNS[0].name, {"seed": 9})], tmp_path)
    (tmp_path / RUNS[0].name / DONE).write_text("{")
    with pytest.raises(StorageError, match="can't be read"):
        carry_out(drawn, [RUNS[0]], tmp_path)


def test_two_commands_do_not_share_a_folder(tmp_path: Path) -> None:
    def watch(_: object) -> None:
        with pytest.raises(StorageError, match="another command"):
            carry_out(drawn, RUNS, tmp_path)

    assert all(e.result for e in carry_out(drawn, RUNS[:1], tmp_path, watch=watch))
    assert (tmp_path / RUNS[0].name / "calls").read_text() == "x"


def test_names_are_those_of_folders_of_their_own(tmp_path: Path) -> None:
    for name in ("..", "a/b", "", "x" * 100):
        with pytest.raises(ConfigError, match="name of a run"):
            RunSpec(name)
    with pytest.raises(ConfigError, match="a name for each"):
        carry_out(drawn, [RUNS[0], RUNS[0]], tmp_path)


@pytest.mark.soak
def test_ray_does_the_same(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed")
    here = carry_out(drawn, [RUNS[0], WRONG[1]], tmp_path / "here")
    there = carry_out(drawn, [RUNS[0], WRONG[1]], tmp_path / "there", ray=True)
    assert [e.result for e in there] == [e.result for e in here]
    assert there[1].error.splitlines()[-1] == here[1].error.splitlines()[-1]


def test_ray_is_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match="Ray"):
        carry_out(drawn, RUNS, tmp_path, ray=True)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    data = deal(("barn", "dock"), seed=5)
    (tmp_path / "model.onnx").write_bytes(digits_model())
    np.savez(tmp_path / "server.npz", x=data.x, y=data.y)
    for name in ("barn", "dock"):
        write_hand(tmp_path / f"{name}.npz", data.devices[name])
    (tmp_path / "fleet.toml").write_text(CONFIG)
    return tmp_path


@pytest.mark.soak
def test_a_sweep_simulates_every_variant(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A variant that fails is said; each of the others is what it would be alone."""
    text = (
        SWEEP.replace("seeds = [3, 4]", "seeds = [3]")
        + '[[runs]]\nname = "wrong"\nevaluation = { data = "gone.npz" }\n'
    )
    (fleet / "sweep.toml").write_text(text)
    out = fleet / "out"
    assert main(["sweep", str(fleet / "sweep.toml"), "--out", str(out), "--workers", "2"]) == ExitCode.TRAINING
    records = [Record.load(out / name / "metrics.json") for name in ("quarter-3", "long-3")]
    assert [len(r.rounds) for r in records] == [2, 3]
    assert records[0].rounds[0].loss != records[1].rounds[0].loss
    assert (out / "quarter-3" / "report.html").exists()
    assert (out / "comparison.html").exists()
    said = capsys.readouterr()
    assert "wrong-3 failed: DataError" in said.err
    assert "gone.npz" in said.err
    assert f"(details: {out / 'wrong-3' / 'failed.txt'})" in said.err
    assert "quarter-3" in said.out
    assert main(["sweep", str(fleet / "sweep.toml"), "--out", str(out), "--json"]) == ExitCode.TRAINING
    found = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == ["quarter-3", "long-3"]
    assert [(row["variant"], row["runs"]) for row in found["variants"]] == [("quarter", 1), ("long", 1)]
    assert [row["run"] for row in found["failed"]] == ["wrong-3"]
    assert found["report"] == str(out / "comparison.html")
    alone = fleet / "alone"
    assert main(["--config", str(fleet / "fleet.toml"), "--seed", "3", "--out", str(alone)]) == ExitCode.OK
    mine, theirs = (json.loads((p / "metrics.json").read_text()) for p in (alone, out / "quarter-3"))
    assert mine["rounds"] == theirs["rounds"]


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ('job = { strateg = "heterofl" }', "[job] unknown key 'strateg'"),
        ('job = { strategy = "heterofll" }', "heterofll"),
        ("job = { recipe = { lr = -1 } }", "[job.recipe] lr"),
        ("weather = { wind = 1 }", "[weather]: unknown key 'wind'"),
        ('data = { source = "x.npz", alpha = 0 }', "[data] "),
        ("jobs = { rounds = 1 }", "unknown table 'jobs'"),
    ],
)
def test_a_variant_s_mistake_is_named_before_the_first_run(
    fleet: Path, capsys: pytest.CaptureFixture[str], tables: str, said: str
) -> None:
    (fleet / "sweep.toml").write_text(SWEEP + f'[[runs]]\nname = "bad"\n{tables}\n')
    assert main(["sweep", str(fleet / "sweep.toml"), "--out", str(fleet / "out")]) == ExitCode.CONFIG
    err = capsys.readouterr().err
    assert "sweep.toml: [[runs]] bad: " in err
    assert said in err
    assert "fleet.toml" not in err
    assert not (fleet / "out").exists()


def test_a_mistake_of_the_file_that_all_runs_have_in_common_is_its_own(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (fleet / "fleet.toml").write_text(CONFIG.replace("rounds = 2", "round = 2"))
    (fleet / "sweep.toml").write_text(SWEEP)
    assert main(["sweep", str(fleet / "sweep.toml"), "--out", str(fleet / "out")]) == ExitCode.CONFIG
    err = capsys.readouterr().err
    assert "fleet.toml:4:1: [job] unknown key 'round'" in err
    assert "sweep.toml" not in err


def edited(fleet: Path, what: str) -> None:
    """Change something that decides a sweep's runs."""
    if what == "fleet.toml":
        (fleet / what).write_text(CONFIG.replace("rounds = 2", "rounds = 5"))
    elif what == "model.onnx":
        (fleet / what).write_bytes(digits_model() + b"\x1a\x00")
    else:
        np.savez(fleet / what, **{k: v + 1 for k, v in np.load(fleet / what).items()})


@pytest.mark.parametrize("what", ["fleet.toml", "model.onnx", "barn.npz", "server.npz"])
def test_results_of_files_that_were_edited_since_are_not_shown(fleet: Path, what: str) -> None:
    (fleet / "sweep.toml").write_text(SWEEP)
    first, out = read_sweep(fleet / "sweep.toml"), fleet / "yard"  # called like the job
    for run in first:
        (out / run.name).mkdir(parents=True)
        (out / run.name / DONE).write_text(json.dumps({"settings": dict(run.settings), "result": {}, "seconds": 1}))
    assert read_sweep(fleet / "sweep.toml") == first
    assert [e.result for e in carry_out(simulate_run, first, out)] == [{}] * 3

    edited(fleet, what)

    with pytest.raises(StorageError, match="other settings"):
        carry_out(simulate_run, read_sweep(fleet / "sweep.toml"), out)


def test_changes_that_name_a_strategy_have_none_of_the_files_options(tmp_path: Path) -> None:
    config = tmp_path / "fleet.toml"
    config.write_text(
        CONFIG.replace('name = "yard"', 'name = "yard"\nstrategy = "fedprune"\noptions = { dropout = [] }')
    )
    assert read_tables(config, {"job": {"strategy": "local"}}).config.job.options == {}
    changes = {"options": {"mixup": 0.0}}
    assert read_tables(config, {"job": {"strategy": "fedprune", **changes}}).config.job.options == {"mixup": 0.0}
    assert read_tables(config, {"job": changes}).config.job.options == {"dropout": [], "mixup": 0.0}
    with pytest.raises(ConfigError, match="'local' has no option 'dropout'"):
        read_tables(config, {"job": {"strategy": "local", "options": {"dropout": []}}})


def test_each_variant_has_its_seeds(tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(CONFIG)
    (tmp_path / "sweep.toml").write_text(SWEEP)
    runs = read_sweep(tmp_path / "sweep.toml")
    assert [r.name for r in runs] == ["quarter-3", "quarter-4", "long-3"]
    assert [r.settings["seed"] for r in runs] == [3, 4, 3]


def test_the_docs_sweep_can_be_read(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "simulate.md").read_text()
    (block,) = [b.partition("```")[0] for b in text.split("```toml\n")[1:] if "[[runs]]" in b]
    (tmp_path / "fleet.toml").write_text(CONFIG)
    (tmp_path / "sweep.toml").write_text(block)
    runs = read_sweep(tmp_path / "sweep.toml")
    assert [r.name for r in runs] == [
        "heterofl-0",
        "heterofl-1",
        "heterofl-2",
        "ours-0",
        *(f"narrow-{s}" for s in range(3)),
    ]
    assert runs[3].settings["changes"]["simulation"] == {"workers": 2}
    assert runs[-1].settings["changes"]["job"]["options"] == {"densities": [0.25, 0.5]}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('config = "fleet.toml"', 'config = "none.toml"', "config"),
        ("seeds = [3, 4]", "seeds = []", "seeds"),
        ("seeds = [3, 4]", "seeds = [true]", "seeds"),
        ("seeds = [3, 4]", "sseds = [1]", "sseds"),
        ('name = "quarter"', "", "name"),
        ('name = "quarter"', 'name = "long"', "sweep.toml.*'long-3' twice"),
        ("[runs.job]\nrounds = 3", "rounds = 3", "rounds"),
    ],
)
def test_a_wrong_sweep_is_refused(old: str, new: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(CONFIG)
    (tmp_path / "sweep.toml").write_text(SWEEP.replace(old, new))
    with pytest.raises(ConfigError, match=what):
        read_sweep(tmp_path / "sweep.toml")
