"""The argument parser of every command: help with examples, errors in one line with a suggestion."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from fedprune.core.errors import ExitCode, UsageError, did_you_mean
from fedprune.core.validation import MAX_INT
from fedprune.output.examples import examples_of

# Environment variable: with the value 1 errors show their traceback, too.
DEBUG_VARIABLE = "FEDPRUNE_DEBUG"

# argparse's message for an invalid choice. It has no error class per problem, so messages are told apart by their text;
# one that another version of Python words differently is shown as it is.
_INVALID_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from ([^()]*)\)$")

# argparse's message for text that is no number: it names Python's types, which mean nothing to a user.
_INVALID_NUMBER = re.compile(r"invalid (int|float) value: (.*)$", re.DOTALL)

_NUMBER_NOUNS = {"int": "whole number", "float": "number"}


class CommandParser(argparse.ArgumentParser):
    """A parser whose help ends with examples, and whose errors are one line each, without the usage.

    It takes no shortened options, refuses numbers beyond 64 bits, and takes words that may be missing also behind
    options, as in `devices revoke --state DIR NAME`. Parsers of its subcommands are the same.
    """

    def __init__(self, **options: Any) -> None:
        # Without abbreviations, since --round is no --rounds.
        super().__init__(**{"allow_abbrev": False, "formatter_class": _ParagraphFormatter, **options})
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
        print_error(f"{_plain_message(message)}. See `{self.prog} --help`.")
        raise SystemExit(int(ExitCode.USAGE))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse a command line. Raises `UsageError` for an option that there isn't."""
        words = sys.argv[1:] if args is None else list(args)
        self._check_options(words)
        return super().parse_args(words, namespace)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        # argparse binds an optional word to the first gap, before it has read later options: `revoke --state DIR NAME`
        # would lose NAME. Intermixed parsing doesn't.
        optional_words = any(not action.option_strings and action.nargs == "?" for action in self._actions)
        # Intermixed parsing drops "--", and calls this method itself.
        if self._is_intermixing or not optional_words or "--" in (args or ()):
            return super().parse_known_args(args, namespace)
        self._is_intermixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_intermixing = False

    def _check_options(self, words: Sequence[str]) -> None:
        """Refuse a misspelt option with a suggestion, before argparse complains about the argument it should have
        set."""
        parser, option_names = self, self.option_names()
        for word in words:
            commands = parser.commands()
            if word == "--" or (commands and not word.startswith("-") and word not in commands):
                return  # argparse reports an unknown command: without one no option can be checked
            if word in commands:
                parser = commands[word]
                option_names |= parser.option_names()
            option = word.partition("=")[0]
            if option.startswith("--") and option not in option_names:
                what = f"there is no option {option[:60]}{did_you_mean(option, option_names)}"
                raise UsageError(what, hint=f"See `{parser.prog} --help`.")


class _Subcommands(argparse._SubParsersAction):  # type: ignore[type-arg]
    """Lets the help of each subcommand begin with its line in the list of commands, unless it has a description."""

    def add_parser(self, name: str, **options: Any) -> Any:
        if line := options.get("help"):
            options.setdefault("description", f"{line[0].upper()}{line[1:]}.")
        return super().add_parser(name, **options)


class _ParagraphFormatter(argparse.HelpFormatter):
    """Wraps help as usual, except for paragraphs that have lines of their own."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(
            paragraph if "\n" in paragraph else fill(paragraph, width, indent) for paragraph in text.split("\n\n")
        )


def _examples(parser: CommandParser) -> list[str]:
    """Examples of a command. If subcommands have some: all of the only one with any, or the first of each of three."""
    command_examples = [lines for command in parser.commands().values() if (lines := _examples(command))]
    if not command_examples:
        return examples_of(parser.prog)
    return command_examples[0] if len(command_examples) == 1 else [lines[0] for lines in command_examples[:3]]


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


def _plain_message(message: str) -> str:
    """argparse's error for people: no names of types, and a suggestion in place of the list of all choices."""
    if (number := _INVALID_NUMBER.search(message)) is not None:
        return f"{message[: number.start()]}expected a {_NUMBER_NOUNS[number[1]]}, got {number[2]}"
    choice = _INVALID_CHOICE.search(message)
    if choice is None:
        return message
    suggestion = did_you_mean(choice[1], [name.strip(" '") for name in choice[2].split(",")])
    return f"{message[: choice.start()]}invalid choice: {choice[1]!r}{suggestion}" if suggestion else message


def print_error(message: str) -> None:
    """Write one line to stderr, after the traceback where `DEBUG_VARIABLE` asks for it."""
    if os.environ.get(DEBUG_VARIABLE) == "1" and sys.exc_info()[0] is not None:
        traceback.print_exc()
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    print("\x1b[1;31merror:\x1b[0m" if colour else "error:", " ".join(message.split()), file=sys.stderr)
