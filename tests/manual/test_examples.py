"""Every command's help ends with two examples or more, and these are command lines that parse."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

import fedprune_start
from fedprune.output.examples import EXAMPLES, add_examples
from manual.command_pages import _commands, _parsers


def walked(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for _, inner, _ in _commands(parser):
        yield from walked(inner)


TOPS = dict(_parsers())
"""The parsers that command lines begin with: a whole program's, or one command's of `fedprune-export`."""

PARSERS = {inner.prog: inner for top in TOPS.values() for inner in walked(top)}


@pytest.mark.parametrize("prog", sorted(PARSERS))
def test_help_ends_with_two_examples_or_more(prog: str) -> None:
    parser = PARSERS[prog]
    add_examples(parser)
    text = parser.format_help()
    shown = text[text.rindex("examples:\n") :].partition("\n\n")[0].splitlines()[1:]
    assert len(shown) >= 2
    assert len(set(shown)) == len(shown)
    assert all(line.startswith(f"  {prog}") for line in shown)


def test_the_umbrella_command_has_two_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    fedprune_start.main(["--help"])
    text = capsys.readouterr().out
    lines = text[text.index("examples:\n") :].partition("\n\n")[0].splitlines()[1:]
    assert len(lines) >= 2
    for line in lines:
        umbrella, name, words = line.strip().split(" ", 2)
        assert umbrella == "fedprune"
        parses(f"fedprune-{name} {words}")


def test_examples_are_of_commands_that_exist() -> None:
    assert set(EXAMPLES) <= set(PARSERS)


@pytest.mark.parametrize("line", [line for lines in EXAMPLES.values() for line in lines])
def test_an_example_parses(line: str) -> None:
    parses(line)


def parses(line: str) -> None:
    prog, *words = shlex.split(re.split(" [<>]", line)[0])
    inner = f"{prog} {words[0]}" if words else prog
    parser = TOPS.get(inner)
    if parser is None:
        parser = TOPS[prog]
    else:  # the command's parser takes what comes after its name
        words = words[1:]
    parser.parse_args(words)


@pytest.mark.parametrize(("prog", "lines"), EXAMPLES.items())
def test_an_example_is_of_its_command_and_fits_a_terminal(prog: str, lines: tuple[str, ...]) -> None:
    assert all(line.startswith(prog) and len(line) <= 118 for line in lines)
