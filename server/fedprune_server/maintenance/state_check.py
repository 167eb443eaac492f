"""Checks a state folder for `fedprune-server check`: everything that its job needs must be there, whole and consistent.

Nothing is written. While a server runs on the folder, a finding counts only if it is still true at the end.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

from fedprune.blobs.blob_store import BlobStore
from fedprune.coordination import events as on
from fedprune.coordination import make_coordinator
from fedprune.core import tensorfile
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import ConfigError, FedpruneError, StorageError
from fedprune.jobs.job import Job
from fedprune.output.tables import AdvanceBar
from fedprune_export.importing import import_onnx
from fedprune_server.config.stored_code import stored_job
from fedprune_server.enrollment.pki import IDENTITY_FOLDER as IDENTITY
from fedprune_server.enrollment.store import IdentityStore
from fedprune_server.executor.worker import Worker
from fedprune_server.maintenance import blob_checks
from fedprune_server.maintenance.backup_manifest import CONSOLE
from fedprune_server.maintenance.blob_checks import find_blob_files
from fedprune_server.maintenance.finding import Finding, Repair, Severity
from fedprune_server.maintenance.identity_check import check_identity
from fedprune_server.maintenance.job_needs import JobNeeds, read_job_needs
from fedprune_server.ota.store import FOLDER as RELEASES
from fedprune_server.ota.store import RolloutStore
from fedprune_server.storage.blob_place import BLOBS_FOLDER, open_blobs_reader, open_bucket
from fedprune_server.storage.folder_layout import MODEL_FILE
from fedprune_server.storage.open_database import open_database
from fedprune_server.storage.sqlite_engine import read_only_uri
from fedprune_server.storage.storage import Storage

_EVENT_TYPES: dict[str, Callable[..., on.Event]] = {kind.__name__: kind for kind in get_args(on.Event)}


def blob_bytes(folder: Path) -> int:
    """Bytes that a check reads of a state folder's blobs."""
    store = open_bucket(folder, Storage.read_settings(folder))
    if store is not None:
        objects = sum(size for keys in store.objects().values() for size in keys.values())
        return objects + sum(blob_checks.size_of_file(p) for p in find_blob_files(folder / RELEASES).blobs.values())
    roots = (folder / BLOBS_FOLDER, folder / RELEASES)
    return sum(blob_checks.size_of_file(p) for root in roots for p in find_blob_files(root).blobs.values())


def check_state(
    folder: Path, advance: AdvanceBar, *, running: bool, allowed: Collection[str] = ()
) -> Iterator[Finding]:
    """Check a state folder, on which a server may be `running`; yields findings as they are found.

    `advance`: called with the bytes of blobs that were read; `allowed`: names of functions that may be called: the log
    of a job with a user's own strategy needs it. Raises `StorageError`: there is no database, it is damaged, or it
    can't be read, so that nothing else can be checked.
    """
    with Storage.open_existing(folder) as storage:
        # More thoroughly than at every start. PostgreSQL compares each page with its checksum as it is read below.
        if not storage.database.postgresql:
            with storage.database.read_transaction() as connection:
                reports = [str(r[0]) for r in connection.exec_driver_sql("PRAGMA integrity_check(3)")]
            if reports != ["ok"]:
                problem = f"{storage.url} is damaged ({'; '.join(reports)})"
                raise StorageError(problem, hint="Restore the server's backup.")
        needs = read_job_needs(storage)
        yield from _check_rows(storage, needs)
        yield from _check_model_file(folder, needs)
        files = find_blob_files(folder / BLOBS_FOLDER)
        store = open_bucket(folder, needs.settings)
        if store is not None:
            blob_findings = list(blob_checks.check_bucket(store, files, needs, advance, running=running))
        else:
            blob_findings = list(blob_checks.check_blob_folder(files, needs, advance))
        if running:  # the server may have ended a round meanwhile, and deleted what it no longer needs
            needs = read_job_needs(storage)
            store_now = open_blobs_reader(folder, needs.settings)
            blob_findings = [
                f
                for f in blob_findings
                if f.blob in needs.needed and not (f.repair is Repair.FETCH and store_now.has(f.blob))
            ]
        yield from blob_findings
        yield from blob_checks.left_over_files(files, needs, running=running, cache=store is not None)
        if not running:
            yield from check_log(folder, storage, needs, allowed)
    yield from _check_other_files(folder, advance)


def _check_rows(storage: Storage, needs: JobNeeds) -> Iterator[Finding]:
    numbers = [r.get("round") for r in storage.rounds()]
    if numbers != list(range(1, len(numbers) + 1)):
        yield Finding(Severity.WRONG, f"{storage.url}: the rounds are not 1 to {len(numbers)}", "Restore a backup.")
    if storage.incomplete_rounds():
        yield Finding(Severity.WRONG, f"{storage.url}: participants of rounds are missing", "Restore a backup.")
    if {r["name"] for r in storage.devices()} != set(needs.state.devices):
        yield Finding(Severity.WRONG, f"{storage.url}: the devices are not those of the state", "Restore a backup.")
    last_number = 0
    for number, _, _, body in storage.log.events():
        # Old events are deleted from the front, so that the log may begin anywhere; a gap in it is another matter.
        if last_number and number != last_number + 1:
            gap = f"{storage.url}: the log has nothing between events {last_number} and {number}"
            yield Finding(Severity.NOTE, gap)
        if not isinstance(body, dict):
            yield Finding(Severity.WRONG, f"{storage.url}: event {number} is damaged", "Restore a backup.")
        last_number = number


def _check_model_file(folder: Path, needs: JobNeeds) -> Iterator[Finding]:
    path, problem = folder / MODEL_FILE, ""
    try:
        with storage_errors(f"can't read {path}"):
            if tensorfile.sha256_hex(read_file(path)) != needs.settings.get("model"):
                problem = f"{path} is damaged"
    except StorageError as error:
        problem = error.what
    if problem:
        yield Finding(Severity.WRONG, problem, "Put the model's file back, or restore a backup.")


def _check_other_files(folder: Path, advance: AdvanceBar) -> Iterator[Finding]:
    """Check what doesn't belong to the job: rollouts and their files, the console, and the identity."""
    try:
        with RolloutStore(folder, read_only=True) as store:
            store.entries()
    except StorageError as error:
        yield Finding(Severity.WRONG, error.what, "Restore a backup; boards that have a rollout's release keep it.")
    if (folder / RELEASES).is_dir():
        files = find_blob_files(folder / RELEASES)
        for digest, path in files.blobs.items():
            for finding in blob_checks.check_blob_file(digest, path, files.tables.get(digest), advance, needed=True):
                advice = finding.advice if finding.repair is Repair.DELETE else "Stop the rollout and begin it again."
                yield Finding(finding.severity, finding.message, advice, finding.repair, finding.paths, digest)
    yield from _check_console(folder / CONSOLE)
    if (folder / IDENTITY).is_dir():
        try:
            with open_database(folder, read_only=True) as database:
                IdentityStore(database).devices()
        except StorageError as error:
            yield Finding(Severity.WRONG, error.what, "Restore the server's backup.")
        yield from check_identity(folder / IDENTITY)


def _check_console(path: Path) -> Iterator[Finding]:
    """Check the database with the console's accounts and audit log, if there is one."""
    if not path.exists():
        return
    with storage_errors(f"can't read {path}"):
        mode = path.stat().st_mode
    if mode & 0o077:
        advice = f"See who may have read it, then: chmod 600 {path}"
        yield Finding(Severity.WRONG, f"{path} can be read by other users", advice)
    if trouble := _console_problem(path):
        advice = "Restore a backup of it, or delete it and add the operators again."
        yield Finding(Severity.WRONG, f"{path} is damaged ({trouble})", advice)


def _console_problem(path: Path) -> str:
    """The problem of a console's database; empty if there is none."""
    try:
        with closing(sqlite3.connect(read_only_uri(path), uri=True)) as connection:
            integrity = str(connection.execute("PRAGMA integrity_check(1)").fetchone()[0])
            if integrity != "ok":
                return integrity
            if connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0:
                return ""  # the console has made the file, and no tables yet
            names = connection.execute("SELECT name FROM operators WHERE role NOT IN ('viewer', 'operator', 'admin')")
            unknown_names = sorted(str(row[0]) for row in names)
            connection.execute("SELECT count(*) FROM audit").fetchone()
    except (sqlite3.Error, StorageError) as error:
        return str(error)
    return f"no such roles as those of {', '.join(unknown_names[:5])}" if unknown_names else ""


def check_log(folder: Path, storage: Storage, needs: JobNeeds, allowed: Collection[str] = ()) -> Iterator[Finding]:
    """Replay a job's log in a new coordinator, and report the parts of the state that differ.

    Workers' results are taken from the log, so that this is quick and needs no updates; it proves only that log and
    state belong together.

    No server may run on the folder. `allowed` names functions that may be called, such as a user's own strategy.
    """
    log = storage.log.events()
    first = next(log, None)
    if first is None or first[0] != 1:  # the server deletes the oldest events of a long job
        beginning = "is empty" if first is None else f"begins with event {first[0]}"
        yield Finding(Severity.NOTE, f"the log {beginning}, so that it can't be compared with the state")
        return
    try:
        job = stored_job(needs.settings, allowed, str(folder))
    except ConfigError as error:
        yield Finding(Severity.NOTE, f"the log isn't compared with the state: {error}")
        return
    try:
        different_keys = _different_keys(folder, needs, job, chain([first], log))
    except FedpruneError as error:
        yield Finding(Severity.NOTE, f"the log can't be followed: {error}")
        return
    if different_keys:
        advice = (
            "This is expected if the job's settings or fedprune's version have changed since the job began; the server "
            "logs changed settings when it starts. If neither has changed, restore a backup."
        )
        yield Finding(Severity.NOTE, f"the log ends in another state: {', '.join(different_keys)}", advice)


def _different_keys(
    folder: Path, needs: JobNeeds, job: Job, log: Iterator[tuple[int, float, str, dict[str, Any]]] | chain[Any]
) -> list[str]:
    path = folder / MODEL_FILE
    with storage_errors(f"can't read {path}"):
        raw = read_file(path)
    model = import_onnx(raw, str(needs.settings["name"]))
    with TemporaryDirectory(prefix="fedprune-check-") as scratch:
        state = Worker(job, model, BlobStore(Path(scratch), durable=False), None, None).begin()
    coordinator = make_coordinator(job, model.architecture, state, model.frozen)
    for number, at, kind, body in log:
        try:
            event = _EVENT_TYPES[kind](**body)
        except (KeyError, TypeError) as error:
            raise StorageError(f"event {number} of the log is of another version ({kind}: {error})") from error
        coordinator.handle(event, at)
    replayed, stored = (json.loads(s.to_json()) for s in (state, needs.state))
    return sorted(k for k in replayed.keys() | stored.keys() if replayed.get(k) != stored.get(k))
