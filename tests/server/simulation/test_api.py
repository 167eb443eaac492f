"""The simulator's Python API."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import tomllib

import fedprune_export as fx
from fedprune.core import tensorfile
from fedprune.core.errors import ConfigError, PlanError
from fedprune_export.bundles.conversion import with_weights
from fedprune_server import simulate
from fedprune_server.cli.simulate import main
from fedprune_server.simulation.digits import digits_model
from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.results.rows import COST_COLUMNS
from fedprune_server.simulation.starter import STARTER_BOARDS, write_starter
from support.paths import ROOT

FLEET: dict[str, Any] = {
    "job": {"rounds": 2, "recipe": {"lr": 0.05}},
    "model": {"path": "model.onnx"},
    "data": {"source": "digits", "most": 400, "server": 0.2},
    "devices": [{"name": "pi", "count": 2, "profile": "raspberry-pi-4b"}],
}


def test_the_page_s_python_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the folder of a fleet to begin with, for a round."""
    starter_fleet(tmp_path, monkeypatch)
    page = (ROOT / "docs" / "simulate.md").read_text()
    first, sweep, second, *_ = re.findall(
        r"```(?:python|toml)\n(.*?)```", page.partition("## From Python")[2], re.DOTALL
    )
    Path("sweep.toml").write_text(sweep)

    names: dict[str, Any] = {"__name__": "__main__"}
    exec(first, names)  # noqa: S102
    titles = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [title.partition(" ")[2] for title in titles] == ["(heterofl)", "(fedrolex)"]
    assert len(names["run"].rows()) == 1
    assert main(["sweep", "sweep.toml", "--out", "runs", "--workers", "2"]) == 0
    exec(second, names)  # noqa: S102
    rows = names["comparison"].variants
    assert [(row["variant"], row["runs"], row["gain_over_local"] is None) for row in rows] == [
        ("fedavg", 2, False), ("heterofl", 2, False), ("local", 2, True),
    ]  # fmt: skip
    assert main(["compare", "runs", "--out", "side-by-side"]) == 0
    assert Path("curve.svg").exists()
    assert Path("table.tex").read_text().count(r"\\") == 4
    assert "<svg" in (tmp_path / "curves.html").read_text()


def starter_fleet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fleet to begin with in the current folder, whose job has one round. The whole model fits one board's link."""
    write_starter(folder, STARTER_BOARDS)
    (folder / "fleet.toml").write_text((folder / "fleet.toml").read_text().replace("rounds = 12", "rounds = 1"))
    monkeypatch.chdir(folder)


@pytest.mark.parametrize(("deadline_s", "covered"), [(0.0, [3, 1]), (0.5, [3, 1]), (0.05, [3])])
def test_too_few_boards_are_refused_before_training_and_every_hint_helps(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    deadline_s: float,
    covered: list[int],
) -> None:
    starter_fleet(tmp_path, monkeypatch)
    tables = tomllib.loads(Path("fleet.toml").read_text())
    job = tables["job"] | ({"deadline_s": deadline_s} if deadline_s else {})
    with pytest.raises(PlanError) as refused:
        simulate(tables | {"job": job}, strategy="fedavg", folder="run")
    assert not Path("run").exists()
    assert ("longer deadline_s" in refused.value.hint) == bool(deadline_s)
    settings = map(tomllib.loads, re.findall(r"\w+ = \w+", refused.value.hint))
    for changes, boards in zip(settings, covered, strict=True):
        deadline = {"deadline_s": 100} if boards == 3 else {}
        run = simulate(tables | {"job": job | changes | deadline}, strategy="fedavg")
        assert (len(run.record.latest), bool(caplog.messages)) == (boards, boards < 3)


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Tables whose files are in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("model.onnx").write_bytes(digits_model())
    return FLEET


def test_the_deadline_that_is_named_is_long_enough_for_all_boards(fleet: dict[str, Any]) -> None:
    unequal = {"data": fleet["data"] | {"partition": "dirichlet"}, "devices": [fleet["devices"][0] | {"count": 6}]}
    with pytest.raises(PlanError) as refused:
        simulate(fleet | unequal | {"job": fleet["job"] | {"deadline_s": 0.001}}, strategy="fedavg")
    named = re.findall(r"deadline_s = ([\d.]+)", str(refused.value))[0]
    run = simulate(fleet | unequal | {"job": fleet["job"] | {"deadline_s": float(named)}}, strategy="fedavg")
    assert len(run.record.latest) == 6


def test_tables_give_the_run_that_a_file_of_them_gives(fleet: dict[str, Any]) -> None:
    Path("fleet.toml").write_text(
        "[job]\nrounds = 2\nrecipe = { lr = 0.05 }\n[model]\npath = 'model.onnx'\n"
        "[data]\nsource = 'digits'\nmost = 400\nserver = 0.2\n"
        "[[devices]]\nname = 'pi'\ncount = 2\nprofile = 'raspberry-pi-4b'\n"
    )

    run = simulate(fleet, seed=3)

    assert main(["--config", "fleet.toml", "--seed", "3", "--out", "out"]) == 0
    assert Record.load(Path("out/metrics.json")).rounds == run.record.rounds
    assert simulate("fleet.toml", seed=3, rounds=1).record.rounds == run.record.rounds[:1]


@pytest.mark.parametrize("setting", [{"seed": 0}, {"rounds": 1}, {"reference": True}, {"title": "mine"}])
def test_a_plan_takes_no_settings_beside_its_own(fleet: dict[str, Any], setting: dict[str, Any]) -> None:
    plan = read_fleet_plan(Path("settings"), tables=fleet)
    with pytest.raises(ConfigError, match=next(iter(setting))):
        simulate(plan, **setting)


def test_there_is_a_row_per_round_or_per_round_and_device(fleet: dict[str, Any], tmp_path: Path) -> None:
    job = {**fleet["job"], "options": {"densities": [1.0]}}  # of fedavg, not of the tables' strategy
    run = simulate({**fleet, "job": job}, strategy="fedavg", folder=tmp_path / "kept")

    assert (tmp_path / "kept" / "metrics.json").is_file()
    assert run.record.title == "fedavg"
    assert [row[0] for row in run.compare(run).table] == ["run", "fedavg", "fedavg"]
    assert run.plot().save(tmp_path / "page.html").read_text().startswith("<!doctype html>")
    rounds, devices = pd.DataFrame(run.rows()), run.rows(devices=True)
    assert rounds["round"].to_list() == [1, 2]
    assert (
        rounds["local_accuracy"].to_list() == rounds["mean_accuracy_after"].to_list() == list(run.record.mean_locals())
    )
    assert rounds["local_devices"].to_list() == [2, 2]
    assert rounds["training_macs"].to_list() == [row.macs for row in run.record.rounds]
    names = sorted(device.name for device in run.record.devices)
    assert [(row["round"], row["device"]) for row in devices] == [(r, name) for r in (1, 2) for name in names]
    first, row = run.record.rounds[0], devices[0]
    assert [row[name] for name in COST_COLUMNS] == first.spent[names[0]]
    assert (row["local_accuracy"], row["density"]) == (first.local[names[0]], 1.0)


def test_a_run_has_its_model_and_its_card(fleet: dict[str, Any], tmp_path: Path) -> None:
    run = simulate(fleet, folder="kept", title="mine")

    saved = run.save_pretrained(tmp_path / "saved", license="mit")

    stored = tensorfile.encode(run.model.tensors)
    assert tensorfile.sha256_hex(stored) == run.record.last.model
    assert tensorfile.encode(fx.from_pretrained(saved).tensors) == stored
    card = huggingface_hub.ModelCard.load(saved / "README.md")
    results = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert results == pytest.approx(run.record.last.metrics, abs=1e-6)
    assert (card.data.license, card.data.eval_results[0].dataset_name) == ("mit", "digits")
    assert "| raspberry-pi-4b | 2 | 1.00 |" in card.text
    assert "digits: " in card.text
    assert not any(device.name in card.text for device in run.record.devices)
    assert tensorfile.encode(simulate(fleet, folder="kept", title="mine").model.tensors) == stored


@pytest.mark.parametrize(
    ("strategy", "density", "is_same_cut"),
    [
        ("fedprune", 0.5, True),
        ("heterofl", 0.5, True),
        ("heterofl", 1.0, False),
        ("fedrolex", 0.5, False),  # its windows move on
        ("fiarse", 0.5, False),  # elements instead of channels
    ],
)
def test_a_trained_model_is_cut_as_its_fleet_cut_it(
    fleet: dict[str, Any], strategy: str, density: float, is_same_cut: bool, tmp_path: Path
) -> None:
    job = {**fleet["job"], "strategy": strategy, "density": density}
    model = fx.load(simulate({**fleet, "job": job}, rounds=1).save_pretrained(tmp_path / "saved"))
    plan = fx.plan(model, "raspberry-pi-4b", density=0.5)

    reports = {
        scorer: fx.export(model, plan, tmp_path / str(scorer), scorer=scorer)
        for scorer in (None, "ordered", "magnitude")
    }
    chosen = {scorer: report.selection.digest for scorer, report in reports.items()}

    assert chosen["ordered"] != chosen["magnitude"]
    assert chosen[None] == chosen["ordered" if is_same_cut else "magnitude"]
    assert reports[None].scorer == ("the fleet that trained the model" if is_same_cut else "magnitude")


@pytest.mark.parametrize(("strategy", "density", "stay"), [("fedprune", 0.5, True), ("fedrolex", 0.5, False)])
def test_ranks_of_an_earlier_fleet_stay_where_the_model_is_trained_by_them(
    fleet: dict[str, Any], strategy: str, density: float, stay: bool, tmp_path: Path
) -> None:
    first = simulate(fleet, rounds=1, strategy="fedavg").model
    assert first.ranks is None
    backwards = tuple(np.arange(n)[::-1] for n in first.architecture.sizes)
    job = {**fleet["job"], "strategy": strategy, "density": density}

    further = simulate({**fleet, "job": job}, rounds=1, model=with_weights(first, first.tensors, "", backwards))

    ranks = fx.load(further.save_pretrained(tmp_path)).ranks
    assert (ranks is not None) == stay
    assert ranks is None or all(map(np.array_equal, ranks, backwards))
