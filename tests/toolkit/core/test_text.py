"""Numbers with their nouns, and received texts as they are checked and shown."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.text import decode_text, one_line

pytestmark = pytest.mark.board


@pytest.mark.parametrize("code", [27, 0x9B, 0xD800])
def test_a_text_holds_nothing_that_steers_a_terminal(code: int) -> None:
    with pytest.raises(ConfigError, match="printable"):
        validation.check_text("reason", f"a{chr(code)}b", 10)


@pytest.mark.parametrize("value", ["two\nlines", "a\ttab", "漢字"])
def test_a_text_may_hold_lines_tabs_and_any_script(value: str) -> None:
    assert validation.check_text("reason", value, 10) == value


@given(st.text(max_size=50) | st.text(st.characters(max_codepoint=0xFF), max_size=50))
def test_a_strangers_text_becomes_one_printable_line(value: str) -> None:
    line = one_line(value, 20)
    assert line.isprintable() or not line
    assert len(line) <= 23


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "ascii"])
def test_a_file_of_windows_is_the_text_that_was_saved(encoding: str) -> None:
    assert decode_text("FP1-\r\n".encode(encoding)) == "FP1-\r\n"
    with pytest.raises(UnicodeError):
        decode_text(b"\xff\xff")
