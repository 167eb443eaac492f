"""Damaged inputs are taken or refused with one of our errors; soaks try many more."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.faults.parser_fuzzer import fuzz
from support.faults.parser_target import Target
from support.faults.parsers_of_boards import board_targets
from support.faults.parsers_of_files import file_targets
from support.faults.parsers_of_messages import wire_targets
from support.faults.parsers_of_setup import setup_targets

TARGETS = {t.name: t for t in (*wire_targets(), *file_targets(), *board_targets(), *setup_targets())}
INPUTS = (60, pytest.param(1200, marks=pytest.mark.soak))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("fedprune")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


@pytest.mark.parametrize("name", TARGETS)
def test_the_inputs_that_are_damaged_are_sound(name: str) -> None:
    target = TARGETS[name]
    for seed in target.seeds:
        target.parse(target.frame(seed))


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_damaged_input_is_taken_or_refused_in_bounded_memory(name: str, inputs: int) -> None:
    tally = fuzz(TARGETS[name], 0, inputs)

    assert tally.findings == {}
    assert tally.inputs == inputs == tally.taken + sum(tally.refused.values())


def test_whatever_else_happens_is_a_finding() -> None:
    """The net itself: a parser that fails otherwise, takes too much memory or says too much is found."""

    def parse(raw: bytes) -> object:
        kept = bytes(2**20)
        raise KeyError(f"{kept[0]}{raw!r}")

    found = fuzz(Target("toy", parse, (b"x",), constant=1000), 0, 80).findings

    assert any(what.startswith("KeyError") for what in found)
    assert "memory beyond the bound: toy" in found


KEYS = {
    name: {k.decode() for s in target.seeds for k in re.findall(rb'"([a-z_0-9]{1,20})":', s)}
    for name, target in TARGETS.items()
}
"""What the keys of each parser's sound inputs are called."""

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["..", "a"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4)
)


@cache
def near(name: str) -> st.SearchStrategy[bytes]:
    """Any bytes, any JSON, and sound inputs of which a part is exchanged for any bytes."""
    target = TARGETS[name]
    seed = st.sampled_from(target.seeds)
    places = (st.integers(0, 600), st.integers(0, 600))
    exchanged = st.builds(
        lambda s, a, b, raw: s[: min(a, b)] + raw + s[max(a, b) :], seed, *places, st.binary(max_size=8)
    )
    objects = st.sampled_from(sorted(KEYS[name])) if KEYS[name] else st.text(max_size=8)
    tables = st.dictionaries(objects, VALUES, max_size=8).map(lambda body: json.dumps(body).encode())
    return st.binary(max_size=200) | exchanged | tables | VALUES.map(lambda body: json.dumps(body).encode())


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(drawn=st.data())
def test_anything_is_taken_or_refused(name: str, drawn: st.DataObject) -> None:
    target, raw = TARGETS[name], drawn.draw(near(name))
    with warnings.catch_warnings(), suppress(*target.errors):
        warnings.simplefilter("ignore")
        target.parse(target.frame(raw))
