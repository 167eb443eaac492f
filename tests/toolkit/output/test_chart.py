"""Layout and markup of charts, compared with what they were given."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedprune.output.chart import HEIGHT, MAX_CURVE_POINTS, WIDTH, coverage_strip, lay_out_chart
from fedprune.output.chart_html import chart_html

# As ever, but on a busy machine the first example may take its time.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
VALUES = st.lists(st.none() | st.floats(allow_nan=True, allow_infinity=True), min_size=1, max_size=40)


@patient
@given(VALUES, st.integers(0, 10**6), st.booleans())
def test_every_point_lies_in_the_plot_and_axes_hold_all_values(
    values: list[float | None], first: int, from_zero: bool
) -> None:
    x_values = [float(first + i) for i in range(len(values))]
    drawn = lay_out_chart("k", "A title", x_values, {"a": values}, "{:.6g}".format, from_zero=from_zero)
    plottable = [v for v in values if v is not None and abs(v) < 1e30]
    if not plottable:
        assert drawn is None
        return
    assert drawn is not None
    (curve,) = drawn.curves
    points = [p for path in curve.paths for p in path.split()] + [d[1:-2] for d in curve.dots]
    assert len(points) == len(plottable) == sum(map(bool, curve.values))
    for point in points:
        x, y = map(float, point.split(","))
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert len(drawn.table_rows) == len(drawn.positions) == len(values)


def test_runs_of_unlike_costs_are_named_with_the_cost_of_each() -> None:
    series = {"a": [0.25, 0.5, None], "b": [None, 0.5, 0.75]}
    drawn = lay_out_chart("k", "A title", [1.0, 2.0, 9.0], series, "{:.2f}".format, x_title="MB", is_amount_axis=True)
    assert drawn is not None
    assert f"a 0.50 ({drawn.positions[1]} MB), b 0.75 ({drawn.positions[2]} MB)<" in chart_html(drawn)


def test_a_long_curve_is_thinned_and_keeps_its_end() -> None:
    many = [float(i) for i in range(2000)]
    drawn = lay_out_chart("k", "t", many, {"a": many}, str)
    assert drawn is not None
    assert len(drawn.positions) <= MAX_CURVE_POINTS
    assert drawn.positions[-1] == "1,999"
    assert drawn.curves[0].values[-1] == "1999.0"


@patient
@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), max_size=12), st.integers(0, 40))
def test_a_strip_holds_its_channels_once(channel_shares: list[tuple[int, float]], channels: int) -> None:
    drawn = coverage_strip("g", channels, [{"channels": n, "share": s} for n, s in channel_shares])
    shares = [s for n, s in channel_shares for _ in range(n)][:channels]
    levels = [run.level for run in drawn.runs for _ in range(run.width)]
    assert levels == [math.ceil(s * 10 - 1e-9) if s > 1e-9 else int(s > 0) for s in shares]
    assert drawn.min_share == min(shares, default=0.0)
    assert drawn.mean == pytest.approx(sum(shares) / len(shares) if shares else 0.0)
