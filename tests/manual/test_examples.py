"""Every command's help ends with two examples or more, and these are command lines that parse."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from fedprune.output.examples import EXAMPLES
from manual.command_pages import _commands, _parsers


def walked(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for _, inner, _ in _commands(parser):
        yield from walked(inner)


TOPS = dict(_parsers())
"""The parsers that command lines begin with: a whole program's, or one command's of `fedprune-export`."""

PARSERS = {inner.prog: inner for top in TOPS.values() for inner in walked(top)}


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
