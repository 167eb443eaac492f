"""Numbers with their nouns."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedprune
from fedprune.core.text import quantity

pytestmark = pytest.mark.board


@pytest.mark.parametrize(
    ("number", "words"), [(0, "0 files"), (1, "1 file"), (2, "2 files"), (11, "11 files"), (1000, "1,000 files")]
)
def test_one_is_one(number: int, words: str) -> None:
    assert quantity(number, "file", form=",") == words


def test_a_noun_may_have_a_plural_of_its_own() -> None:
    assert [quantity(n, "copy", "copies") for n in (1, 2)] == ["1 copy", "2 copies"]


def test_no_command_counts_by_itself() -> None:
    """What is printed by a `print` or goes to a page has its noun from `quantity`."""
    root = Path(fedprune.__file__).parents[2]
    told = re.compile(r"print\(.*\{[^{}]*\} (?:files|devices|boards|rounds|keys|certificates|tensors|runs)\b")
    for wing in ("toolkit", "server", "export", "device_runtime"):
        for path in (root / wing).rglob("*.py"):
            assert not [line for line in path.read_text().splitlines() if told.search(line)], path
