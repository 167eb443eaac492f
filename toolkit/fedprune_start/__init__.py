"""Entry points of all commands. Their imports are quick, so that Ctrl-C ends a command from its first moment on.

This package needs the standard library alone; importing a package of fedprune imports numpy.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass

# Exit codes as in `fedprune.core.errors`, which isn't imported yet when they are needed.
_USAGE_EXIT, _INTERRUPTED_EXIT = 2, 4


@dataclass(frozen=True)
class _Command:
    """A subcommand of `fedprune`.

    Attributes:
        module: The module of its command line.
        extra: The extra of fedprune that it needs.
        packages: Packages of that extra; if one is missing, the extra isn't installed.
        description: A description for the help.
    """

    module: str
    extra: str
    packages: tuple[str, ...]
    description: str

    @property
    def is_missing(self) -> bool:
        """Whether its extra is not installed."""
        # Finding a package doesn't import it, which would take seconds for all of them.
        return any(importlib.util.find_spec(name) is None for name in self.packages)


_COMMANDS = {
    "export": _Command(
        "fedprune_export.cli.main", "export", ("onnx", "onnxruntime", "rich"), "cut a model to what a board can train"
    ),
    "simulate": _Command(
        "fedprune_server.cli.simulate",
        "server",
        ("onnx", "onnxruntime", "sqlalchemy"),
        "run a fleet on a virtual clock, compare strategies",
    ),
    "server": _Command(
        "fedprune_server.cli.main", "server", ("onnx", "onnxruntime", "sqlalchemy", "amqtt"), "train a model on a fleet"
    ),
    "device": _Command(
        "fedprune_device.cli.main", "board", ("onnxruntime",), "train and predict on a board, in a fleet or alone"
    ),
    "flash": _Command("fedprune_flash.cli.main", "flash", ("packaging", "rich"), "install fedprune on boards"),
}


def device() -> int:
    return _run("device")


def export() -> int:
    return _run("export")


def flash() -> int:
    return _run("flash")


def server() -> int:
    return _run("server")


def simulate() -> int:
    return _run("simulate")


def main(argv: Sequence[str] | None = None) -> int:
    """`fedprune`: one command that has the others as subcommands; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_help_text(), file=sys.stdout if words else sys.stderr)
        return 0 if words else _USAGE_EXIT
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"fedprune {version('fedprune')}")
        return 0
    if words[0] == "completion":  # no program of its own, so that it isn't in the table
        from fedprune_start.completion import main as completion

        installed = {name: command.module for name, command in _COMMANDS.items() if not command.is_missing}
        return completion(installed, words[1:])
    if words[0] not in _COMMANDS:
        from difflib import get_close_matches

        suggestion = "".join(f" ({name}?)" for name in get_close_matches(words[0], _COMMANDS, 1))
        print(f"error: there is no command {words[0][:60]!a}{suggestion}. See `fedprune --help`.", file=sys.stderr)
        return _USAGE_EXIT
    return _run(words[0], words[1:])


def _help_text() -> str:
    lines = [
        "usage: fedprune COMMAND ...",
        "",
        "Federated learning for fleets of unequal boards: every board trains its own, physically smaller model.",
        "",
        "commands (each has its own --help, and is also a program of its own, such as fedprune-export):",
    ]
    lines += [
        f"  {name:<9} {command.description}" + (f"  [needs the extra {command.extra}]" if command.is_missing else "")
        for name, command in _COMMANDS.items()
    ]
    lines += ["", "`fedprune completion bash` (or zsh) prints what lets a shell complete all of these."]
    lines += ["", "examples:", "  fedprune server demo", "  fedprune simulate new fleet"]
    lines += ["  fedprune export model.onnx --target raspberry-pi-zero-2w --out bundle"]
    if any(command.is_missing for command in _COMMANDS.values()):
        lines += ["", "A command that needs an extra says how to install it when it is run."]
    return "\n".join([*lines, "", "`fedprune --version` prints the version. Exit codes: docs/exit-codes.md."])


def _run(name: str, argv: Sequence[str] | None = None) -> int:
    """Import a command and run it; returns its exit code."""
    # The interpreter's last collections would look through all that was imported: half a second with torch.
    atexit.register(gc.freeze)
    try:
        return int(importlib.import_module(_COMMANDS[name].module).main(argv))
    except KeyboardInterrupt:  # while it was imported
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED_EXIT
