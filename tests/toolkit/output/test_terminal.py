"""Tables on terminals of any width, and lines for programs elsewhere."""

from __future__ import annotations

import io
import re

import pytest

from fedprune.output.tables import GOOD, Column, byte_progress, print_table, print_verdicts

COLUMNS = [
    Column("target"),
    Column("density", right=True, drop=1),
    Column("parity", right=True, drop=3),
    Column("MACs", right=True, drop=2),
    Column("why", wrap=10),
]
ROWS = [
    ("raspberry-pi-zero-2w", "0.359", "3.7e-07", "7,240,704", "bound by memory"),
    ("jetson-orin-nano", "1", "2.9e-07", "839,488", "nothing"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(width: int, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm-256color")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Terminal()
    rows = [(*row[:-1], (row[-1], GOOD)) for row in ROWS]
    print_table(COLUMNS, rows, stream=stream)
    return stream.getvalue()


def plain(text: str) -> list[str]:
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


@pytest.mark.parametrize("width", [32, 40, 48, 56, 60, 70, 80, 120])
def test_a_cell_is_whole_or_its_column_is_left_out_and_named(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = plain(printed(width, monkeypatch))

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


def test_columns_are_left_out_by_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [plain(printed(width, monkeypatch))[0].split() for width in (32, 43, 55, 70)]

    assert heads == [
        ["target", "why"],
        ["target", "density", "why"],
        ["target", "density", "MACs", "why"],
        ["target", "density", "parity", "MACs", "why"],
    ]


def test_a_style_is_a_colour_unless_colours_are_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[32m" in printed(80, monkeypatch)
    assert "\x1b[32m" not in printed(80, monkeypatch, NO_COLOR="1")


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


def test_verdicts_are_coloured_on_terminals_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "rows 1\n\nPASS: as good\nFAIL: too many bytes\nwrong: no broker\n  why: a note: it is gone\nnote: old"
    print_verdicts(text)
    assert capsys.readouterr().out == f"{text}\n"

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    print_verdicts(text)
    out = capsys.readouterr().out
    assert "\x1b[32mPASS\x1b[0m: as good" in out
    assert "\x1b[31mFAIL\x1b[0m: too many bytes" in out
    assert "\x1b[31mwrong\x1b[0m: no broker\n  why: a note: it is gone\n" in out
    assert "\x1b[33mnote\x1b[0m: old" in out


def test_a_bar_of_bytes_has_their_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    with byte_progress("reading", 10**8) as advance:
        for _ in range(100):
            advance(10**6)
    assert re.search(r"100\.0/100\.0 MB [\d.]+ [kMGT]B/s", "".join(plain(stream.getvalue())))
