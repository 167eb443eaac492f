"""Times of forms come over the network: they are checked; the nearest shape speaks, and only if it is near."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core.errors import ProfileError
from fedprune.planning.probe_report import MOST_SHAPES, NAMES, FormTimes, Shape

pytestmark = pytest.mark.board

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
def test_what_is_no_table_is_refused(body: Any) -> None:
    with pytest.raises(ProfileError, match="form times"):
        FormTimes.from_dict(body)


def test_a_table_names_what_it_knows_once() -> None:
    shape = Shape(3, 1, 8, 8, 64)
    with pytest.raises(ProfileError, match="a form"):
        FormTimes(((shape, (("forward.quantum", 1.0),)),))
    with pytest.raises(ProfileError, match="twice"):
        FormTimes(((shape, (("forward.plain", 1.0), ("forward.plain", 2.0))),))
