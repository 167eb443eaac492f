"""Drawings and tables of the packages' rooms, made from the import contracts and the rooms' docstrings."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from fedprune.core.errors import ConfigError
from fedprune.core.toml_file import read_toml

PAGE = "docs/architecture.md"
IMAGES = "docs/images"

_SOURCES = ("toolkit", "export", "device_runtime", "server")
_WIDTH, _MARGIN, _GAP = 360, 12, 6
_CHIP, _LETTER, _PADDING = 30, 8.3, 9
_STYLE = """
    text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #16302b; }
    .page { fill: #ffffff; } .layer { fill: #e8f3f0; } .room { fill: #ffffff; stroke: #0f766e; }
    .small { font: 12px system-ui, sans-serif; fill: #40605a; }
    @media (prefers-color-scheme: dark) {
      text { fill: #dcefea; } .page { fill: #14191d; } .layer { fill: #1d2b2b; }
      .room { fill: #14191d; stroke: #4fb3a5; } .small { fill: #a3bfb8; }
    }
"""


@dataclass(frozen=True)
class Wing:
    """A package and its rooms.

    Attributes:
        package: The package's name.
        name: The short name that its contract gives it.
        layers: The rooms, the highest layer first. Rooms of one layer don't import each other.
    """

    package: str
    name: str
    layers: tuple[tuple[str, ...], ...]

    @property
    def image(self) -> str:
        """The path of its drawing."""
        return f"{IMAGES}/rooms-{self.package}.svg"


def wings(root: Path) -> list[Wing]:
    """The packages that have a contract of their rooms, in the contracts' order.

    Args:
        root: The repository.
    """
    found = []
    for contract in _contracts(root):
        name = contract["name"].partition(":")[0]
        if name.startswith("rooms of "):
            layers = tuple(tuple(layer.split(" | ")) for layer in contract["layers"])
            found.append(Wing(contract["containers"][0], name.removeprefix("rooms of ").removeprefix("the "), layers))
    return found


def files(root: Path) -> dict[str, str]:
    """The drawings, and the page with its tables as they should be, by their paths.

    Args:
        root: The repository.
    """
    made = {wing.image: _drawing(f"Rooms of {wing.package}", wing.layers) for wing in wings(root)}
    made[f"{IMAGES}/wings.svg"] = _drawing("The five packages", _floors(root))
    text = (root / PAGE).read_text(encoding="utf-8")
    for wing in wings(root):
        begin, end = f"<!-- rooms of {wing.package} -->\n", "<!-- end -->"
        head, _, rest = text.partition(begin)
        text = head + begin + _table(root, wing) + end + rest.partition(end)[2]
    return {**made, PAGE: text}


def rule(root: Path, package: str, room: str) -> str:
    """The first paragraph of a room's docstring, on one line.

    Args:
        root: The repository.
        package: The package.
        room: The room, a package or a module.
    """
    for source in _SOURCES:
        place = root / source / package / room
        for path in (place / "__init__.py", place.with_suffix(".py")):
            if path.is_file():
                text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
                return " ".join(text.split("\n\n")[0].split())
    raise ConfigError(f"{package}.{room}", expected="a package or module, as its import contract says", got="neither")


def _contracts(root: Path) -> Iterator[dict[str, Any]]:
    yield from read_toml(root / "pyproject.toml", ConfigError)["tool"]["importlinter"]["contracts"]


def _table(root: Path, wing: Wing) -> str:
    rows = [f"| `{room}` | {rule(root, wing.package, room)} |\n" for layer in wing.layers for room in layer]
    return "\n" + "".join(["| room | what belongs in it |\n|---|---|\n", *rows]) + "\n"


def _drawing(title: str, layers: Sequence[Sequence[str]]) -> str:
    """Layers from top to bottom, each with its rooms; legible without zoom on a phone."""
    shapes, y = [f'<text class="small" x="{_MARGIN}" y="22">{escape(title)}. Imports only run down.</text>'], 34
    for layer in layers:
        rows = _rows(layer)
        height = len(rows) * (_CHIP + _GAP) + _GAP
        shapes.append(f'<rect class="layer" x="{_MARGIN}" y="{y}" width="{_WIDTH - 2 * _MARGIN}" height="{height}"/>')
        for row in rows:
            y += _GAP
            x = (_WIDTH - sum(map(_length, row)) - _GAP * (len(row) - 1)) / 2
            for room in row:
                shapes.append(f'<rect class="room" x="{x:.1f}" y="{y}" width="{_length(room):.1f}" height="{_CHIP}"/>')
                middle = x + _length(room) / 2
                shapes.append(f'<text x="{middle:.1f}" y="{y + 20}" text-anchor="middle">{escape(room)}</text>')
                x += _length(room) + _GAP
            y += _CHIP
        y += 2 * _GAP
    height = y + _MARGIN - _GAP
    size = f'viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(title)}</title>\n'
    page = f'<rect class="page" width="{_WIDTH}" height="{height}"/>'
    return head + f"<style>{_STYLE}</style>\n" + "\n".join([page, *shapes]) + "\n</svg>\n"


def _rows(rooms: Sequence[str]) -> list[list[str]]:
    """Rooms of a layer in rows that fit the width."""
    rows: list[list[str]] = [[]]
    for room in rooms:
        taken = sum(_length(r) + _GAP for r in rows[-1])
        if rows[-1] and taken + _length(room) > _WIDTH - 2 * (_MARGIN + _GAP):
            rows.append([])
        rows[-1].append(room)
    return rows


def _length(room: str) -> float:
    return _LETTER * len(room) + 2 * _PADDING


def _floors(root: Path) -> list[list[str]]:
    """The packages by floor, the highest first."""
    (floors,) = (c["layers"] for c in _contracts(root) if c["name"].startswith("floors:"))
    return [layer.split(" | ") for layer in floors]
