"""Restores a state folder from a backup, after every file of the backup was verified."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from fedprune.core.atomic_file import atomic_write
from fedprune.core.disk import file_lock, flush_folder, make_private_folder, open_file, storage_errors
from fedprune.core.errors import ConfigError, StorageError
from fedprune.output.tables import AdvanceBar
from fedprune.security.epoch_file import EpochFile
from fedprune_server.enrollment.pki import IDENTITY_FOLDER as IDENTITY
from fedprune_server.maintenance.backup_manifest import DATABASE, NAME, BackupEntry, BackupManifest, record_restore
from fedprune_server.maintenance.job_needs import read_job_needs
from fedprune_server.storage.copying import fill_database
from fedprune_server.storage.folder_layout import database_url, store_url
from fedprune_server.storage.storage import Storage

# An entry has some 200 bytes, so that this is enough for 300,000 files; a larger file is no manifest.
_MAX_MANIFEST_BYTES = 64 * 2**20
_DAMAGE_HINT = "Take another backup."

_CHUNK_BYTES = 2**20


class Backup:
    """A backup to restore from. Raises `StorageError` if the folder is no backup, or damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with _open_file(path / NAME, _MAX_MANIFEST_BYTES) as file:
            self.manifest = BackupManifest.parse(file.read(_MAX_MANIFEST_BYTES), f"{path}: {NAME}")

    def verify(self, advance: AdvanceBar) -> None:
        """Read every file, and raise `StorageError` if one is damaged, or the job refers to a blob that is missing."""
        for entry in self.manifest.entries:
            self._copy(entry)
            advance(entry.size)
        with self._database() as copy, Storage(f"sqlite:///{copy}") as storage:
            needs = read_job_needs(storage)
        missing = needs.references - {e.sha256 for e in self.manifest.entries if e.is_blob}
        if missing:
            raise StorageError(f"the backup {self._path} lacks what its job needs: blob {min(missing)} is missing")

    def restore(self, target: Path, database: str | None, advance: AdvanceBar) -> None:
        """Make a state folder of a backup that was verified: it appears whole, or not at all.

        `database` is the URL of an empty database; None for SQLite in the folder. Raises `ConfigError` if the target
        isn't empty, and `StorageError` if the backup is damaged or the disk fails; then nothing is left behind.
        """
        target = target.absolute()
        check_target(target)
        partial = target.with_name(f".{target.name}.restoring")
        with storage_errors(f"can't make {partial}"):
            make_private_folder(target.parent)
        lock = target.with_name(f".{target.name}.restoring.lock")
        with file_lock(lock, f"another restore to {target} is under way", "Wait until it is done."):
            try:
                _remove(partial)  # left by a restore that was killed
                self._write(partial, database, advance)
                with storage_errors(f"can't make {target}"):
                    with suppress(FileNotFoundError):
                        target.rmdir()  # it is empty
                    partial.replace(target)
                    flush_folder(target.parent)
            finally:
                _remove(partial)
                lock.unlink(missing_ok=True)

    def _write(self, folder: Path, database: str | None, advance: AdvanceBar) -> None:
        with storage_errors(f"can't make {folder}"):
            folder.mkdir(mode=0o700)
        for entry in self.manifest.entries:
            if database is not None and entry == self.manifest.database:
                continue
            path = folder / entry.path
            with storage_errors(f"can't make {path.parent}"):
                make_private_folder(path.parent)
            self._extract(entry, path)
            advance(entry.size)
        if self.manifest.has_identity:
            # The server went on after this backup, and boards refuse messages with numbers that they have seen.
            EpochFile(folder / IDENTITY / "epoch").skip_foreign_epochs()
            record_restore(folder, self.manifest)
        if database is not None:
            with self._database() as copy:
                fill_database(database_url(folder, database), copy, self.manifest.digest())
            store_url(folder, database_url(folder, database))
        with storage_errors(f"can't write {folder}"):
            flush_folder(folder)

    @contextmanager
    def _database(self) -> Iterator[Path]:
        """A copy of the backup's database."""
        with TemporaryDirectory(prefix="fedprune-restore-") as scratch:
            path = Path(scratch) / DATABASE
            self._extract(self.manifest.database, path)
            yield path

    def _extract(self, entry: BackupEntry, path: Path) -> None:
        with atomic_write(path, private=entry.is_private) as file:
            self._copy(entry, file.write)

    def _copy(self, entry: BackupEntry, write: Callable[[bytes], object] = len) -> None:
        """Read a file in chunks, and compare it with its digest."""
        digest, size = hashlib.sha256(), 0
        with _open_file(self._path / entry.backup_path, entry.size) as file:
            while size <= entry.size and (chunk := file.read(_CHUNK_BYTES)):
                digest.update(chunk)
                size += len(chunk)
                write(chunk)
        if size != entry.size or digest.hexdigest() != entry.sha256:
            raise StorageError(f"the backup {self._path} is damaged: {entry.backup_path}", hint=_DAMAGE_HINT)


def check_target(target: Path) -> None:
    """Raise `ConfigError` if something would be overwritten."""
    with storage_errors(f"can't look at {target}"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            hint = "Restore to a new folder, or move that one away."
            raise ConfigError(f"{target} is there already, and isn't empty", hint=hint)


@contextmanager
def _open_file(path: Path, limit: int) -> Iterator[IO[bytes]]:
    with storage_errors(f"can't read {path}"), open_file(path) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise StorageError(f"{path} is damaged: it is too long", hint=_DAMAGE_HINT)
        yield file


def _remove(folder: Path) -> None:
    with storage_errors(f"can't delete {folder}"):
        if folder.exists():
            shutil.rmtree(folder)
