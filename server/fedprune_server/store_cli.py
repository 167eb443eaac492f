"""`fedprune-server check`: look after a server's state folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fedprune.cli import with_extra
from fedprune.errors import ExitCode, StorageError, UsageError

_STATE = "the folder of `run --state` (default: fedprune-state)"


def add_store_commands(commands: Any) -> None:
    """Add them to the parser's commands."""
    check = commands.add_parser("check", help="see whether all that a job needs is there and whole")
    check.add_argument("--state", type=Path, default=Path("fedprune-state"), metavar="DIR", help=_STATE)
    check.add_argument(
        "--repair", action="store_true", help="delete what isn't needed, set damaged blobs aside, say what was done"
    )
    check.add_argument(
        "--from", dest="backup", type=Path, metavar="DIR", help="with --repair: a backup to take missing blobs from"
    )
    check.set_defaults(run=with_extra("server", _check))


def _check(arguments: argparse.Namespace) -> int:
    from fedprune.disk import held
    from fedprune_server.checkup import check, size_of
    from fedprune_server.finding import Finding, Weight
    from fedprune_server.shown_bytes import shown_bytes
    from fedprune_server.state_folder import folder_lock
    from fedprune_server.storage import LOCK
    from fedprune_server.store_repair import repair

    folder: Path = arguments.state
    if arguments.backup is not None and not arguments.repair:
        raise UsageError("--from without --repair", hint="A check alone changes nothing.")
    if arguments.backup is not None and not arguments.backup.is_dir():
        raise UsageError("--from", expected="a backup's folder", got=str(arguments.backup))

    def found(*, running: bool) -> list[Finding]:
        with shown_bytes(f"reading {folder}", size_of(folder)) as advance:
            return list(check(folder, advance, running=running))

    if arguments.repair:
        with folder_lock(folder):
            findings = found(running=False)
            for finding in findings:
                print(finding)
            for done in repair(folder, findings, arguments.backup):
                print(f"repaired: {done}")
            findings = found(running=False)
            left = [f for f in findings if f.weight is Weight.WRONG]
            for finding in left:
                print(f"still {finding}")
    else:
        findings = found(running=held(folder / LOCK))
        for finding in findings:
            print(finding)
    wrong = sum(f.weight is Weight.WRONG for f in findings)
    if wrong:
        raise StorageError(
            f"{folder}: {wrong} thing{'s are' if wrong > 1 else ' is'} wrong",
            hint="See above; docs/back-up.md says what to do.",
        )
    print(f"{folder}: all that its job needs is there and whole")
    return int(ExitCode.OK)
