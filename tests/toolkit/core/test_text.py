"""Numbers with their nouns, and received texts as they are checked and shown."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedprune
from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.text import decode_text, one_line, quantity, sentences

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (11, "11 files"), (1000, "1,000 files")]
)
def test_one_is_one(number: int, words: str) -> None:
    assert quantity(number, "file", form=",") == words


@pytest.mark.parametrize("end", ["", ".", "...", "!", "?"])
def test_a_sentence_ends_once_and_another_follows_after_a_space(end: str) -> None:
    assert sentences(f"it failed{end}", "", "See the log") == f"it failed{end or '.'} See the log"
    assert str(ConfigError(f"it failed{end}", hint="See the log")) == f"it failed{end or '.'} See the log"
    assert sentences(f"it failed{end}", "") == f"it failed{end}"
    assert sentences("") == ""


def test_no_command_counts_by_itself() -> None:
    """What is printed by a `print` or goes to a page has its noun from `quantity`."""
    root = Path(fedprune.__file__).parents[2]
    told = re.compile(r"print\(.*\{[^{}]*\} (?:files|devices|boards|rounds|keys|certificates|tensors|runs)\b")
    for wing in ("toolkit", "server", "export", "device_runtime"):
        for path in (root / wing).rglob("*.py"):
            assert not [line for line in path.read_text().splitlines() if told.search(line)], path


@pytest.mark.parametrize("code", [0, 7, 27, 0x7F, 0x80, 0x9B, 0x9F, 0xD800])
def test_a_text_holds_nothing_that_steers_a_terminal(code: int) -> None:
    with pytest.raises(ConfigError, match="printable"):
        validation.text("reason", f"a{chr(code)}b", 10)


@pytest.mark.parametrize("value", ["two\nlines", "a\ttab", "µ", "\xa0", "漢字"])
def test_a_text_may_hold_lines_tabs_and_any_script(value: str) -> None:
    assert validation.text("reason", value, 10) == value


@given(st.text(max_size=50) | st.text(st.characters(max_codepoint=0xFF), max_size=50))
def test_a_strangers_text_becomes_one_printable_line(value: str) -> None:
    shown = one_line(value, 20)
    assert shown.isprintable() or not shown
    assert len(shown) <= 23


def test_words_stay_words_on_one_line() -> None:
    assert one_line("no room\n  on\tdisk\x1b[2J") == "no room on disk [2J"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "ascii"])
def test_a_file_of_windows_is_the_text_that_was_saved(encoding: str) -> None:
    assert decode_text("FP1-\r\n".encode(encoding)) == "FP1-\r\n"
    with pytest.raises(UnicodeError):
        decode_text(b"\xff\xff")
