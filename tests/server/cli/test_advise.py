"""`fedprune-simulate advise`: which variants a fleet's job is tried in, and which of them is to be taken."""

import json
import re

import pytest
import tomllib

from fedprune.core.errors import ExitCode
from fedprune.jobs.job import Job
from fedprune.strategies import compose
from fedprune_server.cli.simulate import main
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation import runs as simulated_runs
from fedprune_server.simulation.fleet.simulated_fleet import read_fleet_plan
from fedprune_server.simulation.results.record import Record
from fedprune_server.simulation.runs import RunEnd
from fedprune_server.simulation.starter import STARTER_BOARDS, StarterBoard, write_starter

PI = "raspberry-pi-4b"
WIDE = [StarterBoard(name, PI, 2_000_000) for name in ("a", "b", "c")]
ONE_NARROW = [StarterBoard("a", PI, 40_000), *(StarterBoard(name, PI, 150_000) for name in ("b", "c", "d"))]


def fleet_of(folder, boards, rounds=12, **recipe):
    """Writes a fleet whose runs are short, and gives its file."""
    write_starter(folder, boards)
    lines = "".join(f"\n{key} = {json.dumps(value)}" for key, value in recipe.items())
    path = folder / "fleet.toml"
    text = path.read_text().replace("rounds = 12", f"rounds = {rounds}").replace("lr = 0.03", f"lr = 0.03{lines}")
    path.write_text(text)
    return path


@pytest.fixture
def advise(tmp_path, monkeypatch, capsys):
    """Gives advice on runs of these curves of the global model, by variant and seed, instead of training."""

    def curves_of(boards, curves, *arguments, usual=(0.5,), sent=None, served=None, further="", **recipe):
        path = fleet_of(tmp_path / "fleet", boards, **recipe)
        path.write_text(path.read_text() + further)

        job = read_fleet_plan(path).job.to_dict()

        def finish_runs(work, runs, out, **_):
            for run in runs:
                variant, _, seed = run.name.rpartition("-")
                curve = (curves.get(variant) or [usual] * 2)[int(seed)]
                rows = [
                    RoundRow(
                        i,
                        60.0 * i,
                        "a" * 64,
                        {metric: score},
                        (served or {}).get(variant, {}),
                        1,
                        (sent or {}).get(variant, 10) * (min(i, 2) if variant == "local" else i),
                        0,
                    )
                    for i, score in enumerate(curve, 1)
                ]
                (out / run.name).mkdir(parents=True, exist_ok=True)
                settings = {**job, "strategy": run.settings["changes"]["job"]["strategy"], "seed": int(seed)}
                Record(run.name, settings, (), (), tuple(rows)).save(out / run.name / "metrics.json")
            return [RunEnd(run.name) for run in runs]

        metric = recipe.get("metric", "accuracy")
        monkeypatch.setattr(simulated_runs, "do_runs", finish_runs)
        command = ["advise", "--config", str(path), "--out", str(tmp_path / "out"), "--json", *arguments]
        assert main(command) == ExitCode.OK
        return json.loads(capsys.readouterr().out)

    return curves_of


def test_figures_are_those_of_runs_on_the_fleet_and_lines_are_those_of_the_best(tmp_path, monkeypatch, capsys):
    def carry_out(work, runs, out, **_):
        for run in runs:
            work(run, out / run.name, lambda *_: None)
        return [RunEnd(run.name) for run in runs]

    monkeypatch.setattr(simulated_runs, "do_runs", carry_out)
    path, out = fleet_of(tmp_path / "fleet", STARTER_BOARDS[:2], rounds=1, max_steps=1), tmp_path / "out"
    command = ["advise", "--config", str(path), "--out", str(out), "--seeds", "1"]
    assert main([*command, "--json"]) == ExitCode.OK
    advice = json.loads(capsys.readouterr().out)
    rows = {row["variant"]: row for row in advice["variants"]}
    runs = {name: Record.load(out / f"{name}-0" / "metrics.json") for name in rows}
    for name, row in rows.items():
        last = runs[name].last
        assert row["bytes"] == last.down + last.up
        assert row["hours"] * 3600 == pytest.approx(last.elapsed_s)
        assert row["joules"] == pytest.approx(sum(r.joules for r in runs[name].rounds))
        assert row["macs_share"] == pytest.approx(runs[name].macs() / runs["fedavg"].macs())
        assert row["global_accuracy"] == (None if name == "local" else last.metrics.get("accuracy"))
        assert row["worst_local_accuracy"] == min(runs[name].latest.values())
    assert {d.density for d in runs["fedavg"].devices} == {1.0}, "the reference trains what these boards couldn't"
    limits = {run.job["move_limit"] for run in runs.values()}
    assert limits == {Job.move_limit}, "a server runs the job, with its limits"
    best_variant = advice["advice"]["taken"]
    for key, value in tomllib.loads(best_variant["toml"])["job"].items():
        assert getattr(Job.from_dict(runs[best_variant["variant"]].job), key) == value

    assert main(command) == ExitCode.OK
    output = capsys.readouterr().out
    assert advice["advice"]["reason"] in output
    assert best_variant["toml"] in output
    assert (out / "comparison.html").exists()


@pytest.mark.parametrize(
    ("boards", "names", "misfits"),
    [
        pytest.param(WIDE, ["fedavg", "fedavg-int8", "fedprune", "local"], [], id="all hold the whole model"),
        pytest.param(
            ONE_NARROW,
            ["fedavg", "fedavg-int8", "fedprune", "one-width", "local"],
            ["fedavg", "fedavg-int8"],
            id="one holds less than the others",
        ),
    ],
)
def test_variants_that_come_to_the_same_are_tried_once(advise, boards, names, misfits):
    rows = advise(boards, {})["variants"]
    assert [row["variant"] for row in rows] == names
    assert [row["variant"] for row in rows if row["why_not"]] == misfits
    cores = [compose(Job(**row["job"])).core for row in rows]
    assert len({(row["job"]["strategy"], str(core)) for row, core in zip(rows, cores, strict=True)}) == len(names) - 1


def test_fedprune_keeps_to_plans_where_the_recipe_has_ordered_dropout_in_place_of_a_core(advise):
    rows = advise(ONE_NARROW, {}, ordered_dropout=[0.5])["variants"]
    assert [row["variant"] for row in rows if row["why_not"]] == ["fedavg", "fedavg-int8"]


def test_the_best_is_taken_that_all_boards_can_train(advise):
    curves = {"fedavg": [(0.9,), (0.91,)], "one-width": [(0.8,), (0.82,)], "fedprune": [(0.6,), (0.61,)]}
    advice = advise(ONE_NARROW, curves, rounds=1, sent={"one-width": 1000})["advice"]
    assert advice["taken"]["variant"] == "one-width"
    assert advice["doubts"] == []


@pytest.mark.parametrize(
    ("judge", "taken"), [([], "fedavg"), (["--judge", "served"], "local"), (["--judge", "worst"], "fedprune")]
)
def test_the_named_score_decides_and_boards_that_gain_are_said(advise, judge, taken):
    """Boards that train alone serve the best models on average, though not each; they have no global model."""
    served = {
        "local": {"a": 0.98, "b": 0.9, "c": 0.2},
        "fedavg": {"a": 0.5, "b": 0.5, "c": 0.5},
        "fedavg-int8": {"a": 0.5, "b": 0.5, "c": 0.5},
        "fedprune": {"a": 0.6, "b": 0.6, "c": 0.6},
    }
    curves = {"fedavg": [(0.9,), (0.9,)], "local": [(0.99,), (0.99,)]}
    advice = advise(WIDE, curves, *judge, rounds=1, served=served)["advice"]
    assert advice["taken"]["variant"] == taken
    fleet = "fedavg" if taken == "fedavg" else "fedprune"
    expected = {board: served[fleet][board] - score for board, score in served["local"].items()}
    assert advice["gains"] == pytest.approx(expected)
    assert re.search(r"1 of 3 boards gain, .*: c; 2 of 3 boards don't gain, .*: a, b", advice["worth"])


def test_advice_names_what_is_within_noise_of_what_it_takes(advise):
    curves = {"fedavg": [(0.5,), (0.5,)], "fedavg-int8": [(0.9,), (0.8,)], "fedprune": [(0.85,), (0.86,)]}
    advice = advise(WIDE, curves, rounds=1, sent={"fedprune": 5})["advice"]
    assert re.findall(r"fed[\w-]+", advice["reason"]) == ["fedprune", "fedavg-int8"]


@pytest.mark.parametrize(("rounds", "doubts"), [(4, 0), (12, 1)])
def test_advice_is_doubted_where_a_job_goes_on_and_another_variant_rises(advise, rounds, doubts):
    curves = {
        "fedavg": [(0.1, 0.2, 0.3, 0.4)] * 2,
        "fedavg-int8": [(0.1, 0.2, 0.3, 0.4)] * 2,
        "fedprune": [(0.5, 0.5, 0.5, 0.5)] * 2,
    }
    advice = advise(WIDE, curves, "--rounds", "4", rounds=rounds)["advice"]
    assert advice["taken"]["variant"] == "fedprune"
    assert len(advice["doubts"]) == doubts


def test_what_the_first_two_rounds_alone_send_is_counted_once(advise):
    variants = advise(WIDE, {}, "--rounds", "3", usual=(0.5,) * 3)["variants"]
    assert [row["bytes"] for row in variants] == [120, 120, 120, 20]


def test_a_variant_that_the_jobs_settings_refuse_is_left_out_and_said(advise):
    private = '\n[job.privacy]\nclip = 1.0\nnoise_multiplier = 1.0\nnoise = "shared"\nboards = 1\n'
    advice = advise(WIDE, {"fedavg": [(0.9,), (0.9,)]}, rounds=1, further=private)
    assert [row["variant"] for row in advice["variants"]] == ["fedavg"]
    *refused, alone = advice["refused"]
    assert [row["variant"] for row in refused] == ["fedavg-int8", "fedprune", "one-width"]
    assert all("compression" in row["why"] for row in refused)
    assert alone["variant"] == "local", "its boards hand in nothing that noise could protect"
    assert advice["advice"]["taken"]["variant"] == "fedavg"
