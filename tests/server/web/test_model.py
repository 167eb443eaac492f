"""What a console knows: pages of devices, over changes in any order."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.core.errors import ProtocolError
from fedprune_server.web.demo_fleet import TrialFleet
from fedprune_server.web.events import NAMES, Pending, event
from fedprune_server.web.state.device_messages import Devices
from fedprune_server.web.state.model import SORTABLE, Model
from fedprune_server.web.state.publisher_messages import line, parse_news, parse_order


def told(devices: int) -> tuple[Model, TrialFleet]:
    model, fleet = Model(), TrialFleet(devices, 2)
    for word in fleet.begin():
        model.hear(parse_news(line(word)))
    return model, fleet


@pytest.mark.parametrize("column", SORTABLE)
@pytest.mark.parametrize("backward", [False, True])
def test_pages_in_any_order_hold_every_device_once(column: str, backward: bool) -> None:
    model, fleet = told(130)
    rows: list[dict[str, Any]] = []
    for number in range(1, 5):
        page = model.devices(page=number, size=40, sort=f"{'-' if backward else ''}{column}")
        assert (page.pages, page.total) == (4, 130)
        rows += page.items
    assert sorted(r["name"] for r in rows) == sorted(fleet.rows)
    values = [r[column] for r in rows]
    there = [v for v in values if v is not None]
    assert values[len(there) :] == [None] * (len(values) - len(there))
    assert there == sorted(there, reverse=backward)


def test_filters_keep_what_they_say_and_counts_are_of_all() -> None:
    model, fleet = told(200)
    for column in ("state", "profile", "job", "status"):
        for value, count in model.counts[column].items():
            page = model.devices(size=500, only={column: value})
            assert page.total == count == sum(r[column] == value for r in fleet.rows.values())
    assert model.devices(q="BOARD-001").total == 10
    assert model.devices(only={"online": "no"}).total == model.counts["online"]["no"]


@pytest.mark.parametrize("wrong", [{"page": 0}, {"size": 0}, {"size": 501}, {"sort": "key"}, {"only": {"name": "a"}}])
def test_a_page_that_is_none_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|no "):
        told(3)[0].devices(**wrong)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.booleans()), max_size=40))
def test_counts_are_those_of_the_rows_after_any_changes(changes: list[tuple[int, bool, bool]]) -> None:
    model, fleet = Model(), TrialFleet(8, 0)
    rows = list(fleet.rows.values())
    known: dict[str, bool] = {}
    for number, gone, online in changes:
        row = {**rows[number], "online": online}
        if gone:
            model.hear(Devices((), (row["name"],)))
            known.pop(row["name"], None)
        else:
            model.hear(Devices((row,)))
            known[row["name"]] = online
    assert model.counts["online"] == {"yes": sum(known.values()), "no": len(known) - sum(known.values())}
    assert model.devices().total == sum(model.counts["profile"].values()) == len(known)


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.sampled_from([parse_news, parse_order]))
def test_damaged_lines_are_one_error(noise: bytes, at: int, parse: Any) -> None:
    sound = line(Devices(tuple(TrialFleet(1, 0).rows.values())))
    for raw in (noise, noise + b"\n", sound[:at] + noise + sound[at:], sound[:at] + noise):
        with suppress(ProtocolError):
            parse(raw)


def test_a_stream_names_few_of_many_and_no_text_begins_another_event() -> None:
    model, pending = told(3)[0], Pending()
    pending.add("devices", [f"b{i}" for i in range(NAMES + 5)])
    pending.add("log", {"text": "x\n\nevent: ended\ndata: {}\n\n"})
    text = pending.take(model)
    assert [x.split("\n")[0] for x in text.split("\n\n") if x] == ["event: devices", "event: log"]
    assert '"more":true' in text
    assert pending.take(model) == ""
    assert event("log", "a\r\nb").count("\n") == 3
