"""The pages about the architecture name files that exist and every room of the import contracts."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedprune.core.errors import ConfigError
from fedprune.core.toml_file import read_toml
from manual import rooms
from support.paths import ROOT

SOURCES = ("toolkit", "export", "device_runtime", "server")
PAGES = ("architecture.md", "concurrency.md")
CONTRACTS: list[dict[str, Any]] = read_toml(ROOT / "pyproject.toml", ConfigError)["tool"]["importlinter"]["contracts"]
ROOMS = [
    (contract["containers"][0], room)
    for contract in CONTRACTS
    if contract["name"].startswith("rooms of ")
    for layer in contract["layers"]
    for room in layer.split(" | ")
]


def named_files(text: str) -> list[str]:
    """Paths in code that begin with a package's name."""
    return re.findall(r"`(fedprune\w*/[\w./-]+)`", text)


def missing(names: list[str]) -> list[str]:
    return [name for name in names if not any((ROOT / source / name).exists() for source in SOURCES)]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = named_files((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert len(names) > 50
    assert missing(names) == []


def test_a_file_that_is_gone_is_found() -> None:
    assert missing(named_files("`fedprune/core/errors.py`, `fedprune/core/gone.py`")) == ["fedprune/core/gone.py"]


@pytest.mark.parametrize("package", dict.fromkeys(package for package, _ in ROOMS))
def test_every_room_of_a_package_has_its_rule_on_the_page_and_its_place_in_the_drawing(package: str) -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition(f"<!-- rooms of {package} -->")[2].partition("<!-- end -->")[0]
    drawing = (ROOT / "docs" / "images" / f"rooms-{package}.svg").read_text(encoding="utf-8")
    wanted = [room for name, room in ROOMS if name == package]
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.MULTILINE))
    assert list(rows) == wanted
    assert all(len(rule.split()) > 3 for rule in rows.values())
    assert set(re.findall(r"<text [^>]*text-anchor[^>]*>(\w+)</text>", drawing)) == set(wanted)


def test_boxes_of_a_drawing_stay_within_it_whatever_the_rooms() -> None:
    drawn = rooms._drawing("Many", [["a_rather_long_name"] * 9, ["b"]])
    width, height = map(int, re.findall(r'viewBox="0 0 (\d+) (\d+)"', drawn)[0])
    boxes = re.findall(r'class="room" x="([\d.]+)" y="(\d+)" width="([\d.]+)" height="(\d+)"', drawn)
    assert len(boxes) == 10
    assert all(float(x) + float(w) <= width and int(y) + int(h) <= height for x, y, w, h in boxes)
