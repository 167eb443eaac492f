"""Every command's help ends with examples, and these are command lines that parse."""

import argparse
import re
import shlex
from collections.abc import Iterator

import pytest

from fedprune.output.examples import EXAMPLES
from manual.command_pages import _commands, _parsers


def subparsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for _, inner, _ in _commands(parser):
        yield from subparsers(inner)


TOPS = dict(_parsers())
"""The parsers that command lines begin with: a whole program's, or one command's of `fedprune-export`."""

PARSERS = {inner.prog: inner for top in TOPS.values() for inner in subparsers(top)}


def test_every_command_has_examples() -> None:
    assert [prog for prog, parser in PARSERS.items() if "examples:" not in parser.format_help()] == []


@pytest.mark.parametrize("line", EXAMPLES)
def test_an_example_parses(line: str) -> None:
    prog, *words = shlex.split(re.split(" [<>]", line)[0])
    parser = TOPS.get(f"{prog} {words[0]}" if words else prog)
    if parser is None:
        parser = TOPS[prog]
    else:  # the command's parser takes what comes after its name
        words = words[1:]
    parser.parse_args(words)
