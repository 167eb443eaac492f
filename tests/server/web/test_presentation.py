"""What pages show: plans, figures, rounds, times and sizes, in words."""

from __future__ import annotations

from typing import Any

from fedprune_server.web.views.formatting import action_text, ago, seconds, size
from fedprune_server.web.views.presentation import charts, device_charts, figures, local_measure, plan


def test_the_limit_that_binds_is_marked() -> None:
    limits = {n: {"name": n, "value": 30.0, "limit": 40.0, "unit": u} for n, u in (("memory", "bytes"), ("time", "s"))}
    shown = plan({"density": 0.5, "binding": "time", "limits": limits})
    assert shown is not None
    assert [(m["name"], m["used"], m["need"], m["binds"]) for m in shown["limits"]] == [
        ("memory", 0.75, "30 B", False), ("time", 0.75, "30.0 s", True),
    ]  # fmt: skip


def test_each_figure_is_said_in_its_unit_beside_what_was_measured() -> None:
    told = [("round", "s", 2.0, 3.0), ("memory", "bytes", 8e6, None), ("step_energy", "J", 0.25, None),
            ("latency", "s", None, 0.02), ("download", "bytes", 0.0, 5.0)]  # fmt: skip
    rows = figures({"figures": [dict(zip(("what", "unit", "predicted", "measured"), t, strict=True)) for t in told]})
    assert [(r["predicted"], r["measured"], r["ratio"]) for r in rows] == [
        ("2.00 s", "3.00 s", "1.50"), ("8.00 MB", "–", "–"), ("250 mJ", "–", "–"), ("–", "20.0 ms", "–"),
        ("0 B", "5 B", "–"),
    ]  # fmt: skip
    assert figures(None) == []


def _round(number: int, *, known: bool) -> dict[str, Any]:
    """A finished round, as a console has it of this start of its server, or (not all is known) of one before."""
    return {
        "round": number, "metrics": {"accuracy": 0.5}, "seconds": 2.0 if known else None, "staleness": None,
        "counted": 3 if known else None, "devices": 3 if known else None,
        "bytes_down": 1000 if known else None, "bytes_up": 900 if known else None,
    }  # fmt: skip


def test_rounds_of_an_earlier_start_whose_bytes_nobody_counted_are_drawn_without_them() -> None:
    names = [c.key for c in charts([_round(1, known=False), _round(2, known=False)])]
    assert names == ["metric-0"]
    names = [c.key for c in charts([_round(1, known=False), _round(2, known=True)])]
    assert names == ["metric-0", "updates", "bytes", "seconds"]


def test_numbers_are_said_in_units_that_keep_them_short() -> None:
    assert [size(n) for n in (0, 999, 1000, 999_600, 12_345_678, 2e12, None)] == [
        "0 B", "999 B", "1.00 kB", "1.00 MB", "12.3 MB", "2.00 TB", "–",
    ]  # fmt: skip
    assert [seconds(s) for s in (0, 2e-6, 0.0171, 1.5, 119, 320, 5000, 90000.0, 1e6)] == [
        "0 s", "2 µs", "17.1 ms", "1.50 s", "119 s", "5.3 min", "83 min", "25.0 h", "11.6 d",
    ]  # fmt: skip
    assert [ago(100, now) for now in (100, 112, 95, 400, 400_000)] == [
        "now",
        "12 s ago",
        "in 5 s",
        "5 min ago",
        "5 d ago",
    ]


def test_a_device_has_charts_of_what_it_measured_and_one_number_per_round() -> None:
    measured = {"accuracy_before": 0.5, "accuracy_after": 0.75, "train_seconds": 90.0, "peak_memory_bytes": 84e6}
    history = [{"round": n, "metrics": measured} for n in (3, 2)] + [{"round": 1, "metrics": {}}]
    drawn = {c.title: c for c in device_charts(history)}
    assert list(drawn) == ["Local accuracy", "Time of a round's training", "Peak memory"]
    assert [(c.name, c.values) for c in drawn["Local accuracy"].curves] == [
        ("received", ("50.0%", "50.0%")), ("trained", ("75.0%", "75.0%")),
    ]  # fmt: skip
    assert drawn["Peak memory"].curves[0].values == ("84.0 MB", "84.0 MB")
    assert [local_measure(h["metrics"]) for h in history] == ["75.0%", "75.0%", "–"]
    assert device_charts([]) == []


def test_the_audit_log_is_written_in_words() -> None:
    what = {"order": 1795359755375, "release": "release-12", "devices": ["attic", "yard"], "groups": [1]}
    assert (
        action_text({"action": "rollout_start", "what": what}) == "roll out release-12 to attic, yard in stages of 100%"
    )
    assert action_text({"action": "approve", "what": {"device": "barn", "key": "ab12"}}) == "approve barn with key ab12"
    assert action_text({"action": "pause", "what": {"job": "j", "reason": "lunch"}}) == "pause job j (lunch)"
    assert action_text({"action": "something_new", "what": {}}) == "something new"
