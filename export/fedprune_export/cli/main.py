"""`fedprune-export`: a model and boards in, bundles out; and commands that look at models and bundles."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from fedprune import __version__
from fedprune.core.cli import Command, check_command, run_command, with_extra
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import UsageError

# Commands other than the export, by the first word of the command line: their module and help text. The export has no
# word of its own, so that `fedprune-export MODEL` needs none.
COMMANDS = {
    "groups": ("cli.groups", "the channel groups of a model, and what stays"),
    "operators": ("cli.operators", "every operator that can be cut or trained"),
    "verify": ("cli.verify", "check a bundle: files, graphs, a training step"),
    "to-onnx": ("cli.convert", "a bundle or model as one ONNX file"),
    "to-torch": ("cli.convert", "a bundle's weights as a torch state dict"),
    "profiles": ("cli.profiles", "list, show, check and identify hardware profiles"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in COMMANDS:
        return run_command("fedprune-export", lambda: _command_parser(words[0]), words)
    return run_command("fedprune-export", lambda: _export_parser(words), words)


def _export_parser(words: Sequence[str]) -> CommandParser:
    # An export needs --target; without it the first word is more likely a misspelt command than a model.
    if words and not any(word.startswith("--target") for word in words):
        hint = "See `fedprune-export --help`."
        check_command(words[0], COMMANDS, hint)
        if re.fullmatch("[a-z][a-z-]*", words[0]) and not Path(words[0]).exists():
            expected = f"a model, or one of {', '.join(COMMANDS)}"
            raise UsageError(f"there is no command {words[0][:60]}", expected=expected, hint=hint)
    return build_parser()


def build_parser() -> CommandParser:
    """The grammar of an export."""
    from fedprune_export.cli.export import add_arguments, export_command

    width = max(map(len, COMMANDS))
    parser = CommandParser(
        prog="fedprune-export",
        description="Cut a model to what a board can train, and write the board's bundle.",
        epilog="other commands (each has its own --help):\n"
        + "".join(f"  {name:{width}}  {what}\n" for name, (_, what) in COMMANDS.items())
        + "\nExit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    add_arguments(parser)
    parser.set_defaults(run=with_extra("export", export_command))
    return parser


def _command_parser(name: str) -> CommandParser:
    """The grammar of one of the other commands; its module registers it, and may register further ones."""
    parser = CommandParser(prog="fedprune-export")
    module = importlib.import_module(f"fedprune_export.{COMMANDS[name][0]}")
    module.register(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    # Profiles are the toolkit's: showing them needs no onnx.
    parser.set_defaults(run=_run if name == "profiles" else with_extra("export", _run))
    return parser


def command_parsers() -> dict[str, CommandParser]:
    """The grammar of each of the other commands."""
    return {name: _command_parser(name).commands()[name] for name in COMMANDS}


def _run(arguments: argparse.Namespace) -> int | None:
    function: Command = arguments.function
    return function(arguments)
