"""The parser of every command: help with examples, errors in one line that say what was meant."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from fedprune.core.errors import ExitCode, UsageError, meant
from fedprune.core.validation import MAX_INT
from fedprune.output.examples import examples_of

# Environment variable that shows tracebacks, too.
DEBUG = "FEDPRUNE_DEBUG"

# argparse's message for an invalid choice.
_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from ([^()]*)\)$")

# argparse's message for what is no number.
_NUMBER = re.compile(r"invalid (int|float) value: (.*)$", re.DOTALL)

_KINDS = {"int": "whole number", "float": "number"}


class CommandParser(argparse.ArgumentParser):
    """A parser whose help ends with examples, and whose errors are one line each, without the usage.

    It takes no shortened options, refuses numbers beyond 64 bits, and takes words that may be missing also behind
    options, as in `devices revoke --state DIR NAME`. Parsers of its subcommands are the same.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, "formatter_class": _Lines, **options})  # --round is no --rounds
        self.register("type", int, _bounded_int)
        self.register("type", float, _finite_float)
        self.register("action", "parsers", _Subcommands)
        self._is_intermixing = False

    def commands(self) -> dict[str, CommandParser]:
        """The parsers of its subcommands, by name."""
        actions = (action for action in self._actions if isinstance(action, argparse._SubParsersAction))
        return {name: inner for action in actions for name, inner in action.choices.items()}

    def option_names(self) -> set[str]:
        """Names of its options, without those of its subcommands."""
        return {name for action in self._actions for name in action.option_strings}

    def format_help(self) -> str:
        lines = _examples(self)
        return super().format_help() + ("\nexamples:\n" + "".join(f"  {line}\n" for line in lines) if lines else "")

    def error(self, message: str) -> NoReturn:
        print_error(f"{_reworded(message)}. See `{self.prog} --help`.")
        raise SystemExit(int(ExitCode.USAGE))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line. Raises `UsageError` for an option that there isn't."""
        words = sys.argv[1:] if args is None else list(args)
        self._check_options(words)
        return super().parse_args(words, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        optional_words = any(not action.option_strings and action.nargs == "?" for action in self._actions)
        # The other way of parsing loses "--", and calls this one.
        if self._is_intermixing or not optional_words or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False

    def _check_options(self, words: Sequence[str]) -> None:
        """Find a misspelt option before what it would have said is missed, and say what was meant."""
        parser, known = self, self.option_names()
        for word in words:
            commands = parser.commands()
            if word == "--" or (commands and not word.startswith("-") and word not in commands):
                return  # argparse reports an unknown command: without one no option can be checked
            if word in commands:
                parser = commands[word]
                known |= parser.option_names()
            option = word.partition("=")[0]
            if option.startswith("--") and option not in known:
                raise UsageError(
                    f"there is no option {option[:60]}{meant(option, known)}", hint=f"See `{parser.prog} --help`."
                )


class _Subcommands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Lets the help of each subcommand begin with its line in the list of commands, unless it has a description."""

    def add_parser(self, name: str, **options: Any) -> Any:
        if line := options.get("help"):
            options.setdefault("description", f"{line[0].upper()}{line[1:]}.")
        return super().add_parser(name, **options)


class _Lines(argparse.HelpFormatter):
    """Wraps help as usual, except for paragraphs that have lines of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(part if "\n" in part else fill(part, width, indent) for part in text.split("\n\n"))


def _examples(parser: CommandParser) -> list[str]:
    """Examples of a command; of one that only has subcommands, all of a single one's, or each first of three."""
    inner = [lines for command in parser.commands().values() if (lines := _examples(command))]
    if not inner:
        return examples_of(parser.prog)
    return inner[0] if len(inner) == 1 else [lines[0] for lines in inner[:3]]


def _bounded_int(text: str) -> int:
    value = int(text)
    if not -MAX_INT <= value <= MAX_INT:
        raise argparse.ArgumentTypeError(f"expected a whole number of at most 64 bits, got {text!r}")
    return value


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _reworded(message: str) -> str:
    """argparse's error, in our words for what is no number; for an unknown command or choice with a suggestion instead
    of the list of all."""
    if (number := _NUMBER.search(message)) is not None:
        return f"{message[: number.start()]}expected a {_KINDS[number[1]]}, got {number[2]}"
    found = _CHOICE.search(message)
    if found is None:
        return message
    near = meant(found[1], [name.strip(" '") for name in found[2].split(",")])
    return f"{message[: found.start()]}invalid choice: {found[1]!r}{near}" if near else message


def print_error(message: str) -> None:
    """Write one line to stderr, after the traceback where that is enabled."""
    if os.environ.get(DEBUG) == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    word = "\x1b[1;31merror:\x1b[0m" if colour else "error:"
    print(word, " ".join(message.split()), file=sys.stderr)
