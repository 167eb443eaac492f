"""What a board says of itself, and what is known of one device, whatever it says."""

import json
import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedprune.model.selection import Selection
from fedprune.wire.fleet_messages import CrashReport
from fedprune_server.devices.crash_store import CRASH_FILE as CRASHES
from fedprune_server.devices.crash_store import CrashStore
from fedprune_server.web.state.details import board_crashes, device_details, kept_channels
from fedprune_server.web.state.fleet_view import FleetView
from fedprune_server.web.state.rows import slot_and_release
from fedprune_server.web.state.status_writer import STATUS_FILE, StatusWriter, encode_status
from fedprune_server.web.views.presentation import make_channel_map
from support.fakes.console_fleet import write
from support.fakes.fleet import Fleet
from support.fakes.tiny_job import JOB


@pytest.mark.parametrize(
    ("software", "expected"),
    [
        ("fedprune 0.1.0, onnxruntime 1.23.2, Python 3.11.7, slot b with release 12", ("b", 12)),
        ("fedprune 0.1.0, slot a, predicts with TensorRT (slot b with release 3)", ("a", None)),
        ("fedprune 0.1.0", (None, None)),
        ("slot a with release 99999999999", ("a", None)),
        ("backslot a with release 4", (None, None)),
    ],
)
def test_a_board_says_which_slot_and_release_it_runs(software: str, expected: tuple[str | None, int | None]) -> None:
    assert slot_and_release(software) == expected


@settings(deadline=None)
@given(st.integers(0, 40).flatmap(lambda n: st.lists(st.booleans(), min_size=n, max_size=n)))
def test_a_map_shows_the_channels_that_are_held_and_no_other(bits: list[bool]) -> None:
    which = bytes(
        sum(b << (7 - i) for i, b in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)
    ).hex()  # fmt: skip
    drawn = make_channel_map("g", sum(bits), len(bits), which)
    assert drawn.known
    is_drawn = [False] * len(bits)
    for piece in drawn.path.split("M")[1:]:
        at, count = piece.split(" 0h")[0], piece.split("0h")[1].split("v")[0]
        for c in range(int(at), int(at) + int(count)):
            is_drawn[c] = True
    assert is_drawn == bits
    ranges = [p.split("-") for p in drawn.words.split(", ") if p]
    assert {c for p in ranges for c in range(int(p[0]), int(p[-1]) + 1)} == {i for i, b in enumerate(bits) if b}


def test_details_hold_the_very_channels_of_the_ranking_and_every_figure_once(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path, JOB)
    daemon = fleet.daemon()
    fleet.daemon = lambda **options: daemon  # type: ignore[method-assign]
    state = fleet.run()
    runner = daemon.main_runner
    details = device_details(runner, "a", 1e9)
    assert json.loads(encode_status(details))["widths"]
    sizes = runner.architecture.sizes
    chance = random.Random(0)
    ranks = [chance.sample(range(n), n) for n in sizes]
    state.ranking = runner.store.put(Selection.of(runner.architecture, sizes, ranks).to_json().encode()).sha256
    state.tasks, state.devices["a"].held = {}, None  # type: ignore[assignment]
    for row, rank, width in zip(kept_channels(runner, "a"), ranks, state.devices["a"].widths, strict=True):
        bits = "".join(f"{b:08b}" for b in bytes.fromhex(row["which"]))
        assert {i for i, b in enumerate(bits) if b == "1"} == set(rank[:width])
        assert row["kept"] == width
    state.ranking = "0" * 64
    assert {row["which"] for row in kept_channels(runner, "a")} == {None}
    names = [f["what"] for f in details.figures]
    assert len(names) == len(set(names))
    assert {"round", "step", "train", "transfer", "latency", "memory", "download"} <= set(names)
    assert device_details(runner, "nobody", 1e9).figures == ()


HOSTILE = "12:00:00 job finished <script>alert(1)</script> {{ 7 * 7 }} é\u4e2d" + "y" * 350
STEERS = "x\n12:00:00 job finished\x1b[2J\u202e"


def crash(number: int, **changes: Any) -> CrashReport:
    frames = ({"module": HOSTILE[:128], "line": 7, "function": "f"},) * 16
    fields: dict[str, Any] = {"at": 5, "cause": HOSTILE[:64], "text": HOSTILE, "frames": frames,
                              "release": HOSTILE[:256], "slot": HOSTILE[:64], "uptime_s": -5.0, "temperature_c": 1e9,
                              "memory_available": 2**63 - 1, "memory_total": None}  # fmt: skip
    return CrashReport("a", number, **{**fields, **changes})


def test_what_boards_tell_is_bounded_and_steers_nothing(tmp_path: Path) -> None:
    with CrashStore(tmp_path) as crashes:
        for number in range(1, 16):
            crashes.add(crash(number, text=f"{number} {HOSTILE}"))
        crashes.note_warnings("a", [{"at": 5, "text": "1"}, {"at": 2**60, "text": HOSTILE}])
        crashes.save()
    with closing(sqlite3.connect(tmp_path / CRASHES)) as file, file:  # what is on the disk may be another's doing
        file.execute("UPDATE crashes SET text = ?, at = -1, received = -1 WHERE number = 1", (f"1 {STEERS * 100}",))
        file.execute("UPDATE warnings SET text = ? WHERE text = '1'", (STEERS,))
    writer, view = StatusWriter(tmp_path / STATUS_FILE), FleetView(tmp_path / STATUS_FILE)
    write(writer, board_crashes(tmp_path, "a"), board_crashes(tmp_path, "nobody"))
    published = view.crashes("a")
    assert published is not None
    assert [c["text"].split()[0] for c in published["crashes"]] == [str(n) for n in range(10, 0, -1)]
    texts = [t for c in published["crashes"] for t in (c["text"], c["cause"], c["release"], c["slot"], *c["frames"])]
    texts += [w["text"] for w in published["warnings"]]
    assert len(published["warnings"]) == 2
    assert all(t.isprintable() for t in texts)
    (worst,) = {(c["uptime_s"], c["temperature_c"], c["memory_available"]) for c in published["crashes"]}
    assert worst == (None, None, 2**63 - 1)
    assert view.crashes("nobody") == {"name": "nobody", "crashes": [], "warnings": []}


def test_crashes_that_cannot_be_read_cost_no_page(tmp_path: Path) -> None:
    (tmp_path / CRASHES).write_bytes(b"not a database at all" * 100)
    assert board_crashes(tmp_path, "a").crashes == ()


def test_the_pages_show_what_boards_tell_as_text(tmp_path: Path) -> None:
    pytest.importorskip("starlette", reason="the extra console is not installed")
    from support.fakes.console_browser import trial

    here = trial(tmp_path)
    write(here.writer, here.fleet.details("board-0006"), here.fleet.crashes("board-0006"))
    page, table = (here.browser("viewer").get(path).body.decode() for path in ("/devices/board-0006", "/fleet"))
    assert "MemoryError: &lt;i&gt;no room&lt;/i&gt; for 12 MB" in page
    assert "the disk of &lt;i&gt;barn&lt;/i&gt; is full" in page
    assert "<i>" not in page
    kept = {k: v for k, v in here.fleet.details("board-0006").widths[0].items() if k != "group"}
    assert make_channel_map("g", **kept).words in page
    assert '5/a <span class="mark work">trial</span>' in table
