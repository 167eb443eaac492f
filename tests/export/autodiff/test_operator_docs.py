"""docs/add-an-operator.md: its worked example works, and what it names is there."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from fedprune.core.errors import ModelError
from fedprune_export.autodiff.tape import RULES as GRADIENTS
from fedprune_export.autodiff.tape import Tape, gradient_rule
from fedprune_export.channels.rule import RULES as CHANNELS
from fedprune_export.channels.rule import channel_rule
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


def own_tests(names: dict[str, Any]) -> dict[str, Callable[[], None]]:
    return {n: f for n, f in names.items() if n.startswith("test_")}


def test_the_example_passes_its_own_tests(example: dict[str, Any]) -> None:
    found = own_tests(example)
    assert len(found) == 2
    for function in found.values():
        function()


def test_without_the_gradient_rule_it_is_refused_by_name(example: dict[str, Any]) -> None:
    GRADIENTS.pop("ReverseSequence")
    with pytest.raises(ModelError, match="the_ReverseSequence"):
        own_tests(example)["test_gradients"]()


def test_without_the_channel_rule_nothing_is_cut(example: dict[str, Any]) -> None:
    CHANNELS.pop("ReverseSequence")
    with pytest.raises(AssertionError):
        own_tests(example)["test_a_cut_network_equals_the_masked_one"]()


def test_what_the_page_names_is_there() -> None:
    methods = set(re.findall(r"`tape\.([a-z]+)\(", PAGE))
    assert len(methods) > 12
    assert [m for m in methods if not callable(getattr(Tape, m, None))] == []
    modules = set(re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.py)`", PAGE))
    source = ROOT / "export" / "fedprune_export"
    assert len(modules) > 8
    assert [m for m in modules if not (source / m).exists() and not (ROOT / m).exists()] == []


@pytest.mark.parametrize(("registry", "register"), [(CHANNELS, channel_rule), (GRADIENTS, gradient_rule)])
def test_no_rule_takes_the_place_of_another_of_its_module(registry: dict[str, Any], register: Any) -> None:
    first = register("OfThisTest")(lambda *_: None)
    try:
        with pytest.raises(ModelError, match=r"OfThisTest has two (channel|gradient) rules"):
            register("OfThisTest")(lambda *_: None)
        assert registry["OfThisTest"] is first
    finally:
        del registry["OfThisTest"]


def test_every_rule_says_in_a_line_what_it_does() -> None:
    for registry in (CHANNELS, GRADIENTS):
        for operator, function in registry.items():
            line = (function.__doc__ or "").strip().splitlines()[:1]
            assert line, operator
            assert 5 < len(line[0]) < 130, operator
