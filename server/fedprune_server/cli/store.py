"""`fedprune-server check`, `backup` and `restore`: checks, repairs, backs up and restores a server's state folder."""

from __future__ import annotations

import argparse
import shlex
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedprune.core.cli import print_json, signals_as_interrupts
from fedprune.core.disk import has_lock_holder
from fedprune.core.errors import StorageError, UsageError
from fedprune.core.text import amount, quantity
from fedprune.output.tables import byte_progress, print_verdicts
from fedprune_server.maintenance.backup import back_up
from fedprune_server.maintenance.backup_manifest import CONSOLE, BackupManifest, record_backup
from fedprune_server.maintenance.finding import Finding
from fedprune_server.maintenance.repair import repair
from fedprune_server.maintenance.restoring import Backup, check_target
from fedprune_server.maintenance.state_check import blob_bytes, check_state
from fedprune_server.storage.folder_layout import job_folders
from fedprune_server.storage.folder_lock import LOCK_FILE, folder_lock


def run_check(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.state
    if arguments.backup is not None and not arguments.repair:
        raise UsageError("--from without --repair", hint="A check alone changes nothing.")
    if arguments.backup is not None and not arguments.backup.is_dir():
        raise UsageError("--from", expected="a backup's folder", got=str(arguments.backup))

    def read_findings(job_folder: Path, *, running: bool) -> list[Finding]:
        with byte_progress(f"reading {job_folder}", blob_bytes(job_folder)) as advance:
            return list(check_state(job_folder, advance, running=running, allowed=arguments.allow))

    def print_text(text: object) -> None:
        if not arguments.json:
            print_verdicts(str(text))

    wrong_count, finding_rows, repaired = 0, [], []
    for job_folder in (folder, *job_folders(folder)):
        # A running server could refer to a blob that a repair deletes.
        with folder_lock(job_folder) if arguments.repair else nullcontext():
            running = not arguments.repair and has_lock_holder(job_folder / LOCK_FILE)
            findings = read_findings(job_folder, running=running)
            for finding in findings:
                print_text(finding)
            if arguments.repair:
                backup = None if arguments.backup is None else arguments.backup / job_folder.relative_to(folder)
                for action in repair(job_folder, findings, backup):
                    repaired.append(action)
                    print_text(f"repaired: {action}")
                findings = read_findings(job_folder, running=False)
                for finding in findings:
                    if finding.is_wrong:
                        print_text(f"still {finding}")
        finding_rows += [{"folder": str(job_folder), **f.to_dict()} for f in findings]
        wrong_count += sum(f.is_wrong for f in findings)
    if arguments.json:
        print_json({"state": str(folder), "wrong": wrong_count, "findings": finding_rows, "repaired": repaired})
    if wrong_count:
        raise StorageError(
            f"{folder}: {wrong_count} thing{'s are' if wrong_count > 1 else ' is'} wrong",
            hint="See above; docs/back-up.md explains what to do.",
        )
    print_text(f"{folder}: all that its job needs is there and whole")


def run_backup(arguments: argparse.Namespace) -> None:
    state: Path = arguments.state
    has_identity, rows = False, []
    for job_folder in (state, *job_folders(state)):
        target = arguments.to / job_folder.relative_to(state)
        with signals_as_interrupts(), byte_progress(f"backing {job_folder} up", blob_bytes(job_folder)) as advance:
            manifest = back_up(job_folder, target, advance)
        record_backup(job_folder)
        has_identity = has_identity or manifest.has_identity
        if arguments.json:
            rows.append(_manifest_fields(target, manifest))
            continue
        print(
            f"{target}: job {manifest.job} in round {manifest.round}, {quantity(len(manifest.entries), 'file')}, "
            f"{amount(manifest.size, 'bytes')}"
        )
    if arguments.json:
        print_json(rows)
    if has_identity:
        _print_advice(
            arguments, "it has the server's private keys, with which anyone can pose as the server: keep it private"
        )


def run_restore(arguments: argparse.Namespace) -> None:
    target: Path = arguments.state
    backup: Path = arguments.backup
    source_folders = [backup, *job_folders(backup)]
    # All targets first, then all sources: a restore that can't be finished must not begin.
    if not arguments.dry_run:
        for source_folder in source_folders:
            check_target(target / source_folder.relative_to(backup))
    rows = []
    for source_folder in source_folders:
        with signals_as_interrupts():
            source = Backup(source_folder)
            manifest = source.manifest
            with byte_progress(f"reading {source_folder}", manifest.size) as advance:
                source.verify(advance)
        rows.append(_manifest_fields(source_folder, manifest))
        if arguments.json:
            continue
        files = quantity(len(manifest.entries), "file")
        print(f"{source_folder} is whole: job {manifest.job} in round {manifest.round}, {files}")
    if arguments.dry_run:
        if arguments.json:
            print_json(rows)
        return
    for source_folder in source_folders:
        database = arguments.database if source_folder == backup else None
        with signals_as_interrupts():
            source = Backup(source_folder)
            with byte_progress(f"writing {target}", source.manifest.size) as advance:
                source.restore(target / source_folder.relative_to(backup), database, advance)
            if source_folder == backup:
                manifest = source.manifest
    if arguments.json:
        print_json(rows)
    if any(entry.path == CONSOLE for entry in manifest.entries):
        _print_advice(
            arguments,
            "the console's operators are those of the backup: remove those again who were removed since, and set new "
            "passwords where they were changed (fedprune-server operators)",
        )
    _print_advice(arguments, f"to go on: fedprune-server run --state {shlex.quote(str(target))}")
    if manifest.has_identity:
        _print_advice(
            arguments,
            "first revoke again what was revoked since the backup (docs/identity.md#a-backup-that-is-restored), "
            "and see that the old server doesn't run any more",
        )


def _print_advice(arguments: argparse.Namespace, text: str) -> None:
    """Print what to do next; on stderr if standard output has JSON."""
    print(text, file=sys.stderr if arguments.json else sys.stdout)


def _manifest_fields(folder: Path, manifest: BackupManifest) -> dict[str, Any]:
    body = {"place": str(folder), "job": manifest.job, "round": manifest.round, "files": len(manifest.entries)}
    return {**body, "bytes": manifest.size, "private_keys": manifest.has_identity}
