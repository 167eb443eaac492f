"""`fedprune-server`: run a job on a fleet, look at it, take its model out."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

from fedprune import __version__
from fedprune.core.cli import run_command, with_extra
from fedprune.core.command_parser import CommandParser
from fedprune.core.errors import ExitCode

# By command: the module of this package that has its options, and its help text. Modules are named, not imported: a
# command imports only its own, and what takes long (a second in all) not before it runs.
COMMANDS = {
    "run": ("run", "run a job, or continue with one after a stop or crash"),
    "status": ("job_options", "show devices and rounds of a state folder"),
    "export-model": ("job_options", "write the global model of a state folder"),
    "init": ("fleet_options", "make this server's identity: its keys and certificate authority"),
    "identity": (
        "fleet_options",
        "show this server's identity, certify its console, or replace its signing key or authority",
    ),
    "claim": ("fleet_options", "make one-time claims, each of which lets one device in"),
    "devices": ("fleet_options", "list devices, approve one that waits, revoke or replace one"),
    "broker-config": ("fleet_options", "write a broker's configuration, access rules and certificate"),
    "demo": ("job_options", "six devices, a broker and a server on this machine: narrow models against FedAvg"),
    "release": ("fleet_options", "make a signed release of the boards' runtime"),
    "rollout": ("fleet_options", "give boards a release in stages, pause, stop, take back"),
    "check": ("job_options", "check that everything a job needs is present and undamaged"),
    "backup": ("job_options", "copy everything a job needs, also while its server runs"),
    "restore": ("job_options", "make a state folder from a backup"),
    "config": ("config", "check settings, and show where each comes from"),
    "alerts": ("alerts", "send a test notification"),
    "health": ("health", "check that a server is alive, by the file that it touches (FEDPRUNE_PULSE)"),
    "crashes": ("job_options", "show crashes of the boards' programs"),
    "doctor": ("job_options", "explain what is wrong with a fleet, and what to do"),
    "operators": ("fleet_options", "manage the accounts of the console"),
    "pause": ("fleet_options", "pause a job of a running server that has a console"),
    "resume": ("fleet_options", "let a paused job go on"),
}

# Commands that need the extra `console` instead of `server`: their modules import the console's.
_CONSOLE_COMMANDS = ("operators", "pause", "resume")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    with _end_on_sigterm() if arguments[:1] == ["run"] else nullcontext():
        return run_command("fedprune-server", lambda: build_parser(arguments[:1]), arguments)


@contextmanager
def _end_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end a server that is still starting as it ends one that runs: with 0, after all cleanup."""

    def end(_number: int, _frame: object) -> None:
        os.write(2, b"stopped by SIGTERM\n")  # print fails where the signal has interrupted another print
        raise SystemExit(int(ExitCode.OK))

    if threading.current_thread() is not threading.main_thread():  # only it may set signal handlers
        yield
        return
    former_handler = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former_handler)


def build_parser(arguments: Sequence[str] | None = None) -> CommandParser:
    """The parser, with the options of the commands in `arguments` only (None: of all), whose imports take time."""
    parser = CommandParser(
        prog="fedprune-server",
        description="Train one model on a fleet of unequal boards.",
        epilog="Exit codes are explained in docs/exit-codes.md.",
    )
    parser.add_argument("--version", action="version", version=f"fedprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text)
        extra = "console" if name in _CONSOLE_COMMANDS else "server"
        if arguments is None or name in arguments:
            with_extra(extra, partial(_add_options, name, command))(argparse.Namespace())
        command.set_defaults(run=with_extra(extra, lambda arguments: arguments.function(arguments)))
    return parser


def _add_options(name: str, parser: argparse.ArgumentParser, _: argparse.Namespace) -> None:
    module = importlib.import_module(f"fedprune_server.cli.{COMMANDS[name][0]}")
    getattr(module, f"add_{name.replace('-', '_')}")(parser)


if __name__ == "__main__":
    sys.exit(main())
