"""Damaged inputs are taken or refused with one of our errors; soaks try many more."""

import logging
from collections.abc import Iterator

import pytest

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
    assert tally.inputs == inputs == tally.accepted_count + sum(tally.refused.values())


def test_whatever_else_happens_is_a_finding() -> None:
    """The net itself: a parser that fails otherwise, takes too much memory or says too much is found."""

    def parse(raw: bytes) -> object:
        kept = bytes(2**20)
        raise KeyError(f"{kept[0]}{raw!r}")

    found = fuzz(Target("toy", parse, (b"x",), constant=1000), 0, 80).findings

    assert any(what.startswith("KeyError") for what in found)
    assert "memory beyond the bound: toy" in found
