"""`fedprune-server check`, `backup` and `restore`: look after a server's state folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from fedprune.core.cli import add_json, ended_by_signals, print_json
from fedprune.core.disk import held
from fedprune.core.errors import StorageError, UsageError
from fedprune.core.text import amount, quantity
from fedprune.output.tables import byte_progress, print_verdicts
from fedprune_server.cli.state_option import add_allow, add_state
from fedprune_server.maintenance.backup import back_up
from fedprune_server.maintenance.backup_manifest import Manifest, record_backup
from fedprune_server.maintenance.finding import Finding
from fedprune_server.maintenance.repair import repair
from fedprune_server.maintenance.restoring import Backup, check_target
from fedprune_server.maintenance.state_check import check, size_of
from fedprune_server.storage.state_folder import LOCK, folder_lock, folders


def add_check(check: argparse.ArgumentParser) -> None:
    add_state(check)
    check.add_argument(
        "--repair", action="store_true", help="delete what isn't needed, set damaged blobs aside, say what was done"
    )
    check.add_argument(
        "--from", dest="backup", type=Path, metavar="DIR", help="with --repair: a backup to take missing blobs from"
    )
    add_allow(check)
    add_json(check)
    check.set_defaults(function=_check)


def add_backup(backup: argparse.ArgumentParser) -> None:
    add_state(backup)
    backup.add_argument("--to", type=Path, required=True, metavar="PLACE", help="a folder, to which the next adds")
    add_json(backup)
    backup.set_defaults(function=_backup)


def add_restore(restore: argparse.ArgumentParser) -> None:
    restore.add_argument(
        "--from", dest="backup", type=Path, required=True, metavar="PLACE", help="what `backup --to` wrote"
    )
    restore.add_argument("--state", type=Path, required=True, metavar="DIR", help="the new state folder")
    restore.add_argument(
        "--database", metavar="URL", help="of an empty PostgreSQL database (default: SQLite in the folder)"
    )
    restore.add_argument("--dry-run", action="store_true", help="see whether the backup is whole, and write nothing")
    add_json(restore)
    restore.set_defaults(function=_restore)


def _check(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.state
    if arguments.backup is not None and not arguments.repair:
        raise UsageError("--from without --repair", hint="A check alone changes nothing.")
    if arguments.backup is not None and not arguments.backup.is_dir():
        raise UsageError("--from", expected="a backup's folder", got=str(arguments.backup))

    def found(part: Path, *, running: bool) -> list[Finding]:
        with byte_progress(f"reading {part}", size_of(part)) as advance:
            return list(check(part, advance, running=running, allowed=arguments.allow))

    def tell(text: object) -> None:
        if not arguments.json:
            print_verdicts(str(text))

    wrong, told, repaired = 0, [], []
    for part in (folder, *folders(folder)):
        if arguments.repair:
            backup = None if arguments.backup is None else arguments.backup / part.relative_to(folder)
            with folder_lock(part):
                findings = found(part, running=False)
                for finding in findings:
                    tell(finding)
                for done in repair(part, findings, backup):
                    repaired.append(done)
                    tell(f"repaired: {done}")
                findings = found(part, running=False)
                left = [f for f in findings if f.wrong]
                for finding in left:
                    tell(f"still {finding}")
        else:
            findings = found(part, running=held(part / LOCK))
            for finding in findings:
                tell(finding)
        told += [{"folder": str(part), **f.to_dict()} for f in findings]
        wrong += sum(f.wrong for f in findings)
    if arguments.json:
        print_json({"state": str(folder), "wrong": wrong, "findings": told, "repaired": repaired})
    if wrong:
        raise StorageError(
            f"{folder}: {wrong} thing{'s are' if wrong > 1 else ' is'} wrong",
            hint="See above; docs/back-up.md explains what to do.",
        )
    tell(f"{folder}: all that its job needs is there and whole")


def _backup(arguments: argparse.Namespace) -> None:
    state: Path = arguments.state
    has_identity, rows = False, []
    for part in (state, *folders(state)):
        target = arguments.to / part.relative_to(state)
        with ended_by_signals(), byte_progress(f"backing {part} up", size_of(part)) as advance:
            made = back_up(part, target, advance)
        record_backup(part)
        has_identity = has_identity or made.has_identity
        if arguments.json:
            rows.append({"place": str(target), **_facts(made), "private_keys": made.has_identity})
            continue
        print(
            f"{target}: job {made.job} in round {made.round}, {quantity(len(made.entries), 'file')}, "
            f"{amount(made.size, 'bytes')}"
        )
    if arguments.json:
        print_json(rows)
    if has_identity:
        _advise(
            arguments, "it has the server's private keys, with which anyone can pose as the server: keep it private"
        )


def _restore(arguments: argparse.Namespace) -> None:
    target: Path = arguments.state
    backup: Path = arguments.backup
    parts = [backup, *folders(backup)]
    rows = []
    if not arguments.dry_run:
        for part in parts:
            check_target(target / part.relative_to(backup))
    for part in parts:
        with ended_by_signals():
            source = Backup(part)
            manifest = source.manifest
            with byte_progress(f"reading {part}", manifest.size) as advance:
                source.verify(advance)
        rows.append({"place": str(part), **_facts(manifest), "private_keys": manifest.has_identity})
        if arguments.json:
            continue
        print(
            f"{part} is whole: job {manifest.job} in round {manifest.round}, {quantity(len(manifest.entries), 'file')}"
        )
    if arguments.dry_run:
        if arguments.json:
            print_json(rows)
        return
    for part in parts:
        database = arguments.database if part == backup else None
        with ended_by_signals():
            source = Backup(part)
            with byte_progress(f"writing {target}", source.manifest.size) as advance:
                source.restore(target / part.relative_to(backup), database, advance)
            if part == backup:
                manifest = source.manifest
    if arguments.json:
        print_json(rows)
    if manifest.has_operators:
        _advise(
            arguments,
            "the console's operators are those of the backup: remove those again who were removed since, and set new "
            "passwords where they were changed (fedprune-server operators)",
        )
    _advise(arguments, f"to go on: fedprune-server run --state {shlex.quote(str(target))}")
    if manifest.has_identity:
        _advise(
            arguments,
            "first revoke again what was revoked since the backup (docs/identity.md#a-backup-that-is-restored), "
            "and see that the old server doesn't run any more",
        )


def _advise(arguments: argparse.Namespace, text: str) -> None:
    """Print what to do next: next to JSON on stderr."""
    print(text, file=sys.stderr if arguments.json else sys.stdout)


def _facts(made: Manifest) -> dict[str, Any]:
    return {"job": made.job, "round": made.round, "files": len(made.entries), "bytes": made.size}
