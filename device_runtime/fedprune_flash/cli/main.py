"""`fedprune-flash`: install the runtime on boards."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedprune import __version__
from fedprune.core.cli import run_command
from fedprune.core.command_parser import CommandParser
from fedprune_flash.cli.image import add_image_command
from fedprune_flash.cli.kit import add_kit_command


def main(argv: Sequence[str] | None = None) -> int:
    return run_command("fedprune-flash", build_parser, argv)


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog="fedprune-flash",
        description="Install the runtime on boards.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_kit_command(commands)
    add_image_command(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
