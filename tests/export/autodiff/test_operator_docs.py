"""docs/add-an-operator.md: its worked example works, and what it names is there."""

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

from fedprune_export.autodiff.tape import RULES as GRADIENTS
from fedprune_export.channels.rule import RULES as CHANNELS
from support.paths import ROOT

pytestmark = pytest.mark.torch

PAGE = (ROOT / "docs" / "add-an-operator.md").read_text()
EXAMPLE = PAGE[PAGE.index("## A worked example") :]
BLOCKS = [textwrap.dedent(b) for b in re.findall(r"(?:^    .*\n|^\n(?=    ))+", EXAMPLE, re.MULTILINE) if b.strip()]


@pytest.fixture
def example() -> Iterator[dict[str, Any]]:
    """What the page's code defines; its rules are gone afterwards."""
    assert "ReverseSequence" not in {*CHANNELS, *GRADIENTS}
    names: dict[str, Any] = {}
    try:
        for block in BLOCKS:
            exec(compile(block, "add-an-operator.md", "exec"), names)  # noqa: S102
        yield names
    finally:
        for rules in (CHANNELS, GRADIENTS):
            rules.pop("ReverseSequence", None)


def test_the_example_passes_its_own_tests(example: dict[str, Any]) -> None:
    tests = [function for name, function in example.items() if name.startswith("test_")]
    assert len(tests) == 2
    for function in tests:
        function()
