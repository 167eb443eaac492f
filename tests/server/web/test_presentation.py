"""What pages show: plans, figures, rounds, times and sizes, in words."""

from __future__ import annotations

from typing import Any

from fedprune_server.web.views.presentation import charts, device_charts, local_measure


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
