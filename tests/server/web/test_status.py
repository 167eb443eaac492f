"""What a console reads: pages of devices, over changes in any order."""

import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune_server.web.events import MAX_DEVICES, PendingTopics, event_text
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.records import AlertStatus, LogLine
from fedprune_server.web.state.status_writer import SORT_COLUMNS, STATUS_FILE, StatusWriter, encode_status
from support.fakes.console_fleet import ConsoleFleet, write
from support.paths import ROOT

FLEET_PAGE = ROOT / "server" / "fedprune_server" / "web" / "templates" / "fleet.html"


def publish_fleet(folder: Path, devices: int) -> tuple[FleetView, ConsoleFleet]:
    writer, fleet = StatusWriter(folder / STATUS_FILE), ConsoleFleet(devices, 2)
    fleet.publish(writer)
    writer.close()
    return FleetView(folder / STATUS_FILE), fleet


def test_every_sortable_header_of_the_fleet_page_is_a_column() -> None:
    headers = re.findall(r'head\("(\w+)"', FLEET_PAGE.read_text())
    assert len(headers) > 5
    assert set(headers) <= set(SORT_COLUMNS)


@pytest.mark.parametrize("column", ["name", "online", "density", "seen_at"])
@pytest.mark.parametrize("backward", [False, True])
def test_pages_in_any_order_hold_every_device_once(tmp_path: Path, column: str, backward: bool) -> None:
    view, fleet = publish_fleet(tmp_path, 130)
    rows: list[dict[str, Any]] = []
    for number in range(1, 5):
        page = view.devices(page=number, size=40, sort=f"{'-' if backward else ''}{column}")
        assert (page.pages, page.total) == (4, 130)
        rows += page.items
    assert sorted(r["name"] for r in rows) == sorted(fleet.rows)
    values = [r[column] for r in rows]
    there = [v for v in values if v is not None]
    assert values[len(there) :] == [None] * (len(values) - len(there))
    assert there == sorted(there, reverse=backward)


def test_filters_keep_what_they_say_and_counts_are_of_all(tmp_path: Path) -> None:
    view, fleet = publish_fleet(tmp_path, 200)
    for column in ("state", "profile", "job", "status"):
        for value, count in view.counts[column].items():
            page = view.devices(size=500, only={column: value})
            assert page.total == count == sum(r[column] == value for r in fleet.rows.values())
    assert view.devices(q="BOARD-001").total == 10
    assert view.devices(only={"online": "no"}).total == view.counts["online"]["no"]


def test_a_revoked_board_is_not_counted_as_offline(tmp_path: Path) -> None:
    view, fleet = publish_fleet(tmp_path, 20)
    before = view.counts["online"]
    row = next(r for r in fleet.rows.values() if not r["online"] and r["status"] == "member")
    writer = StatusWriter(tmp_path / "later.db")
    write(writer, rows={n: encode_status({**r, "status": "revoked"} if r is row else r) for n, r in fleet.rows.items()})
    later = FleetView(tmp_path / "later.db")
    assert later.counts["online"] == {"yes": before["yes"], "no": before["no"] - 1}
    assert later.devices(only={"online": "no"}).total == before["no"] - 1
    assert later.counts["status"]["revoked"] == 1
    for opened in (view, later, writer):
        opened.close()


@pytest.mark.parametrize("wrong", [{"page": 0}, {"size": 0}, {"size": 501}, {"sort": "key"}, {"only": {"name": "a"}}])
def test_a_page_that_is_none_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"expected|no "):
        publish_fleet(tmp_path, 3)[0].devices(**wrong)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.booleans(), st.booleans()), max_size=40))
def test_counts_are_those_of_the_rows_after_any_changes(changes: list[tuple[int, bool, bool]]) -> None:
    rows = list(ConsoleFleet(8, 0).rows.values())
    is_online: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        writer, view = StatusWriter(Path(folder) / STATUS_FILE), FleetView(Path(folder) / STATUS_FILE)
        for number, gone, online in changes:
            row = {**rows[number], "online": online}
            write(writer, rows={row["name"]: None if gone else encode_status(row)})
            is_online[row["name"]] = online
            if gone:
                del is_online[row["name"]]
        assert view.counts["online"] == {"yes": sum(is_online.values()), "no": len(is_online) - sum(is_online.values())}
        assert view.devices().total == sum(view.counts["profile"].values()) == len(is_online)
        assert view.device_names == is_online.keys()
        named = {f"devices:{rows[number]['name']}" for number, _, _ in changes}
        assert view.changes() == (named | {"devices"} if named else set())
        writer.close()
        view.close()


def test_old_records_go_and_closed_alerts_before_open_ones(tmp_path: Path) -> None:
    writer, fleet = StatusWriter(tmp_path / STATUS_FILE), ConsoleFleet(1, 0)
    write(writer, *(LogLine(float(i), "info", f"line {i}") for i in range(5002)))
    alerts = [AlertStatus(f"a{i}", float(i), "disk", "warning", None, None, "full") for i in range(1003)]
    write(writer, *(replace(alert, gone_at=1.0) if i % 500 == 499 else alert for i, alert in enumerate(alerts)))
    write(writer, *(fleet.round("one", number) for number in range(1, 2003)), fleet.round("two", 1))
    with FleetView(tmp_path / STATUS_FILE) as view:
        assert (view.lines().total, view.lines(page=11, size=500).items[-1]["text"]) == (5000, "line 2")
        assert view.alerts().total == 1000
        assert view.alerts(gone=False).total == 1000
        assert (view.rounds("one").total, view.rounds("two").total) == (2000, 1)


def test_changes_name_what_they_are_about_once(tmp_path: Path) -> None:
    writer, fleet = StatusWriter(tmp_path / STATUS_FILE), ConsoleFleet(1, 0)
    view = FleetView(tmp_path / STATUS_FILE)
    write(writer, fleet.round("one", 1), LogLine(1.0, "info", "a", "attic"), LogLine(1.0, "info", "b"))
    assert view.changes() == {"round", "round:one", "log", "log:attic"}
    assert view.changes() == set()


def test_a_stream_names_few_of_many_and_no_text_begins_another_event() -> None:
    pending = PendingTopics()
    pending.add([f"devices:b{i}" for i in range(MAX_DEVICES + 1)])
    pending.add(["devices", "log:x\n\nevent: ended\ndata: {}\n\n"])
    (text,) = [event for event in pending.take_event().split("\n\n") if event]
    assert text.startswith('event: changed\ndata: ["devices","devices:*","log:')
    assert pending.take_event() == event_text("changed", [])
