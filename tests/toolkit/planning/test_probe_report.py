"""Probe reports come over the network: they are checked, never trusted."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProfileError
from fedprune.planning.probe_report import _LIMITS, MOST_SHAPES, NAMES, FormTimes, ProbeReport, Shape

pytestmark = pytest.mark.board

REPORT = ProbeReport(
    cores=4,
    memory_total=1_900_000_000,
    memory_available=1_500_000_000,
    seconds=3.2,
    onnxruntime="1.31.1",
    board="Raspberry Pi 4 Model B Rev 1.5",
    clock_hz=1_800_000_000,
    train_rate=1.1e10,
    infer_rate=1.4e10,
    temperature_c=61.5,
    throttled=False,
    forms=FormTimes(((Shape(3, 1, 32, 32, 256), (("forward.plain", 1e-3),)),)),
)


def test_a_report_survives_json_types() -> None:
    assert ProbeReport.from_dict(REPORT.to_dict()) == REPORT


@pytest.mark.parametrize("block", [0, 4, 8, 16])
def test_blocks_are_what_processors_have(block: int) -> None:
    assert ProbeReport.from_dict({**REPORT.to_dict(), "block": block}).block == block


def test_an_older_board_has_no_blocks() -> None:
    body = REPORT.to_dict()
    del body["block"]
    assert ProbeReport.from_dict(body).block == 0


def test_keys_of_newer_probes_are_ignored() -> None:
    assert ProbeReport.from_dict({**REPORT.to_dict(), "colour": "green"}) == REPORT


@pytest.mark.parametrize("name", ["clock_hz", "train_rate", "infer_rate", "temperature_c"])
def test_what_was_not_measured_is_none(name: str) -> None:
    assert getattr(ProbeReport.from_dict({**REPORT.to_dict(), name: None}), name) is None


@pytest.mark.parametrize("name", ["cores", "memory_total", "memory_available", "seconds"])
def test_a_missing_measurement_is_named(name: str) -> None:
    body = REPORT.to_dict()
    del body[name]
    with pytest.raises(ProfileError, match=f"{name} is missing"):
        ProbeReport.from_dict(body)


def refused(name: str) -> list[Any]:
    """Values on the other side of each limit of a measurement."""
    whole, low, high, optional = _LIMITS[name]
    wrong = [low - 1, 2 * high + 1, math.nan, math.inf, 10**400, "much", True, [1]]
    return wrong + ([low + 0.5] if whole else []) + ([] if optional else [None])


BAD: list[tuple[str, Any]] = [(name, value) for name in _LIMITS for value in refused(name)]
BAD += [("memory_available", 2_000_000_000), ("throttled", 1), ("onnxruntime", 1.31), ("board", None)]
BAD += [("board", "x" * 201), *(("block", value) for value in (1, 12, True, 16.0, "16", None))]


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_measurement_is_named(name: str, value: Any) -> None:
    with pytest.raises(ProfileError, match=f"probe report: {name}"):
        ProbeReport.from_dict({**REPORT.to_dict(), name: value})


@pytest.mark.parametrize("body", [None, [], "report", 4])
def test_what_is_no_table_is_refused(body: object) -> None:
    with pytest.raises(ProfileError, match="table"):
        ProbeReport.from_dict(body)


def test_a_report_is_checked_where_it_is_made() -> None:
    with pytest.raises(ProfileError, match="cores"):
        replace(REPORT, cores=-1)


@given(st.sampled_from(sorted(REPORT.to_dict())), st.none() | st.integers() | st.floats() | st.text() | st.booleans())
@settings(max_examples=100, deadline=None)
def test_any_value_is_refused_or_kept(name: str, value: Any) -> None:
    try:
        report = ProbeReport.from_dict({**REPORT.to_dict(), name: value})
    except ProfileError:
        return
    assert ProbeReport.from_dict(report.to_dict()) == report


shapes = st.builds(
    Shape,
    st.integers(1, 7),
    st.integers(1, 3),
    st.integers(1, 2048),
    st.integers(1, 2048),
    st.integers(1, 2**16),
    st.booleans(),
)
seconds = st.floats(1e-9, 1e3)
times = st.dictionaries(st.sampled_from(NAMES), seconds).map(lambda d: tuple(d.items()))
tables = st.lists(st.tuples(shapes, times), max_size=8).map(lambda rows: FormTimes(tuple(rows)))


@given(tables)
def test_a_table_survives_json(table: FormTimes) -> None:
    assert FormTimes.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert hash(FormTimes.from_dict(table.to_dict())) == hash(table)


@given(tables, shapes)
def test_what_is_near_is_the_nearest_of_its_kind(table: FormTimes, shape: Shape) -> None:
    found = table.near(shape)

    distances = [shape.distance(s) for s, _ in table.rows]
    nearest = min(distances, default=math.inf)
    if nearest > 2.5:
        assert not found
    else:
        assert dict(table.rows[distances.index(nearest)][1]) == found


def test_distances_are_doublings_and_windows_are_told_apart() -> None:
    one = Shape(3, 1, 32, 64, 256)

    assert one.distance(one) == 0
    assert one.distance(Shape(3, 1, 64, 64, 64)) == 3
    assert one.distance(Shape(1, 1, 32, 64, 256)) == math.inf
    assert one.distance(Shape(3, 2, 32, 64, 256)) == math.inf
    assert one.distance(Shape(3, 1, 32, 64, 256, depthwise=True)) == math.inf


def test_forms_of_newer_probes_are_ignored() -> None:
    row = {"shape": [3, 1, 8, 8, 64, 0], "seconds": {"forward.plain": 1e-3, "forward.quantum": 1e-9}}

    assert FormTimes.from_dict({"rows": [row], "more": 1}).near(Shape(3, 1, 8, 8, 64)) == {"forward.plain": 1e-3}


def row(shape: Any = (3, 1, 8, 8, 64, 0), seconds: Any = None) -> dict[str, Any]:
    return {"shape": list(shape), "seconds": {"forward.plain": 1e-3} if seconds is None else seconds}


@pytest.mark.parametrize(
    "body",
    [
        None,
        [],
        {},
        {"rows": {}},
        {"rows": [None]},
        {"rows": [[]]},
        {"rows": [{"shape": [3, 1, 8, 8, 64, 0]}]},
        {"rows": [{"shape": 3, "seconds": {}}]},
        {"rows": [row(shape=(3, 1, 8, 8, 64))]},
        {"rows": [row(shape=(3, 1, 8, 8, 64, 2))]},
        {"rows": [row(shape=(0, 1, 8, 8, 64, 0))]},
        {"rows": [row(shape=(3, 1, 8.0, 8, 64, 0))]},
        {"rows": [row(shape=(3, 1, True, 8, 64, 0))]},
        {"rows": [row(shape=(3, 1, 8, 2**40, 64, 0))]},
        {"rows": [row(seconds=[])]},
        {"rows": [row(seconds={"forward.plain": 0})]},
        {"rows": [row(seconds={"forward.plain": -1.0})]},
        {"rows": [row(seconds={"forward.plain": math.nan})]},
        {"rows": [row(seconds={"forward.plain": math.inf})]},
        {"rows": [row(seconds={"forward.plain": 10**400})]},
        {"rows": [row(seconds={"forward.plain": "1"})]},
        {"rows": [row(seconds={"forward.plain": True})]},
        {"rows": [row()] * (MOST_SHAPES + 1)},
    ],
)
def test_what_is_no_form_times_is_refused(body: Any) -> None:
    with pytest.raises(ProfileError, match="form times"):
        FormTimes.from_dict(body)


def test_a_table_names_what_it_knows_once() -> None:
    shape = Shape(3, 1, 8, 8, 64)
    with pytest.raises(ProfileError, match="a form"):
        FormTimes(((shape, (("forward.quantum", 1.0),)),))
    with pytest.raises(ProfileError, match="twice"):
        FormTimes(((shape, (("forward.plain", 1.0), ("forward.plain", 2.0))),))
