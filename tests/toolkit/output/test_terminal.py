"""Tables on terminals of any width, and lines for programs elsewhere."""

import io
import re

import pytest

from fedprune.output.tables import GOOD, Column, print_table

COLUMNS = [
    Column("target"),
    Column("density", is_right_aligned=True, drop_order=1),
    Column("parity", is_right_aligned=True, drop_order=3),
    Column("MACs", is_right_aligned=True, drop_order=2),
    Column("why", min_width=10),
]
ROWS = [
    ("raspberry-pi-zero-2w", "0.359", "3.7e-07", "7,240,704", "bound by memory"),
    ("jetson-orin-nano", "1", "2.9e-07", "839,488", "nothing"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def print_sample(width: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    print_table(COLUMNS, [(*row[:-1], (row[-1], GOOD)) for row in ROWS], stream=stream)
    return stream.getvalue()


@pytest.mark.parametrize("width", [32, 56, 120])
def test_a_cell_is_whole_or_its_column_is_left_out_and_named(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = re.sub(r"\x1b\[[0-9;]*m", "", print_sample(width, monkeypatch)).splitlines()
    text = "\n".join(lines)
    head = lines[0].split()
    note = lines[-1] if lines[-1].startswith("not shown") else ""
    assert "…" not in text
    assert all(len(line) <= width for line in lines if line != note)
    for i, column in enumerate(COLUMNS[:-1]):
        if column.title in head:
            assert all(row[i] in text for row in ROWS)
        else:
            assert column.title in note
    assert {"target", "why"} <= set(head)
    assert "bound" in text
    assert "memory" in text


def test_elsewhere_there_are_all_columns_separated_by_tabs() -> None:
    stream = io.StringIO()
    print_table(COLUMNS, [("a\nb", "1", "2", "3", ("good", GOOD))], stream=stream)
    assert stream.getvalue() == "target\tdensity\tparity\tMACs\twhy\na b\t1\t2\t3\tgood\n"


def test_a_bracket_in_a_cell_is_a_bracket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream = Terminal()
    print_table([Column("[b]what")], [("[bold red]nothing[/]",)], stream=stream)
    assert "[bold red]nothing[/]" in stream.getvalue()
    assert "[b]what" in stream.getvalue()
