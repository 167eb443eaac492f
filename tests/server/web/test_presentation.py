"""What pages show: plans, figures, rounds, times and sizes, in words."""

from typing import Any

from fedprune_server.web.views.presentation import job_charts


def _round(number: int, *, is_known: bool) -> dict[str, Any]:
    """A finished round, as a console has it of this start of its server, or (not all is known) of one before."""
    return {
        "round": number, "metrics": {"accuracy": 0.5}, "seconds": 2.0 if is_known else None, "staleness": None,
        "counted": 3 if is_known else None, "devices": 3 if is_known else None,
        "bytes_down": 1000 if is_known else None, "bytes_up": 900 if is_known else None,
    }  # fmt: skip


def test_rounds_of_an_earlier_start_whose_bytes_nobody_counted_are_drawn_without_them() -> None:
    names = [c.key for c in job_charts([_round(1, is_known=False), _round(2, is_known=False)])]
    assert names == ["metric-0"]
    names = [c.key for c in job_charts([_round(1, is_known=False), _round(2, is_known=True)])]
    assert names == ["metric-0", "updates", "bytes", "seconds"]
