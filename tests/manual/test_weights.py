"""What `make check` counts: lines of rooms within totals that only fall, and days since a ring ran whole."""

import copy
from datetime import date
from pathlib import Path

from support.push_ring import outdated_rings
from support.room_lines import KINDS, differences, new_record, room_lines


def tree(root: Path) -> Path:
    for name, lines in (
        ("toolkit/fedprune/core/files.py", 3),
        ("toolkit/fedprune/api.py", 1),
        ("server/fedprune_server/web/views/page.py", 2),
        ("tests/toolkit/core/test_files.py", 4),
        ("benchmarks/step.py", 5),
        ("docs/index.md", 6),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("line\n" * lines)
    return root


def test_a_room_is_a_package_s_folder_and_its_subfolders(tmp_path: Path) -> None:
    assert room_lines(tree(tmp_path)) == {
        "product": {"fedprune/": 1, "fedprune/core": 3, "fedprune_server/web": 2},
        "tests": {"tests/toolkit": 4},
        "benchmarks": {"benchmarks/": 5},
        "docs": {"docs/": 6},
    }


def test_lines_move_between_rooms_within_a_total_that_only_falls(tmp_path: Path) -> None:
    rooms = room_lines(tree(tmp_path))
    record = new_record({"totals": {}}, rooms)
    assert set(record["totals"]) == set(KINDS)
    assert differences(record, rooms, record) == []

    larger = copy.deepcopy(rooms)
    larger["product"]["fedprune/core"] += 1
    assert [d.split(":")[0] for d in differences(record, larger)] == ["fedprune/core"]
    assert [d.split(":")[0] for d in differences(new_record(record, larger), larger)] == ["product"]
    assert [d.split(":")[0] for d in differences(new_record({"totals": {}}, larger), larger, record)] == ["product"]

    larger["product"]["fedprune_server/web"] -= 1
    assert [d.split(":")[0] for d in differences(record, larger)] == ["fedprune/core", "fedprune_server/web"]
    assert differences(new_record(record, larger), larger, record) == []


def test_a_ring_that_nobody_has_run_for_long_is_named() -> None:
    rings = {"soak": {"date": "2026-11-01"}, "acceptance": {"date": "2026-11-02"}}
    assert [line.split(":")[0] for line in outdated_rings(rings, date(2026, 11, 16))] == ["soak"]
