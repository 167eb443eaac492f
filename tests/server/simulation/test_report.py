"""Reports: every number is the record's, claims are judged by the numbers, pages need nothing else."""

import html
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.errors import StorageError
from fedprune_server.simulation import pictures
from fedprune_server.simulation.comparison import final_rows, print_comparison
from fedprune_server.simulation.pictures import channel_map
from fedprune_server.simulation.record import DeviceRow, Record, RoundRow, beside
from fedprune_server.simulation.report import (
    absences,
    claims,
    foresight_rows,
    plan_rows,
    summary,
    summary_text,
    write_report,
)
from fedprune_server.simulation.runs_progress import Following

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
            accuracy=accuracy,
            loss=0.5,
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


def test_record_without_a_round_makes_no_report(tmp_path):
    with pytest.raises(StorageError, match="no finished round"):
        write_report(tmp_path, replace(record(), rounds=()))


def test_final_accuracies_are_means_of_the_last_rounds():
    rows = record(rounds=4).rounds
    rows = tuple(replace(r, accuracy=r.round / 10, local={"zero": r.round / 20}) for r in rows)
    local, whole = replace(record(), rounds=rows).final(2)
    assert local == pytest.approx((3 / 20 + 4 / 20) / 2)
    assert whole == pytest.approx((3 / 10 + 4 / 10) / 2)


def test_what_nobody_measured_is_not_a_number():
    rows = tuple(replace(r, accuracy=None, local={}) for r in record().rounds)
    assert all(map(math.isnan, replace(record(), rounds=rows).final(3)))


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


def bars(run, reference, monkeypatch):
    """Heights and texts of the picture of devices' accuracies."""
    seen = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: seen.append(figure) or path)
    pictures.local_bars(run, reference, None)
    axis = seen[0].axes[0]
    found = [p.get_height() for p in axis.patches], sorted(t.get_text() for t in axis.texts)
    pictures.plt.close(seen[0])
    return found


def axes_of(draw, monkeypatch):
    """What a picture's axes are."""
    seen = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: seen.append(figure) or path)
    draw()
    return seen[0].axes


def test_curves_have_ticks_alike_and_no_round_0(monkeypatch):
    run = record(local=0.5)
    rounds = tuple(replace(r, accuracy=0.9 + r.round / 1000) for r in run.rounds)
    axes = axes_of(lambda: pictures.curves([replace(run, rounds=rounds)], None), monkeypatch)
    texts = [axis.yaxis.get_major_formatter()(value) for axis in axes[::3] for value in (0.5, 1.0)]
    assert len(axes) == 6
    assert texts == texts[:2] * 2
    assert axes[0].get_xlim()[0] > 0
    assert axes[1].get_xlim()[0] == 0
    pictures.plt.close(axes[0].figure)


@pytest.mark.parametrize(("kept", "rows"), [("after", ["As received"]), ("average", ["As received", "As trained"])])
def test_what_was_trained_has_curves_of_its_own_where_averages_serve(monkeypatch, kept, rows):
    own = {f"accuracy_{name}": {"zero": 0.5} for name in ("before", "after", kept)}
    runs = [record("plain"), replace(record(), rounds=tuple(replace(r, own=own) for r in record().rounds))]
    assert beside(runs) == ("before", "after")[: len(rows)]
    axes = axes_of(lambda: pictures.curves(runs, None), monkeypatch)
    assert [a.get_title(loc="left").partition(",")[0] for a in axes[::3]][1:] == ["What devices serve", *rows]
    columns = [c for c in final_rows(runs)[0] if c.startswith("local ")]
    assert columns == ["local accuracy", *(f"local {m}" for m in beside(runs))]
    pictures.plt.close(axes[0].figure)


@pytest.mark.parametrize("known", [{"zero": 0.5}, {"orin": 0.5}, {}])
def test_a_device_without_a_bar_has_room(monkeypatch, known):
    run = replace(record(), rounds=tuple(replace(r, local=known) for r in record().rounds))
    axis = axes_of(lambda: pictures.local_bars(run, None, None), monkeypatch)[0]
    assert axis.get_xlim() == pytest.approx((-0.6, 1.6))
    pictures.plt.close(axis.figure)


def test_bars_are_what_was_measured_last(monkeypatch):
    heights, texts = bars(asked_in_turn(), record(), monkeypatch)
    assert heights == pytest.approx([0.6, 0.8, 0.88, 0.92])
    assert texts == ["60", "80", "88", "92"]


def test_a_device_that_never_delivered_has_a_dash_instead_of_a_bar(monkeypatch):
    run = asked_in_turn()
    heights, texts = bars(replace(run, rounds=run.rounds[:1]), None, monkeypatch)
    assert (heights, texts) == ([0.2], ["20", "–"])


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
    ("local", "accuracy", "held"),
    [(0.9, 0.8, True), (0.885, 0.785, True), (0.95, 0.95, True), (0.875, 0.8, False), (0.9, 0.775, False)],
)
def test_accuracy_claim_looks_at_both_accuracies(local, accuracy, held):
    assert claims(record(local=local, accuracy=accuracy), record())[0].held is held


@pytest.mark.parametrize(
    ("down", "up", "held"), [(500_000, 450_000, True), (510_000, 400_000, False), (400_000, 460_000, False)]
)
def test_bytes_claim_looks_at_both_ways(down, up, held):
    assert claims(record(down=down, up=up), record())[1].held is held


def test_claims_about_what_was_not_measured_fail():
    unknown = replace(record(), rounds=tuple(replace(r, accuracy=None) for r in record().rounds))
    assert not claims(unknown, record())[0].held
    assert not claims(record(), record(down=0))[1].held


def test_summary_has_the_numbers_of_both_runs():
    cells = {row[0]: row[1:] for row in summary(record(down=480_000), record("FedAvg", accuracy=0.85))}
    assert cells["mean local accuracy, last 4 rounds"][:2] == ("90.0%", "90.0%")
    assert cells["global accuracy, last 4 rounds"] == ("80.0%", "85.0%", "-5.0 points")
    assert cells["MB down"] == ("0.48", "1.00", "-52%")


def test_summary_tells_means_and_the_last_round_apart():
    run = record(rounds=7)
    run = replace(run, rounds=tuple(replace(r, accuracy=r.round / 10) for r in run.rounds))
    cells = {row[0]: row[1:] for row in summary(run, record())}
    assert cells["global accuracy, last 5 rounds"] == ("50.0%", "80.0%", "-30.0 points")
    assert cells["global accuracy, last round"] == ("70.0%", "80.0%", "-10.0 points")
    assert cells["mean local accuracy, last round"] == ("90.0%", "90.0%", "+0.0 points")
    alone = {row[0]: row[1:] for row in summary(replace(run, rounds=run.rounds[:1]))}
    assert alone["global accuracy"] == ("10.0%",)
    assert "global accuracy, last round" not in alone


def test_bytes_are_compared_by_how_much_less_or_more_they_are():
    cells = {row[0]: row[1:] for row in summary(record(down=3, up=2, rounds=1), record(down=2, up=2, rounds=1))}
    assert cells["MB down"][-1] == "+50%"
    assert cells["MB up"][-1] == "+0%"
    assert {row[0]: row[-1] for row in summary(record(), record(down=0))}["MB down"] == "–"


def test_plan_table_has_a_row_per_device():
    rows = plan_rows(record())
    assert [r[0] for r in rows[1:]] == ["zero", "orin"]
    assert rows[1][1:] == ("raspberry-pi-zero-2w", "100", "0.500", "link", "4 · 12", "1,234", "88.0%")


def test_report_tells_the_same_numbers_as_html_and_markdown(tmp_path):
    report = write_report(tmp_path, record(), record("FedAvg", down=2_100_000, up=1_900_000))
    page = html.unescape(re.sub(r"<[^>]+>", " ", report.html.read_text()))
    markdown = report.markdown.read_text()
    for text in ("90.0%", "80.0%", "2.10", "48%", "1,234", "PASS", "raspberry-pi-zero-2w"):
        assert text in page
        assert text in markdown


def test_page_refers_to_nothing_outside_itself(tmp_path):
    page = write_report(tmp_path, record(), record("FedAvg")).html.read_text()
    assert set(re.findall(r'(?:src|href)="([^"]{0,11})', page)) == {"data:image/"}


def test_every_picture_is_written(tmp_path):
    report = write_report(tmp_path, record())
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in report.pictures.values())
    assert {p.name for p in report.pictures.values()} == {"curves.png", "bytes.png", "channels.png", "devices.png"}


def test_channel_map_colours_held_channels_only(tmp_path):
    """Half the channels held gives half the coloured area of all held."""
    import matplotlib.image

    def coloured(held):
        run = replace(record(), groups=(("only", 10),), channels={"zero": (held,)})
        image = matplotlib.image.imread(channel_map(run, tmp_path / "map.png"))[..., :3]
        return int(((image.max(axis=2) - image.min(axis=2)) > 0.3).sum())

    assert coloured(tuple(range(5))) == pytest.approx(coloured(tuple(range(10))) / 2, rel=0.05)


def test_names_cannot_break_the_page(tmp_path):
    run = record(title="<script>alert(1)</script>")
    run = replace(run, devices=(replace(run.devices[0], excluded="a | <b>", widths=()), run.devices[1]))
    report = write_report(tmp_path, run)
    assert "<script>" not in report.html.read_text()
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


def test_a_terminal_sees_that_a_simulation_is_prepared_from_its_first_moment_on(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = []
    monkeypatch.setattr("rich.status.Status.start", lambda self: shown.append(str(self.status)))
    with Following("yard"):
        assert shown == ["preparing yard"]
