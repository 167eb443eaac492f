"""Every command's help ends with examples, and these are command lines that parse."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from fedprune.output.examples import EXAMPLES, add_examples
from manual.command_pages import _commands, _parsers


def walked(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for _, inner, _ in _commands(parser):
        yield from walked(inner)


def tops() -> dict[str, argparse.ArgumentParser]:
    """The parsers that command lines begin with: a whole program's, or one command's of `fedprune-export`."""
    return dict(_parsers())


PARSERS = {inner.prog: inner for top in tops().values() for inner in walked(top)}


@pytest.mark.parametrize("prog", sorted(PARSERS))
def test_help_has_examples(prog: str) -> None:
    parser = PARSERS[prog]
    add_examples(parser)
    text = parser.format_help()
    shown = text[text.index("examples:\n") :].splitlines()[1:]
    assert shown[0].startswith(f"  {prog}")


def test_examples_are_of_commands_that_exist() -> None:
    assert set(EXAMPLES) <= set(PARSERS)


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_an_example_parses(line: str) -> None:
    prog, *words = shlex.split(line.partition(" >")[0])
    inner = f"{prog} {words[0]}" if words else prog
    parser = tops().get(inner)
    if parser is None:
        parser = tops()[prog]
    else:  # the command's parser takes what comes after its name
        words = words[1:]
    parser.parse_args(words)


@pytest.mark.parametrize(("prog", "lines"), EXAMPLES.items())
def test_an_example_is_of_its_command_and_fits_a_terminal(prog: str, lines: tuple[str, ...]) -> None:
    assert all(line.startswith(prog) and len(line) <= 118 for line in lines)
