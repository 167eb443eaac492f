"""Reports: every number is the record's, claims are judged by the numbers, pages need nothing else."""

import csv
import html
import json
import math
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from fedprune.coordination.width_planner import WHOLE_HINT
from fedprune.core.errors import ConfigError, MissingExtraError, StorageError
from fedprune.jobs.job import NO_UPDATE_LIMITS, Job
from fedprune.model.recipe import Recipe
from fedprune_server.cli.sweep_runs import print_remarks
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.datasets.fleet_data import FleetData
from fedprune_server.simulation.results import charts
from fedprune_server.simulation.results.comparison import (
    board_figures,
    comparison_document,
    equal_cost_figures,
    equal_cost_rows,
    group_by_seed,
    variant_figures,
    variant_rows,
)
from fedprune_server.simulation.results.coverage import with_coverage_marks
from fedprune_server.simulation.results.differences import board_gains, student_quantile
from fedprune_server.simulation.results.publication import save_figure, save_table
from fedprune_server.simulation.results.record import DeviceRow, Record
from fedprune_server.simulation.results.report import claims, closing_text, plan_rows, run_document, write_report
from fedprune_server.simulation.results.rows import device_rows
from fedprune_server.simulation.results.tables import final_figures, final_rows, tail_note

GOLDEN = Path(__file__).with_name("golden_report.md")
GROUPS = (("stem", 8), ("body", 24))


def record(title="fleet", local=0.9, accuracy=0.8, down=1_000_000, up=900_000, rounds=4):
    """A run of two devices whose accuracies are the same in every round."""
    devices = (
        DeviceRow("zero", "raspberry-pi-zero-2w", 100, (4, 12), 0.5, "link", 1234),
        DeviceRow("orin", "jetson-orin-nano", 200, (8, 24), 1.0, "nothing", 5678),
    )
    rows = tuple(
        RoundRow(
            round=r,
            elapsed_s=2.0 * r,
            model="a" * 64,
            metrics={"accuracy": accuracy, "loss": 0.5},
            local={"zero": local - 0.02, "orin": local + 0.02},
            asked=2,
            down=down * r // rounds,
            up=up * r // rounds,
        )
        for r in range(1, rounds + 1)
    )
    channels = {"zero": ((0, 2, 4, 6), tuple(range(12))), "orin": (tuple(range(8)), tuple(range(24)))}
    return Record(title, {"seed": 7}, GROUPS, devices, rows, channels, "payload at the broker")


def test_record_comes_back_from_its_file(tmp_path):
    run = record()
    run.save(tmp_path / "metrics.json")
    assert Record.load(tmp_path / "metrics.json") == run


def test_what_is_no_text_is_no_record(tmp_path):
    (tmp_path / "metrics.json").write_bytes(bytes(range(256)))
    with pytest.raises(StorageError, match=r"metrics\.json is no run's record") as caught:
        Record.load(tmp_path / "metrics.json")
    assert caught.value.hint


def test_cut_record_is_refused(tmp_path):
    text = record().to_json()
    for size in range(0, 500, 50):
        (tmp_path / "metrics.json").write_text(text[:size])
        with pytest.raises(StorageError, match=r"metrics\.json"):
            Record.load(tmp_path / "metrics.json")


def private(*epsilons, delta=1e-5, **settings):
    """A private run that ends with the last of these ε."""
    rounds = zip(record(rounds=len(epsilons), **settings).rounds, epsilons, strict=True)
    rounds = tuple(replace(row, measured={"epsilon": e, "epsilon_next": e + 1}) for row, e in rounds)
    return replace(record(**settings), job={"privacy": {"delta": delta, "noise": "local"}}, rounds=rounds)


def rich():
    """A run in whose report every part has something to say."""
    zero, orin = record().devices
    devices = (
        replace(zero, unit="CPU", missed=3, why="a label is out of range", compared={"step_seconds": (0.5, 1.0)}),
        replace(orin, unit="GPU", train_j=0.25, warning="energy isn't limited."),
    )
    rounds = tuple(
        replace(
            row,
            metrics={"accuracy": 0.9 - abs(row.round - 3) / 10, "loss": 0.5},
            local={"orin": 0.9},
            device_metrics={"accuracy_before": {"orin": row.round / 10}, "accuracy_after": {"orin": row.round / 5}},
            updates=2,
            limited=row.round - 1,
        )
        for row in record().rounds
    )
    partition = FleetData("pets", ("cat", "dog"), {"zero": (4, 0), "orin": (2, 4)})
    job = Job(strategy="fedavg", seed=7, rounds=9, recipe=Recipe(epochs=3, lr=0.125, batch_size=16)).to_dict()
    early = "ended after round 4 of 9: the strategy ended the job"
    return replace(
        record(), job=job, devices=devices, rounds=rounds, partition=partition, version="1.2.3", ended_early=early
    )


def test_a_report_and_a_comparison_read_as_the_golden_file():
    """Wording has its test here alone; what is meant to change is written to the file anew."""
    reference = record("FedAvg", accuracy=0.9, down=2_100_000, up=1_900_000)
    withheld = replace(private(5.0, 7.0), title="private")
    withheld = replace(withheld, rounds=tuple(replace(row, local={}) for row in withheld.rounds))
    documents = (run_document(rich(), reference), comparison_document([rich(), withheld, reference], targets=(0.85,)))
    texts = (closing_text(rich(), reference), *(document.to_markdown() for document in documents))
    assert re.sub(r"Date: \S+ \S+ UTC", "Date: today", "\n\n----\n\n".join(texts)) == GOLDEN.read_text()


def spending(title, macs, down, seconds, accuracies):
    """A run whose rounds cost the same each; None is a round whose global model wasn't measured."""
    run = record(title, rounds=len(accuracies))
    rows, spent = [], {"zero": [0, 0, macs, macs]}
    for row, accuracy in zip(run.rounds, accuracies, strict=True):
        metrics = {} if accuracy is None else {"accuracy": accuracy}
        costs = {"elapsed_s": seconds * row.round, "down": down * row.round, "up": 0, "spent": spent}
        rows.append(replace(row, metrics=metrics, **costs))
    return replace(run, rounds=tuple(rows))


def test_runs_are_compared_at_what_all_have_spent():
    dear = spending("dear", 10**12, 10**6, 10.0, [0.1, 0.2, 0.3])
    cheap = spending("cheap", 10**11, 10**5, 20.0, [0.4, 0.5, None, 0.7, 0.8])
    figures = {(f["cost"], f["run"]): f for f in equal_cost_figures([dear, cheap])}
    costs = {key: (f["amount"], f["round"], f["spent"], f["global_accuracy"]) for key, f in figures.items()}
    assert costs == {
        ("rounds", "dear"): (3, 3, 3, 0.3),
        ("rounds", "cheap"): (3, 2, 2, 0.5),  # its third round wasn't measured
        ("training_macs", "dear"): (5 * 10**11, None, None, None),  # its first round costs more
        ("training_macs", "cheap"): (5 * 10**11, 5, 5 * 10**11, 0.8),
        ("bytes", "dear"): (500_000, None, None, None),
        ("bytes", "cheap"): (500_000, 5, 500_000, 0.8),
        ("seconds", "dear"): (30.0, 3, 30.0, 0.3),
        ("seconds", "cheap"): (30.0, 1, 20.0, 0.4),
    }
    assert figures["rounds", "cheap"]["local_accuracy"] == pytest.approx(0.9)
    rows = equal_cost_rows([dear, cheap])
    assert rows[2] == ("3 rounds", "cheap", "2", "2 rounds", "90.0%", "50.0%")
    assert rows[3] == ("0.5 TMACs", "dear", "none", "–", "–", "–")


def test_final_accuracies_are_means_of_the_last_rounds():
    rows = record(rounds=4).rounds
    rows = tuple(replace(r, metrics={"accuracy": r.round / 10}, local={"zero": r.round / 20}) for r in rows)
    local_score, global_score = replace(record(), rounds=rows).final(2)
    assert local_score == pytest.approx((3 / 20 + 4 / 20) / 2)
    assert global_score == pytest.approx((3 / 10 + 4 / 10) / 2)
    unmeasured = tuple(replace(r, metrics={}, local={}) for r in rows)
    assert all(map(math.isnan, replace(record(), rounds=unmeasured).final(3)))


def asked_in_turn():
    """A run whose rounds ask one device each: zero, orin, zero, orin."""
    run = record(rounds=4)
    local = [{"zero": 0.2}, {"orin": 0.4}, {"zero": 0.6}, {"orin": 0.8}]
    return replace(run, rounds=tuple(replace(r, local=v, asked=1) for r, v in zip(run.rounds, local, strict=True)))


def test_a_device_that_is_not_asked_keeps_its_latest_accuracy():
    run = asked_in_turn()
    assert run.mean_locals() == pytest.approx((0.2, 0.3, 0.5, 0.7))
    assert run.latest == {"zero": 0.6, "orin": 0.8}
    assert run.final(2)[0] == pytest.approx(0.6)
    assert [row[-1] for row in plan_rows(run)[1:]] == ["60.0%", "80.0%"]


def data_of(markup, name):
    """Per chart what its attribute says."""
    return [json.loads(html.unescape(v)) for v in re.findall(rf'data-{name}="([^"]*)"', markup)]


def test_curves_hold_the_records_values_along_rounds_bytes_and_seconds():
    run = record(local=0.5)
    run = replace(run, rounds=tuple(replace(r, metrics={"accuracy": 0.9 + r.round / 1000}) for r in run.rounds))
    markup = charts.learning_curves([run])
    assert markup.count("<h3") == 6
    assert data_of(markup, "places")[0] == ["1", "2", "3", "4"]
    assert data_of(markup, "places")[2] == ["2", "4", "6", "8"]
    assert data_of(markup, "values")[0] == [["90.1%"], ["90.2%"], ["90.3%"], ["90.4%"]]
    assert data_of(markup, "at")[1][0] > 0  # bytes begin at zero


@pytest.mark.parametrize(
    ("change", "passes"),
    [
        ({}, (True, False)),
        ({"local": 0.875}, (False, False)),
        ({"accuracy": 0.775}, (False, False)),
        ({"down": 150_000, "up": 135_000}, (True, True)),
        ({"down": 153_000, "up": 120_000}, (True, False)),
        ({"down": 120_000, "up": 138_000}, (True, False)),
    ],
)
def test_claims_look_at_both_accuracies_and_at_both_ways(change, passes):
    assert tuple(c.passes for c in claims(record(**change), record())) == passes


def test_claims_about_what_was_not_measured_fail():
    unknown = replace(record(), rounds=tuple(replace(r, metrics={}) for r in record().rounds))
    assert not claims(unknown, record())[0].passes
    assert not claims(record(), record(down=0))[1].passes


def test_the_best_round_is_named_beside_the_last():
    run = record()
    scores = {1: 0.6, 2: 0.9, 3: 0.9, 4: 0.8}
    rounds = tuple(replace(r, model=f"{r.round:064}", metrics={"accuracy": scores[r.round]}) for r in run.rounds)
    run = replace(run, rounds=rounds)
    head, *rows = final_rows([run, record("FedAvg")])
    best = [dict(zip(head, row, strict=True))["best global accuracy (round)"] for row in rows]
    assert best == ["90.0% (2)", "80.0% (1)"]
    figures = final_figures(run)
    assert (figures["best_round"], figures["best_global_accuracy"], figures["best_model"]) == (2, 0.9, f"{2:064}")
    unmeasured = replace(run, rounds=tuple(replace(r, metrics={}) for r in rounds))
    assert final_figures(unmeasured)["best_round"] is None


def covering_one(run):
    """The run, without one of its boards, which can't hold the whole model."""
    small = replace(run.devices[0], widths=(), excluded=f"no room.{WHOLE_HINT}")
    rounds = tuple(replace(row, local={"orin": row.local["orin"]}) for row in run.rounds)
    return replace(run, devices=(small, run.devices[1]), rounds=rounds)


def test_runs_are_marked_that_cover_fewer_boards_than_others(capsys):
    runs = [*(covering_one(seeded("fedavg", i, local=0.5)) for i in (0, 1)), *(seeded("ours", i) for i in (0, 1))]
    variants = group_by_seed(runs)
    for head, *rows in (final_rows(runs), variant_rows(variants)):
        assert [row[head.index("devices")] for row in rows[:: len(rows) - 1]] == ["1 of 2", "2 of 2"]
    assert "devices" not in final_rows(runs[2:])[0]
    assert [row["local_accuracy_delta"] for row in variant_figures(variants)] == [None, pytest.approx(0.4)]
    assert [r[1] for r in equal_cost_rows(with_coverage_marks(runs))[1:5:3]] == ["fedavg-0 (1 of 2 devices)", "ours-1"]
    print_remarks(runs, [], Path())
    assert capsys.readouterr().err.count("\n") == 1
    assert [name in tail_note(runs) for name in ("fedavg", "zero", "ours")] == [True, True, False]


def test_runs_without_limits_on_updates_are_named_below_the_results():
    jobs = {"free": Job(**NO_UPDATE_LIMITS), "limited": Job()}
    free, limited = (replace(record(name), job=job.to_dict()) for name, job in jobs.items())
    assert "free." in tail_note([free, limited, record()])
    assert "limits" not in tail_note([limited, record()])


def test_boards_that_plans_narrow_and_runs_without_plans_are_named_below_the_results():
    unplanned = replace(record("free"), job=Job(ignores_plans=True).to_dict())
    narrow = replace(record(), devices=tuple(replace(d, density=0.25, asked=1.0) for d in record().devices[:1]))
    notes = [tail_note(runs) for runs in ([unplanned, record()], [narrow, record()], [record()])]
    assert [("free" in note, "0.25" in note) for note in notes] == [(True, False), (False, True), (False, False)]


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = write_report(tmp_path, record(), record("FedAvg")).read_text()
    assert re.findall(r'(?:src|href)="([^"]{0,11})', page) == []
    assert {p.name for p in tmp_path.iterdir()} == {"report.html"}


def test_names_cannot_break_the_page(tmp_path):
    run = record(title="<script>alert(1)</script>")
    run = replace(run, devices=(replace(run.devices[0], excluded="a | <b>", widths=()), run.devices[1]))
    assert "alert(1)</script>" not in write_report(tmp_path, run).read_text()
    assert "a \\| <b>" in run_document(run).to_markdown()


def seeded(strategy, seed, **scores):
    """A run of a strategy with a seed."""
    return replace(record(f"{strategy}-{seed}", **scores), job=Job(strategy=strategy, seed=seed).to_dict())


def test_variants_have_means_and_differences_paired_by_seed():
    accuracies = {"fedavg": (0.5, 0.7, 0.9), "fedprox": (0.51, 0.73, 0.95)}
    runs = [seeded(name, i, accuracy=a) for name, values in accuracies.items() for i, a in enumerate(values)]
    variants = group_by_seed(random.sample(runs, len(runs)))
    first, second = variant_figures({name: variants[name] for name in accuracies})
    assert (first["runs"], first["global_accuracy"]) == (3, pytest.approx(0.7))
    assert first["global_accuracy_std"] == pytest.approx(0.2)
    assert first["global_accuracy_delta"] is None
    differences = np.array([0.01, 0.03, 0.05])
    half = stats.t.ppf(0.975, 2) * stats.sem(differences)
    assert second["global_accuracy_delta"] == pytest.approx(differences.mean())
    assert second["global_accuracy_delta_half"] == pytest.approx(half)
    head, _, row = variant_rows({name: variants[name] for name in accuracies})
    assert dict(zip(head, row, strict=True))["Δ global accuracy"] == f"+3.0 ± {100 * half:.1f}"


def test_variants_of_one_strategy_and_title_stay_apart():
    runs = [seeded("heterofl", seed) for seed in (0, 1)]
    runs += [replace(run, job={**run.job, "options": {"densities": [0.5]}}) for run in runs]
    assert list(group_by_seed(runs).values()) == [runs[:2], runs[2:]]


def test_runs_that_differ_in_more_than_their_seeds_are_no_variant():
    assert group_by_seed([seeded("fedavg", 0), seeded("fedprox", 1)]) == {}
    assert group_by_seed([seeded("fedavg", 0), seeded("fedavg", 0)]) == {}
    smaller = replace(seeded("fedavg", 1), devices=record().devices[:1])
    assert group_by_seed([seeded("fedavg", 0), smaller]) == {}


@pytest.mark.parametrize("degrees", [*range(1, 12), 30, 99])
def test_the_quantile_of_an_interval_is_scipy_s(degrees):
    assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-5)


def test_gains_are_those_over_training_alone_with_the_same_seed():
    runs = [seeded("local", 0, local=0.5), seeded("local", 1, local=0.91), seeded("fedavg", 1)]
    rounds = (*runs[2].rounds[:-1], replace(runs[2].rounds[-1], local={"orin": 0.95, "zero": 0.8}))
    runs[2] = replace(runs[2], rounds=rounds)
    assert board_gains(runs[2], runs) == pytest.approx({"zero": -0.09, "orin": 0.02})
    figures = final_figures(runs[2], runs)
    assert (figures["gain_over_local"], figures["gaining_boards"]) == (pytest.approx(-0.035), 1)
    head, *rows = final_rows(runs)
    row = dict(zip(head, rows[2], strict=True))
    assert (row["gain over local"], row["boards that gain"]) == ("−3.5", "1 of 2")
    gains = {row["device"]: row["gain_over_local"] for row in board_figures(runs) if row["run"] == "fedavg-1"}
    assert gains == board_gains(runs[2], runs)
    assert "| zero | 48.0% | 89.0% | 80.0% (−9.0) |" in comparison_document(runs).to_markdown()
    assert "gain_over_local" not in final_figures(runs[2], [runs[0], runs[2]])
    losses = [replace(run, job={**run.job, "recipe": {"loss": "mse", "metric": "loss"}}) for run in runs]
    assert board_gains(losses[2], losses) == pytest.approx({"zero": 0.09, "orin": -0.02})


def test_the_worst_board_and_the_deviation_over_boards_stand_beside_the_mean():
    run = asked_in_turn()
    assert run.worst_locals() == pytest.approx((0.2, 0.2, 0.4, 0.6))
    assert run.local_deviations() == pytest.approx((0, 0.1, 0.1, 0.1))
    figures = final_figures(run)
    assert figures["worst_local_accuracy"] == pytest.approx(0.35)
    assert figures["board_std"] == pytest.approx(0.075)
    losses = replace(run, job={"recipe": {"loss": "mse", "metric": "loss"}})
    assert losses.worst_locals() == pytest.approx((0.2, 0.4, 0.6, 0.8))


def test_a_device_serves_its_last_model_where_it_delivers_nothing():
    rounds = tuple(replace(r, spent={"orin": [1, 0, 0, 0], "zero": [1, 0, 0, 0]}) for r in asked_in_turn().rounds)
    rows = device_rows(replace(asked_in_turn(), rounds=rounds))
    served = [(row["round"], row["device"], row["local_accuracy"]) for row in rows]
    assert served == [
        (1, "orin", None), (1, "zero", 0.2), (2, "orin", 0.4), (2, "zero", 0.2),
        (3, "orin", 0.4), (3, "zero", 0.6), (4, "orin", 0.8), (4, "zero", 0.6),
    ]  # fmt: skip


@pytest.mark.parametrize(("suffix", "head"), [("svg", b"<?xml"), ("pdf", b"%PDF"), ("png", b"\x89PNG")])
def test_curves_are_drawn_for_papers(tmp_path, suffix, head):
    path = tmp_path / f"curve.{suffix}"
    assert save_figure([seeded("fedavg", 0), seeded("fedavg", 1), record("$x$")], path, "MB") == path
    assert path.read_bytes().startswith(head)


def test_a_figure_has_the_chosen_curves_under_their_labels_and_no_untrained_model(tmp_path):
    def texts(**settings):
        return re.findall("<!-- (.*) -->", save_figure(runs, tmp_path / "curve.svg", **settings).read_text())

    runs = [replace(seeded("a:mover", i, accuracy=0.5 + i / 10), title="mover") for i in (0, 1)]
    received = [replace(r, device_metrics={"accuracy_before": r.local}) for r in seeded("local", 0).rounds]
    runs += [replace(seeded("local", i), rounds=tuple(received)) for i in (0, 1)]
    every = texts()
    assert {"Global accuracy (%)", "Mean local accuracy (%)", "mover", "local", "1", "4"} <= set(every)
    assert not {"1.5", "2.5", "a:mover"} & set(every)
    alone = texts(labels={"local": "training alone"}, size=(3, 2))
    assert alone[-1] == "training alone"
    assert not {"Global accuracy (%)", "Local accuracy as received (%)", "mover"} & set(alone)
    assert 'width="216pt" height="144pt"' in (tmp_path / "curve.svg").read_text()


def test_tables_are_written_for_papers(tmp_path):
    run = replace(record("50% of_a & b"), ended_early="")
    lines = save_table([run], tmp_path / "table.tex").read_text().splitlines()
    while lines[0].startswith("% "):
        del lines[0]
    assert lines[0].startswith(r"\begin{tabular}{lrr")
    assert lines[1:4:2] == [r"\toprule", r"\midrule"]
    assert lines[4].startswith(r"50\% of\_a \& b & 4 & 8 & ")
    assert r"0.90 & 90.0\% & 80.0\% &" in lines[4]
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]
    assert len({line.count(" & ") for line in (lines[2], lines[4].replace(r"\&", ""))}) == 1
    runs = [seeded(n, i, accuracy=a) for n, a in (("fedavg", 0.8), ("fedprox", 0.9), ("local", 0.7)) for i in (0, 1)]
    text = save_table(runs, tmp_path / "variants.tex").read_text()
    assert r"10.0 $\pm$ 0.0" in text
    assert all(words in text for words in (r"% \usepackage{booktabs}", "over 2 seeds", "last 4 rounds", "95 %"))
    with save_table(runs, tmp_path / "variants.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["fedavg", "fedprox", "local"]
    assert [float(rows[1][key]) for key in ("bytes_up", "gain_over_local")] == [900_000, 0]
    assert [float(rows[1]["global_accuracy_delta"]), rows[2]["global_accuracy"]] == [pytest.approx(0.1), ""]


@pytest.mark.parametrize("change", [{"path": Path("x.doc")}, {"along": "h"}, {"labels": {"x": "y"}}, {"size": (3, 0)}])
def test_what_no_figure_has_is_refused_before_anything_is_written(tmp_path, monkeypatch, change):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        save_figure([record()], **{"path": Path("curve.svg"), **change})
    with pytest.raises(ConfigError):
        save_table([record()], Path("table.xls"))
    assert list(tmp_path.iterdir()) == []


def test_a_figure_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match="figures"):
        save_figure([record()], tmp_path / "curve.svg")
