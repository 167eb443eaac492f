"""Makes a backup of a state folder while its server runs.

A backup is a folder, to which the next backup adds what has changed. Its files are named by their digests. Its manifest
lists them with their places in the state folder. The manifest is written last, so that a backup that breaks off leaves
the earlier one intact.
"""

from __future__ import annotations

import hashlib
import os
import socket
import sqlite3
import time
from contextlib import closing, suppress
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from fedprune import __version__
from fedprune.blobs.blob_store import BlobStore, MissingBlobError
from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import file_digest, file_lock, make_private_folder, open_own_file, read_file, storage_errors
from fedprune.core.errors import ConfigError, StorageError
from fedprune.output.tables import AdvanceBar
from fedprune_server.enrollment.pki import IDENTITY_FOLDER as IDENTITY
from fedprune_server.maintenance.backup_manifest import CONSOLE, DATABASE, NAME, BackupEntry, BackupManifest
from fedprune_server.maintenance.blob_checks import find_blob_files
from fedprune_server.maintenance.job_needs import read_job_needs
from fedprune_server.ota.store import FOLDER as RELEASES
from fedprune_server.storage.blob_place import open_blobs_reader
from fedprune_server.storage.copying import write_snapshot
from fedprune_server.storage.database import copy_sqlite, translate_errors
from fedprune_server.storage.folder_layout import JOBS_FOLDER as FURTHER
from fedprune_server.storage.folder_layout import MODEL_FILE
from fedprune_server.storage.storage import Storage

# A copy is made of one moment, and blobs are read later: a round that ends meanwhile deletes some. Rounds take minutes,
# copies seconds, so that five in a row that fail have another reason.
_MAX_ATTEMPTS = 5
_RETRY_HINT = "Try again; if it stays so, see `fedprune-server check`."
_LOCK = "lock"
_BACKUP_FILES = {NAME, "blobs", "files", FURTHER, _LOCK}
_IDENTITY_FILES = (
    "authority.key", "authority.pem", "crl.pem", "signing.key", "epoch", "server.key", "server.pem",
    "broker.key", "broker.pem", "site",
)  # fmt: skip


class StateChangedError(StorageError):
    """The server continued during the backup, and deleted something that the copied database refers to."""


def back_up(state: Path, target: Path, advance: AdvanceBar) -> BackupManifest:
    """Make a backup of a state folder, on which a server may be running; returns its manifest.

    Args:
        target: The backup's folder, made if missing.
        advance: Called with the bytes that were written, or were there already.

    Raises `ConfigError` if the target is something else, another job's backup, or in the state folder, and
    `StorageError` if the state folder is damaged or the disk fails; an earlier backup stays as it was.
    """
    with storage_errors(f"can't read {target}"):
        is_inside = target.resolve().is_relative_to(state.resolve())
    if is_inside:  # it would be lost together with it
        hint = "Name a place outside, on another disk at best."
        raise ConfigError(f"{target} is in the state folder {state} itself", hint=hint)
    for attempt in count(1):
        try:
            with TemporaryDirectory(prefix="fedprune-backup-") as scratch:
                content = _BackupContent(state, Path(scratch))
                _write(target, content, advance)
                break
        except StateChangedError:
            if attempt == _MAX_ATTEMPTS:
                raise
    return content.manifest


class _BackupContent:
    """The files that go into a backup, as of one moment, and the manifest that lists them."""

    def __init__(self, state: Path, scratch: Path) -> None:
        self._sources: dict[str, Path] = {}
        self._entries: list[BackupEntry] = []
        with Storage.open_existing(state) as storage:
            write_snapshot(storage, scratch / DATABASE)
        with Storage(f"sqlite:///{scratch / DATABASE}", create=False) as database_copy:
            needs = read_job_needs(database_copy)
        self._store = open_blobs_reader(state, needs.settings)  # a bucket is looked through after the copy was made
        self._add(DATABASE, scratch / DATABASE)
        self._add(MODEL_FILE, state / MODEL_FILE)
        for name in _IDENTITY_FILES:  # a file that is lost must not keep the others out of the backup
            self._add_if_present(state, scratch, f"{IDENTITY}/{name}")
        self._add_if_present(state, scratch, CONSOLE)
        if (state / RELEASES).is_dir():
            for digest, path in find_blob_files(state / RELEASES).blobs.items():
                self._add(f"{RELEASES}/{digest[:2]}/{digest}", path)
        try:
            for digest in sorted(needs.references | (needs.models & set(self._store.names()))):
                self._entries.append(BackupEntry(f"blobs/{digest[:2]}/{digest}", digest, self._store.size(digest)))
        except MissingBlobError as error:
            raise StateChangedError(error.what, hint=_RETRY_HINT) from error
        job = needs.settings["job"]["name"]
        self.manifest = BackupManifest(
            job, needs.settings["model"], needs.state.round, int(time.time()), __version__, tuple(self._entries),
            f"{socket.gethostname()}:{state.resolve()}",
        )  # fmt: skip

    def read(self, entry: BackupEntry) -> bytes:
        if entry.is_blob:
            try:
                return self._store.read(entry.sha256)
            except MissingBlobError as error:
                raise StateChangedError(error.what, hint=_RETRY_HINT) from error
        path = self._sources[entry.path]
        try:
            with (
                storage_errors(f"can't read {path}", missing=True),
                os.fdopen(open_own_file(path, os.O_RDONLY), "rb") as file,
            ):
                data = file.read()
        except FileNotFoundError as error:
            raise StateChangedError(f"blob {path.name} is missing", hint=_RETRY_HINT) from error
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise StateChangedError(f"{path} changes all the time")
        return data

    def _add_if_present(self, state: Path, scratch: Path, path: str) -> None:
        """Add a file if it exists; a database is copied as of one moment."""
        source = state / path
        if not source.exists():
            return
        if source.suffix == ".db":
            copy_sqlite(source, scratch / source.name)
            source = scratch / source.name
            if path == CONSOLE:
                _end_sessions(source)
        elif source.suffix != ".key":
            with storage_errors(f"can't read {source}"):
                data = read_file(source, own=True)  # it may change; keys don't, and a copy of one would lie in /tmp
            source = scratch / source.name
            write_atomically(source, data, private=True)
        self._add(path, source)

    def _add(self, path: str, source: Path) -> None:
        with storage_errors(f"can't read {source}"):
            entry = BackupEntry(path, file_digest(source), source.stat().st_size)
        self._sources[path] = source
        self._entries.append(entry)


def _end_sessions(copy: Path) -> None:
    """Delete sessions and orders from a copy of the console's database: a restored one must not carry them out."""
    with translate_errors(str(copy)), closing(sqlite3.connect(copy)) as connection:
        connection.execute("PRAGMA secure_delete=ON")  # SQLite leaves deleted rows readable in the file otherwise
        for table in ("sessions", "orders"):
            if connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone():
                with connection:
                    connection.execute(f"DELETE FROM {table}")  # noqa: S608  # nosec B608  # names of ours


def _write(target: Path, content: _BackupContent, advance: AdvanceBar) -> None:
    _check_target(target, content.manifest)
    with storage_errors(f"can't make {target}"):
        make_private_folder(target)
        for name in ("blobs", "files"):
            (target / name).mkdir(mode=0o700, exist_ok=True)
    with file_lock(target / _LOCK, f"another backup is being written to {target}", "Wait until it is done."):
        for entry in content.manifest.entries:
            path = target / entry.backup_path
            if not _has_copy(path, entry):
                with storage_errors(f"can't make {path.parent}"):
                    path.parent.mkdir(exist_ok=True)
                write_atomically(path, content.read(entry), private=entry.is_private)
            advance(entry.size)
        # The manifest last, then the pruning: at every moment the folder has one whole backup.
        write_atomically(target / NAME, content.manifest.to_bytes(), private=True)
        _prune(target, {e.backup_path for e in content.manifest.entries})


def _check_target(target: Path, manifest: BackupManifest) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file", expected="a folder")
    with storage_errors(f"can't read {target}"):
        names = (p.name for p in target.iterdir())
        foreign_files = sorted(n for n in names if n not in _BACKUP_FILES and not n.startswith("."))
    if foreign_files:
        what = f"{target} has other things in it, such as {foreign_files[0]}"
        raise ConfigError(what, hint="Name a folder of its own for backups.")
    if (target / NAME).exists():
        with suppress(StorageError, OSError):  # one that is damaged is replaced
            earlier_manifest = BackupManifest.parse(read_file(target / NAME), str(target / NAME))
            if (earlier_manifest.job, earlier_manifest.model) != (manifest.job, manifest.model):
                what = f"{target} is a backup of another job, {earlier_manifest.job}"
                raise ConfigError(what, hint="Name another folder, or delete it.")


def _has_copy(path: Path, entry: BackupEntry) -> bool:
    """Whether the backup already has an undamaged copy of a file. Its size proves nothing: disks damage files."""
    if not path.is_file() or path.stat().st_size != entry.size:
        return False
    with storage_errors(f"can't read {path}"):
        return file_digest(path) == entry.sha256


def _prune(target: Path, kept_places: set[str]) -> None:
    """Delete files that only earlier backups have."""
    store = BlobStore(target / "blobs")  # opening it also removes what dead writers have left
    for digest in store.names():
        if f"blobs/{digest[:2]}/{digest}" not in kept_places:
            store.delete(digest)
    for path in [*(target / "files").iterdir(), *store.root.glob("??/.*.partial")]:
        if f"files/{path.name}" not in kept_places:
            path.unlink(missing_ok=True)
