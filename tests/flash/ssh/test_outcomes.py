"""What became of boards, printed: whole at eighty columns on a terminal, lines elsewhere."""

from __future__ import annotations

import pytest

from fedprune_flash.ssh.installation import BoardOutcome, print_outcomes
from fedprune_flash.ssh.inventory import BoardRow

pytestmark = pytest.mark.soak

REASON = "the board has Python 3.9: expected 3.10 to 3.13, got 3.9"
REMEDY = "Install a newer Raspberry Pi OS and run it again."


def test_outcomes_are_a_table_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = BoardRow.__new__(BoardRow)
    monkeypatch.setattr(BoardRow, "__str__", lambda self: "attic (192.168.1.30)")
    outcomes = [BoardOutcome(row, "failed", REASON, REMEDY, good=False), BoardOutcome(row, "done", "release 3")]
    print_outcomes(outcomes)
    assert capsys.readouterr().out.splitlines() == [
        "board\tstate\treason\twhat to do",
        f"attic (192.168.1.30)\tfailed\t{REASON}\t{REMEDY}",
        "attic (192.168.1.30)\tdone\trelease 3\t",
    ]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    print_outcomes(outcomes)
    out = capsys.readouterr().out
    assert "\x1b[31mfailed" in out
    assert "\x1b[32mdone" in out
    for word in f"{REASON} {REMEDY}".split():
        assert word in out
