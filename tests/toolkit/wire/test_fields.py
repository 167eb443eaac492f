"""Checks of fields: what may stand in a text, and how a stranger's text is shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedprune.core import validation
from fedprune.core.errors import ConfigError
from fedprune.core.metrics import served
from fedprune.core.text import one_line

pytestmark = pytest.mark.board


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


@pytest.mark.parametrize(
    ("metrics", "accuracy"),
    [
        ({"accuracy_before": 0.5, "accuracy_after": 0.7}, 0.7),
        ({"accuracy_before": 0.5, "accuracy_after": 0.7, "accuracy_average": 0.6}, 0.6),
        ({"accuracy_before": 0.5, "loss_after": 0.7}, None),
    ],
)
def test_what_serves_is_the_average_where_there_is_one(metrics: dict[str, float], accuracy: float | None) -> None:
    assert served(metrics, "accuracy") == accuracy
