"""Many runs: whatever one of them meets, the others end; how many go at a time changes nothing."""

import json
from pathlib import Path

import pytest

from fedprune.core.errors import ConfigError, ExitCode, MissingExtraError, StorageError
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.runs import RunSpec, RunStatus, do_runs
from fedprune_server.simulation.sweep import read_sweep
from support.fakes.digits_simulation import write_yard, yard_config
from support.fakes.run_works import draw_numbers

RUNS = [RunSpec(f"run-{i}", {"seed": i}) for i in range(3)]
WRONG = [RunSpec(f"wrong-{kind}", {"seed": 0, "fail": kind}) for kind in ("refused", "broken", "killed")]
CONFIG = yard_config("recipe = { max_steps = 2 }")
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
    one_worker = do_runs(draw_numbers, [*RUNS, *WRONG], tmp_path / "one", workers=1)
    statuses: list[list[RunStatus]] = []
    two_workers = do_runs(
        draw_numbers, [*RUNS, *WRONG], tmp_path / "two", workers=2, watch=lambda s: statuses.append(list(s))
    )
    assert [(e.name, e.error.splitlines()[-1:]) for e in one_worker] == [
        (e.name, e.error.splitlines()[-1:]) for e in two_workers
    ]
    assert [bool(e.error) for e in one_worker] == [False] * 3 + [True] * 3
    numbers = [[(tmp_path / out / run.name / "numbers.json").read_text() for run in RUNS] for out in ("one", "two")]
    assert numbers[0] == numbers[1]
    assert "no device can take part. Try another." in one_worker[3].error
    assert "ZeroDivisionError: by nothing" in one_worker[4].error
    assert "exit code -9" in one_worker[5].error
    assert [s.state for s in statuses[-1]] == ["done"] * 3 + ["failed"] * 3
    assert max(sum(s.state == "running" for s in row) for row in statuses) <= 2


def test_two_commands_do_not_share_a_folder(tmp_path: Path) -> None:
    def watch(_: object) -> None:
        with pytest.raises(StorageError, match="another command"):
            do_runs(draw_numbers, RUNS, tmp_path)

    assert not any(e.error for e in do_runs(draw_numbers, RUNS[:1], tmp_path, watch=watch))


def test_ray_is_missed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(MissingExtraError, match="Ray"):
        do_runs(draw_numbers, RUNS, tmp_path, ray=True)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    write_yard(tmp_path)
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
    assert records[0].rounds[0].metrics.get("loss") != records[1].rounds[0].metrics.get("loss")
    assert (out / "quarter-3" / "report.html").exists()
    assert (out / "comparison.html").exists()
    output = capsys.readouterr()
    assert "wrong-3 failed: DataError" in output.err
    assert "gone.npz" in output.err
    assert f"(details: {out / 'wrong-3' / 'failed.txt'})" in output.err
    assert "quarter-3" in output.out
    assert main(["sweep", str(fleet / "sweep.toml"), "--out", str(out), "--json"]) == ExitCode.TRAINING
    summary = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in summary["runs"]] == ["quarter-3", "long-3"]
    assert [(row["variant"], row["runs"]) for row in summary["variants"]] == [("quarter", 1), ("long", 1)]
    assert [row["run"] for row in summary["failed"]] == ["wrong-3"]
    assert summary["report"] == str(out / "comparison.html")
    alone = fleet / "alone"
    assert main(["--config", str(fleet / "fleet.toml"), "--seed", "3", "--out", str(alone)]) == ExitCode.OK
    alone_record, sweep_record = (json.loads((p / "metrics.json").read_text()) for p in (alone, out / "quarter-3"))
    assert alone_record["rounds"] == sweep_record["rounds"]


@pytest.mark.parametrize(
    ("tables", "message", "code"),
    [
        ('job = { strateg = "heterofl" }', "sweep.toml: [[runs]] bad: job.strateg: unknown key", ExitCode.CONFIG),
        ("job = { recipe = { lr = -1 } }", "sweep.toml: [[runs]] bad: job.recipe.lr", ExitCode.CONFIG),
        ("jobs = { rounds = 1 }", "sweep.toml: [[runs]] bad: jobs: unknown table", ExitCode.CONFIG),
        ('job = { strategy = "fedavg", density = 0.0, byte_budget = 1000 }', "bad-3: ", ExitCode.PLAN),
    ],
)
def test_a_variant_s_mistake_is_named_before_the_first_run(
    fleet: Path, capsys: pytest.CaptureFixture[str], tables: str, message: str, code: ExitCode
) -> None:
    (fleet / "sweep.toml").write_text(SWEEP + f'[[runs]]\nname = "bad"\n{tables}\n')
    assert main(["sweep", str(fleet / "sweep.toml"), "--out", str(fleet / "out")]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "fleet.toml" not in err
    assert not (fleet / "out").exists()


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ('config = "fleet.toml"', 'config = "none.toml"', "config"),
        ('config = "fleet.toml"', "", "config: .*got nothing"),
        ("seeds = [3, 4]", "sseds = [1]", "sseds"),
        ("seeds = [3]", "seeds = 3", r"\[\[runs\]\] long: seeds"),
        ('name = "quarter"', 'name = "long"', "sweep.toml.*'long-3' twice"),
    ],
)
def test_a_wrong_sweep_is_refused(old: str, new: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "fleet.toml").write_text(CONFIG)
    (tmp_path / "sweep.toml").write_text(SWEEP.replace(old, new))
    with pytest.raises(ConfigError, match=what):
        read_sweep(tmp_path / "sweep.toml")
