"""Reports: every number is the record's, claims are judged by the numbers, pages need nothing else."""

import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.coordination import State
from fedprune.core.errors import StorageError
from fedprune.jobs.job import Job
from fedprune.model.recipe import Recipe
from fedprune_server.monitoring.round_rows import RoundRow
from fedprune_server.simulation.datasets.federation import DataPlan, Partition
from fedprune_server.simulation.results import charts, runs_progress
from fedprune_server.simulation.results.comparison import (
    EQUAL_COST,
    equal_cost_figures,
    equal_cost_rows,
    final_figures,
    final_rows,
    print_comparison,
    variant_figures,
    variant_rows,
    write_comparison,
)
from fedprune_server.simulation.results.record import DeviceRow, Record, also_measured
from fedprune_server.simulation.results.report import (
    absences,
    claims,
    foresight_rows,
    plan_rows,
    summary,
    summary_text,
    write_report,
)
from fedprune_server.simulation.results.runs_progress import RunDisplay

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
            at=2.0 * r,
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


@given(cut=st.integers(0, 500))
def test_cut_record_is_refused(cut):
    text = record().to_json()
    with pytest.raises(StorageError):
        Record.from_json(text[: min(cut, len(text) - 1)])


def private(*epsilons, delta=1e-5, **settings):
    """A private run that ends with the last of these ε."""
    run = record(rounds=len(epsilons), **settings)
    rows = [
        replace(row, measured={"epsilon": e, "epsilon_next": e + 1})
        for row, e in zip(run.rounds, epsilons, strict=True)
    ]
    job = {"privacy": {"delta": delta, "noise": "local"}}
    return replace(run, job=job, rounds=tuple(rows))


def test_the_privacy_cost_of_a_run_is_that_of_its_last_round_and_no_share():
    run = private(40.0, 50.0, 58.775)
    figures = final_figures(run)
    assert (figures["epsilon"], figures["delta"]) == (58.775, 1e-5)
    assert "epsilon_next" not in figures
    head, row, other = final_rows([run, record("open")])
    assert dict(zip(head, row, strict=True))["epsilon"] == "58.8"
    assert dict(zip(head, row, strict=True))["delta"] == "1e-05"
    assert dict(zip(head, other, strict=True))["epsilon"] == "–"
    assert dict(summary(run))["privacy"] == "ε 58.8 at δ 1e-05, local noise"
    page = html.unescape(charts.curves([run]))
    assert "Privacy cost: ε, by round" in page
    assert "58.77" in page
    assert "5877" not in page
    assert "Measured: epsilon" not in page


def test_a_run_without_privacy_has_no_figure_or_curve_of_it():
    run = record()
    assert "epsilon" not in final_figures(run)
    assert "epsilon" not in final_rows([run])[0]
    assert "Privacy cost" not in charts.curves([run])


def test_a_summary_counts_the_updates_that_limits_changed_and_names_the_limits():
    run = record(rounds=2)
    assert "updates limited" not in dict(summary(run))
    limited = replace(run, rounds=tuple(replace(r, updates=2, limited=r.round - 1) for r in run.rounds))
    assert dict(summary(limited))["updates limited"] == "1 of 4 (move_limit 1.5, weight_limit 1)"
    ours = replace(limited, job={"move_limit": 0.0, "weight_limit": 2.0})
    assert {row[0]: row[1:] for row in summary(ours, run)}["updates limited"][0] == "1 of 4 (weight_limit 2)"


def test_a_comparison_has_a_column_of_limited_updates_where_there_are_any():
    run = record(rounds=2)
    assert "updates limited" not in final_rows([run])[0]
    limited = replace(run, rounds=tuple(replace(r, updates=3, limited=r.round) for r in run.rounds))
    head, row, other = final_rows([limited, run])
    assert dict(zip(head, row, strict=True))["updates limited"] == "3 of 6"
    assert dict(zip(head, other, strict=True))["updates limited"] == "–"
    figures = final_figures(limited)
    assert (figures["updates_limited"], figures["updates"]) == (3, 6)


def spending(title, macs, down, seconds, accuracies):
    """A run whose rounds cost the same each; None is a round whose global model wasn't measured."""
    run = record(title, rounds=len(accuracies))
    rows = [
        replace(
            row,
            at=seconds * row.round,
            down=down * row.round,
            up=0,
            spent={"zero": [0, 0, macs, macs]},
            metrics={} if accuracy is None else {"accuracy": accuracy},
        )
        for row, accuracy in zip(run.rounds, accuracies, strict=True)
    ]
    return replace(run, rounds=tuple(rows))


def test_runs_are_compared_at_what_all_have_spent():
    dear = spending("dear", 10**12, 10**6, 10.0, [0.1, 0.2, 0.3])
    cheap = spending("cheap", 10**11, 10**5, 20.0, [0.4, 0.5, None, 0.7, 0.8])
    found = {(f["cost"], f["run"]): f for f in equal_cost_figures([dear, cheap])}
    read = {key: (f["amount"], f["round"], f["spent"], f["global_accuracy"]) for key, f in found.items()}
    assert read == {
        ("rounds", "dear"): (3, 3, 3, 0.3),
        ("rounds", "cheap"): (3, 2, 2, 0.5),  # its third round wasn't measured
        ("training_macs", "dear"): (5 * 10**11, None, None, None),  # its first round costs more
        ("training_macs", "cheap"): (5 * 10**11, 5, 5 * 10**11, 0.8),
        ("bytes", "dear"): (500_000, None, None, None),
        ("bytes", "cheap"): (500_000, 5, 500_000, 0.8),
        ("seconds", "dear"): (30.0, 3, 30.0, 0.3),
        ("seconds", "cheap"): (30.0, 1, 20.0, 0.4),
    }
    assert found["rounds", "cheap"]["local_accuracy"] == pytest.approx(0.9)
    rows = equal_cost_rows([dear, cheap])
    assert rows[2] == ("3 rounds", "cheap", "2", "2 rounds", "90.0%", "50.0%")
    assert rows[3] == ("0.5 TMACs", "dear", "none", "–", "–", "–")


def test_a_cost_that_a_run_did_not_count_is_not_compared():
    counted, uncounted = spending("a", 5, 0, 1.0, [0.1]), spending("b", 0, 0, 1.0, [0.1])
    assert {f["cost"] for f in equal_cost_figures([counted, uncounted])} == {"rounds", "seconds"}


def test_a_comparison_has_a_table_at_equal_cost_for_several_runs(tmp_path, capsys):
    runs = [spending("a", 1, 1, 1.0, [0.1]), spending("b", 1, 1, 2.0, [0.2])]
    print_comparison(runs)
    page = write_comparison(tmp_path, runs)
    for text in (capsys.readouterr().out, page.read_text(), page.with_suffix(".md").read_text()):
        assert EQUAL_COST in html.unescape(text)
    print_comparison(runs[:1])
    assert EQUAL_COST not in capsys.readouterr().out


def test_a_run_that_ended_early_says_so_and_why(tmp_path):
    said = "ended after round 2 of 4: the strategy ended the job"
    run = replace(record(rounds=2), job={"rounds": 4}, ended_early=said)
    assert final_figures(run)["ended_early"] == said
    assert dict(summary(run))["rounds"] == "2 of 4"
    assert dict(zip(*final_rows([run]), strict=True))["rounds"] == "2 of 4"
    assert said in summary_text(run).splitlines()
    report = write_report(tmp_path, run)
    for page in (report.markdown, report.html):
        assert f"The run {said}. " in html.unescape(page.read_text())


def test_a_run_of_all_its_rounds_did_not_end_early(tmp_path):
    run = replace(record(rounds=2), job={"rounds": 2})
    assert final_figures(run)["ended_early"] is None
    assert dict(summary(run))["rounds"] == "2"
    assert "ended after" not in summary_text(run) + write_report(tmp_path, run).markdown.read_text()


def test_a_private_run_withholds_local_figures_and_says_so(tmp_path):
    run = private(5.0, 7.0)
    silent = replace(run, rounds=tuple(replace(r, local={}) for r in run.rounds))
    assert dict(summary(silent))["mean local accuracy, last 2 rounds"] == "withheld"
    page = write_report(tmp_path, silent).markdown.read_text()
    assert "Local accuracy is withheld: devices of a private job report nothing" in page
    assert "0 of 2 devices" not in page + summary_text(silent)


def test_a_head_says_how_the_data_were_dealt(tmp_path):
    plan = DataPlan("somewhere/clothes.npz", devices=20, alpha=0.1, most=6000, pool=2, size=(14, 14))
    run = replace(record(), partition=Partition("clothes", settings=plan.settings()))
    told = "clothes, devices 20, partition dirichlet, alpha 0.1, most 6000, pool 2, size [14, 14]"
    assert run.facts()["Data"] == told
    run.save(tmp_path / "metrics.json")
    assert Record.load(tmp_path / "metrics.json").facts()["Data"] == told
    iid = Partition("clothes", settings=DataPlan("clothes", devices=2, partition="iid").settings())
    assert iid.described == "clothes, devices 2, partition iid"
    assert Partition("digits").described == "digits"


def test_record_without_a_round_makes_no_report(tmp_path):
    with pytest.raises(StorageError, match="no finished round"):
        write_report(tmp_path, replace(record(), rounds=()))


def test_final_accuracies_are_means_of_the_last_rounds():
    rows = record(rounds=4).rounds
    rows = tuple(replace(r, metrics={"accuracy": r.round / 10}, local={"zero": r.round / 20}) for r in rows)
    local, whole = replace(record(), rounds=rows).final(2)
    assert local == pytest.approx((3 / 20 + 4 / 20) / 2)
    assert whole == pytest.approx((3 / 10 + 4 / 10) / 2)
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


def test_a_mean_over_some_devices_says_so(tmp_path):
    run = asked_in_turn()
    run = replace(run, rounds=run.rounds[:1])
    assert summary(run)[1] == ("mean local accuracy", "20.0% (1 of 2 devices)")
    assert summary(record())[1] == ("mean local accuracy, last 4 rounds", "90.0%")
    assert "over the 1 of 2 devices that delivered" in write_report(tmp_path, run).markdown.read_text()


class Shown(HTMLParser):
    """Bars of a page: per list its rows' names, notes and lengths."""

    def __init__(self, markup):
        super().__init__()
        self.lists = {}
        self.titles = []
        self._list = self._field = None
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "ul" and found.get("class", "").startswith("bars"):
            self._list = self.lists.setdefault(found["aria-label"], [])
        elif tag == "li" and self._list is not None:
            self._list.append({"name": "", "note": "", "rects": []})
        elif tag == "span" and found.get("class") in ("name", "note"):
            self._field = found["class"]
        elif tag == "rect" and self._list:
            self._list[-1]["rects"].append((found["class"], float(found["x"]), float(found["width"])))
        elif tag == "h3":
            self._field = "title"

    def handle_endtag(self, tag):
        self._field = None
        if tag == "ul":
            self._list = None

    def handle_data(self, data):
        if self._field == "title":
            self.titles.append(data)
        elif self._field and self._list:
            self._list[-1][self._field] += data


def local_bars(run, reference):
    rows = Shown(charts.devices(run, reference)).lists["Local accuracy of each device"]
    return [r["rects"][0][2] / 1000 for r in rows], [r["note"] for r in rows]


def data_of(markup, name):
    """Per chart what its attribute says."""
    return [json.loads(html.unescape(v)) for v in re.findall(rf'data-{name}="([^"]*)"', markup)]


def test_curves_hold_the_records_values_along_rounds_bytes_and_seconds():
    run = record(local=0.5)
    run = replace(run, rounds=tuple(replace(r, metrics={"accuracy": 0.9 + r.round / 1000}) for r in run.rounds))
    markup = charts.curves([run])
    assert len(Shown(markup).titles) == 6
    assert data_of(markup, "places")[0] == ["1", "2", "3", "4"]
    assert data_of(markup, "places")[2] == ["2", "4", "6", "8"]
    assert data_of(markup, "values")[0] == [["90.1%"], ["90.2%"], ["90.3%"], ["90.4%"]]
    assert data_of(markup, "at")[1][0] > 0  # bytes begin at zero


def test_runs_of_other_lengths_keep_their_own_seconds():
    quick = replace(record("quick"), rounds=tuple(replace(r, at=r.at / 2) for r in record().rounds))
    seconds = data_of(charts.curves([record("slow"), quick]), "values")[2]
    places = data_of(charts.curves([record("slow"), quick]), "places")[2]
    assert places == ["1", "2", "3", "4", "6", "8"]
    assert [row[0] for row in seconds] == ["", "80.0%", "", "80.0%", "80.0%", "80.0%"]
    assert [row[1] for row in seconds] == ["80.0%"] * 4 + [""] * 2


@pytest.mark.parametrize(("kept", "rows"), [("after", ["received"]), ("average", ["received", "trained"])])
def test_what_was_trained_has_curves_of_its_own_where_averages_serve(kept, rows):
    own = {f"accuracy_{name}": {"zero": 0.5} for name in ("before", "after", kept)}
    runs = [record("plain"), replace(record(), rounds=tuple(replace(r, own=own) for r in record().rounds))]
    assert also_measured(runs) == ("before", "after")[: len(rows)]
    titles = [t.partition(", by")[0] for t in Shown(charts.curves(runs)).titles[::3]]
    assert titles == ["Global accuracy", "Mean local accuracy", *(f"Local accuracy as {r}" for r in rows)]
    columns = [c for c in final_rows(runs)[0] if c.startswith("local ")]
    assert columns == ["local accuracy", *(f"local {m}" for m in also_measured(runs))]


def test_a_run_that_serves_what_it_trained_has_no_dash_where_others_keep_averages():
    own = {f"accuracy_{name}": {"zero": 0.5} for name in ("before", "after")}
    plain = replace(record("plain"), rounds=tuple(replace(r, own=own) for r in record().rounds))
    averages = {**own, "accuracy_average": {"zero": 0.7}}
    head, _, row = final_rows(
        [replace(record(), rounds=tuple(replace(r, own=averages) for r in record().rounds)), plain]
    )
    assert row[head.index("local after")] == "50.0%"


def test_bars_are_what_was_measured_last_and_a_dash_is_for_never():
    lengths, notes = local_bars(asked_in_turn(), record())
    assert lengths == pytest.approx([0.6, 0.88, 0.8, 0.92])
    assert notes == ["60.0%", "88.0%", "80.0%", "92.0%"]
    first = replace(asked_in_turn(), rounds=asked_in_turn().rounds[:1])
    assert sorted(zip(*local_bars(first, None), strict=True)) == [(0.0, "–"), (0.2, "20.0%")]


def test_a_fleet_of_a_hundred_has_a_row_per_device_and_can_be_searched(tmp_path):
    names = [f"board-{i:03}" for i in range(100)]
    devices = tuple(replace(record().devices[0], name=n) for n in names)
    rounds = tuple(replace(r, local=dict.fromkeys(names, 0.5)) for r in record().rounds)
    channels = dict.fromkeys(names, ((0, 1), (5,)))
    run = replace(record(), devices=devices, rounds=rounds, channels=channels)
    text = write_report(tmp_path, run).html.read_text()
    shown = Shown(text)
    for label in ("Local accuracy of each device", "Channels that each device holds"):
        assert [r["name"].partition(" ")[0] for r in shown.lists[label]] == names
    assert sum(r["note"] == "100 devices" for r in shown.lists["Devices by local accuracy"]) == 1
    assert text.count('type="search"') >= 4
    assert all(f">{n}</button>" in text for n in names)  # the legend


def test_terminal_tells_what_the_report_tells():
    text = summary_text(record(), record("FedAvg", accuracy=0.9))
    for row in summary(record(), record("FedAvg", accuracy=0.9)):
        assert re.search(r" +".join(map(re.escape, filter(None, row))), text)
    assert "\nFAIL: mean local and global accuracy" in text
    assert "FAIL" not in summary_text(record())
    assert len({len(line) for line in text.split("\n\n")[0].splitlines()[:3]}) == 1


@pytest.mark.parametrize(("local", "held"), [(0.9, True), (0.944, True), (0.96, False), (0.5, True)])
def test_loss_claim_looks_at_the_share_by_which_it_is_worse(local, held):
    job = {"recipe": {"loss": "mse"}}
    claim = claims(replace(record(local=local), job=job), replace(record(), job=job))[0]
    assert claim.held is held
    assert claim.text == "mean local and global loss at most 5% above fleet"
    assert claim.measured == f"local {local / 0.9 - 1:+.1%}, global +0.0%"


@pytest.mark.parametrize(
    ("change", "held"),
    [
        ({}, (True, False)),
        ({"local": 0.885, "accuracy": 0.785}, (True, False)),
        ({"local": 0.95, "accuracy": 0.95}, (True, False)),
        ({"local": 0.875}, (False, False)),
        ({"accuracy": 0.775}, (False, False)),
        ({"down": 150_000, "up": 135_000}, (True, True)),
        ({"down": 153_000, "up": 120_000}, (True, False)),
        ({"down": 120_000, "up": 138_000}, (True, False)),
    ],
)
def test_claims_look_at_both_accuracies_and_at_both_ways(change, held):
    assert tuple(c.held for c in claims(record(**change), record())) == held


def test_claims_about_what_was_not_measured_fail():
    unknown = replace(record(), rounds=tuple(replace(r, metrics={}) for r in record().rounds))
    assert not claims(unknown, record())[0].held
    assert not claims(record(), record(down=0))[1].held


def test_summary_has_the_numbers_of_both_runs():
    cells = {row[0]: row[1:] for row in summary(record(down=480_000), record("FedAvg", accuracy=0.85))}
    assert cells["mean local accuracy, last 4 rounds"][:2] == ("90.0%", "90.0%")
    assert cells["global accuracy, last 4 rounds"] == ("80.0%", "85.0%", "-5.0 points")
    assert cells["MB down"] == ("0.48", "1.00", "-52%")
    bytes_of = {row[0]: row[1:] for row in summary(record(down=3, up=2, rounds=1), record(down=2, up=2, rounds=1))}
    assert (bytes_of["MB down"][-1], bytes_of["MB up"][-1]) == ("+50%", "+0%")
    assert {row[0]: row[-1] for row in summary(record(), record(down=0))}["MB down"] == "–"


def test_summary_tells_means_and_the_last_round_apart():
    run = record(rounds=7)
    run = replace(run, rounds=tuple(replace(r, metrics={"accuracy": r.round / 10}) for r in run.rounds))
    cells = {row[0]: row[1:] for row in summary(run, record())}
    assert cells["global accuracy, last 5 rounds"] == ("50.0%", "80.0%", "-30.0 points")
    assert cells["global accuracy, last round"] == ("70.0%", "80.0%", "-10.0 points")
    assert cells["mean local accuracy, last round"] == ("90.0%", "90.0%", "+0.0 points")
    alone = {row[0]: row[1:] for row in summary(replace(run, rounds=run.rounds[:1]))}
    assert alone["global accuracy"] == ("10.0%",)
    assert "global accuracy, last round" not in alone


def test_the_best_round_is_named_beside_the_last(tmp_path):
    run = record()
    scores = {1: 0.6, 2: 0.9, 3: 0.9, 4: 0.8}
    rounds = tuple(replace(r, model=f"{r.round:064}", metrics={"accuracy": scores[r.round]}) for r in run.rounds)
    run = replace(run, rounds=rounds)
    assert dict(summary(run))["best global accuracy (round)"] == "90.0% (2)"
    cells = {row[0]: row[1:] for row in summary(run, record("FedAvg"))}
    assert cells["best global accuracy (round)"] == ("90.0% (2)", "80.0% (1)", "+10.0 points")
    figures = final_figures(run)
    assert (figures["best_round"], figures["best_global_accuracy"], figures["best_model"]) == (2, 0.9, f"{2:064}")
    silent = replace(run, rounds=tuple(replace(r, metrics={}) for r in rounds))
    assert final_figures(silent)["best_round"] is None
    assert dict(summary(silent))["best global accuracy (round)"] == "–"


def test_a_report_has_the_scores_of_each_round_on_both_sides(tmp_path):
    own = [{"accuracy_before": {"zero": r / 10}, "accuracy_after": {"zero": r / 5}} for r in range(1, 5)]
    run = replace(record(), rounds=tuple(replace(r, own=o) for r, o in zip(record().rounds, own, strict=True)))
    page = write_report(tmp_path, run).markdown.read_text()
    assert "| round | global accuracy | local accuracy as received | local accuracy as trained |" in page
    assert "| 3 | 80.0% | 30.0% | 60.0% |" in page


def test_plan_table_has_a_row_per_device():
    rows = plan_rows(record())
    assert [r[0] for r in rows[1:]] == ["zero", "orin"]
    assert rows[1][1:] == ("raspberry-pi-zero-2w", "100", "0.500", "link", "4 · 12", "1,234", "88.0%")


def test_plan_table_has_units_and_energy_where_devices_have_them(tmp_path):
    zero, orin = record().devices
    orin = replace(orin, unit="GPU", train_j=0.25, warning="energy isn't limited.")
    run = replace(record(), devices=(replace(zero, unit="CPU"), orin))
    cells = [dict(zip(plan_rows(run)[0], row, strict=True)) for row in plan_rows(run)[1:]]
    assert [(c["trains on"], c["energy a round"]) for c in cells] == [("CPU", "–"), ("GPU", "250 mJ")]
    assert "- orin: energy isn't limited." in write_report(tmp_path, run).markdown.read_text()
    assert "trains on" not in plan_rows(replace(run, devices=(replace(zero, unit="CPU"),)))[0]


def test_report_tells_the_same_numbers_as_html_and_markdown(tmp_path):
    report = write_report(tmp_path, record(), record("FedAvg", down=2_100_000, up=1_900_000))
    page = html.unescape(re.sub(r"<[^>]+>", " ", report.html.read_text()))
    markdown = report.markdown.read_text()
    for text in ("90.0%", "80.0%", "2.10", "48%", "1,234", "PASS", "raspberry-pi-zero-2w"):
        assert text in page
        assert text in markdown


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = write_report(tmp_path, record(), record("FedAvg")).html.read_text()
    assert re.findall(r'(?:src|href)="([^"]{0,11})', page) == []
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "report.md"}


def test_the_header_names_strategy_data_recipe_seed_and_version(tmp_path):
    job = Job(strategy="fedavg", seed=7, recipe=Recipe(epochs=3, lr=0.125, batch_size=16)).to_dict()
    run = replace(record(), job=job, partition=Partition("cifar10"), version="1.2.3")
    page = re.sub(r"<[^>]+>", " ", write_report(tmp_path, run).html.read_text())
    words = " ".join(page.split())
    for fact in ("Strategy fedavg", "Data cifar10", "Seed 7", "fedprune 1.2.3", "Devices 2", "Rounds 4"):
        assert fact in words
    assert "learning rate 0.125, batch size 16, 3 epochs" in words


def test_the_data_of_the_devices_is_drawn(tmp_path):
    partition = Partition("pets", ("cat", "dog"), {"zero": (4, 0), "orin": (2, 4)})
    run = replace(record(), partition=partition)
    rows = Shown(write_report(tmp_path, run).html.read_text()).lists["Samples per device and class"]
    assert [(r["name"], r["note"]) for r in rows] == [("zero", "4 samples"), ("orin", "6 samples")]
    assert [[c for c, *_ in r["rects"]] for r in rows] == [["h10", "h0"], ["h5", "h10"]]
    run.save(tmp_path / "metrics.json")
    assert Record.load(tmp_path / "metrics.json") == run


def test_held_channels_are_filled_where_they_are():
    run = replace(record(), groups=(("only", 10),), channels={"zero": ((0, 1, 2, 9),)})
    (row,) = Shown(charts.channel_map(run)).lists["Channels that each device holds"]
    assert row["note"] == "4 of 10 channels"
    assert row["rects"] == [("h10", 0, 3), ("h0", 3, 6), ("h10", 9, 1)]


def test_names_cannot_break_the_page(tmp_path):
    run = record(title="<script>alert(1)</script>")
    run = replace(run, devices=(replace(run.devices[0], excluded="a | <b>", widths=()), run.devices[1]))
    report = write_report(tmp_path, run)
    assert "alert(1)</script>" not in report.html.read_text()
    assert "a \\| <b>" in report.markdown.read_text()


def test_columns_in_which_nothing_is_known_are_left_out(tmp_path):
    assert "why not" not in write_report(tmp_path, record()).markdown.read_text()
    assert "off by" not in write_report(tmp_path, record()).markdown.read_text()
    devices = tuple(replace(d, compared={"step_seconds": (0.5, None)}) for d in record().devices)
    rows = foresight_rows(replace(record(), devices=devices))
    assert rows == [("device", "step predicted"), ("zero", "500 ms"), ("orin", "500 ms")]


def test_a_device_without_an_update_has_its_reason():
    zero, orin = record().devices
    rounds = tuple(replace(r, local={"orin": 0.9}) for r in record().rounds)
    run = replace(record(), devices=(replace(zero, missed=3, why="a label"), replace(orin, missed=1)), rounds=rounds)
    rows = plan_rows(run)
    assert rows[0][-1] == "why not"
    assert [r[-1] for r in rows[1:]] == ["no update in 3 of 4 rounds, lastly: a label", "no update in 1 of 4 rounds"]
    assert absences(run) == ["zero: no update in 3 of 4 rounds, lastly: a label"]
    assert absences(record()) == []
    assert summary_text(run).endswith("\n\nzero: no update in 3 of 4 rounds, lastly: a label")
    many = tuple(replace(zero, name=f"d{i}", missed=1, why="late") for i in range(13))
    assert absences(replace(run, devices=many))[-1] == "and 3 more devices"


def test_variants_have_the_mean_and_the_deviation_of_their_runs():
    variants = {"a": [record(accuracy=0.7), record(accuracy=0.8), record(accuracy=0.9)], "b": [record(accuracy=0.5)]}
    first, second = variant_figures(variants)
    assert (first["runs"], first["global_accuracy"]) == (3, pytest.approx(0.8))
    assert first["global_accuracy_std"] == pytest.approx(0.1)
    assert second["global_accuracy_std"] is None
    rows = variant_rows(variants)
    assert rows[0] == ("variant", "runs", "local accuracy", "global accuracy")
    assert rows[1] == ("a", "3", "90.0% ± 0.0%", "80.0% ± 10.0%")
    assert rows[2] == ("b", "1", "90.0%", "50.0%")


def test_a_comparison_is_markdown_in_a_pipe_and_a_fitted_table_on_a_terminal(capsys, monkeypatch):
    runs = [record("fleet"), record("another")]
    print_comparison(runs, (0.5,))
    assert capsys.readouterr().out.startswith("| run | rounds | seconds |")

    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    print_comparison(runs, (0.5,))
    out = capsys.readouterr().out
    assert "|" not in out
    assert "…" not in out
    assert "local" in out
    assert "training TMACs" in out  # a column, or among those that are named as left out


def test_a_pipe_gets_a_line_now_and_then(monkeypatch, capsys):
    job = Job(name="yard", rounds=3)
    state = State(model="0" * 64, history=[{"metrics": {"accuracy": 0.5}}], round=1)
    simulation = SimpleNamespace(state=state, job=job)
    with RunDisplay("yard") as display:
        display.begin(simulation)
        display.show(simulation)
        assert "are done" not in capsys.readouterr().err, "so soon"
        monkeypatch.setattr(runs_progress, "LINE_S", 0.0)
        display.show(simulation)
    assert "yard: 1 of 3 rounds are done, accuracy 50.0%\n" in capsys.readouterr().err


def test_a_bar_of_rounds_has_their_rate():
    rate = runs_progress._Rate()
    assert rate.render(SimpleNamespace(speed=0.5)).plain == "30/min"
    assert rate.render(SimpleNamespace(speed=None)).plain == ""  # before the second round


def test_a_terminal_sees_that_a_simulation_is_prepared_from_its_first_moment_on(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = []
    monkeypatch.setattr("rich.status.Status.start", lambda self: shown.append(str(self.status)))
    with RunDisplay("yard"):
        assert shown == ["preparing yard"]
