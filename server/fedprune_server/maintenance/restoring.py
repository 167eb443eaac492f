"""A state folder made from a backup, after all of the backup was found to be whole."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked, storage_errors, sync_folder
from fedprune.core.errors import ConfigError, StorageError
from fedprune.output.tables import Advance
from fedprune.security.signed_channel import EpochFile
from fedprune_server.enrollment.pki import FOLDER as IDENTITY
from fedprune_server.maintenance.backup_manifest import DATABASE, NAME, Entry, Manifest, record_restore
from fedprune_server.maintenance.inventory import inventory
from fedprune_server.storage.copying import fill
from fedprune_server.storage.state_folder import keep as keep_place
from fedprune_server.storage.state_folder import url_of
from fedprune_server.storage.storage import Storage

_MAX_MANIFEST = 64 * 2**20
_HINT = "Take another backup."

Read = Callable[[str, int], bytes]
"""Reads a file of a backup, which must not be larger than a limit."""


class Backup:
    """A backup that is read from. Raises `StorageError` if it is no backup, or damaged."""

    def __init__(self, path: Path, read: Read) -> None:
        self._path, self._read_file = path, read
        self.manifest = Manifest.parse(read(NAME, _MAX_MANIFEST), f"{path}: {NAME}")

    def verify(self, advance: Advance) -> None:
        """Make sure that the backup is whole, and that the job finds in it all that it refers to."""
        for entry in self.manifest.entries:
            self._read(entry)
            advance(entry.size)
        with (
            self._database() as copy,
            Storage(f"sqlite:///{copy}") as storage,
        ):  # migrated if older
            needs = inventory(storage)
        missing = needs.references - {e.sha256 for e in self.manifest.entries if e.blob}
        if missing:
            raise StorageError(f"the backup {self._path} lacks what its job needs: blob {min(missing)} is missing")

    def restore(self, target: Path, database: str | None, advance: Advance) -> None:
        """Make a state folder of a backup that was verified: it appears whole, or not at all.

        Args:
            target: The state folder, which isn't there, or is empty.
            database: URL of an empty database; None for SQLite in the folder.
            advance: Told how many bytes were written.

        Raises:
            ConfigError: Something is there already.
            StorageError: The backup is damaged, or the disk fails or is full; nothing is left behind.
        """
        target = target.absolute()
        check_target(target)
        partial = target.with_name(f".{target.name}.restoring")
        with storage_errors(f"can't make {partial}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        lock = target.with_name(f".{target.name}.restoring.lock")
        with locked(lock, f"another restore to {target} is under way", "Wait until it is done."):
            try:
                _remove(partial)  # what one that was killed has left
                self._write(partial, database, advance)
                with storage_errors(f"can't make {target}"):
                    with suppress(FileNotFoundError):
                        target.rmdir()  # which is empty
                    partial.replace(target)
                    sync_folder(target.parent)
            finally:
                _remove(partial)
                lock.unlink(missing_ok=True)

    def _write(self, folder: Path, database: str | None, advance: Advance) -> None:
        with storage_errors(f"can't make {folder}"):
            folder.mkdir(mode=0o700)
        for entry in self.manifest.entries:
            if database is not None and entry == self.manifest.database:
                continue
            path = folder / entry.path
            with storage_errors(f"can't make {path.parent}"):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_whole(path, self._read(entry), private=entry.private)
            advance(entry.size)
        if self.manifest.has_identity:
            EpochFile(folder / IDENTITY / "epoch").pass_over()
            record_restore(folder, self.manifest)
        if database is not None:
            with self._database() as copy:
                fill(url_of(folder, database), copy, self.manifest.digest())
            keep_place(folder, url_of(folder, database))
        with storage_errors(f"can't write {folder}"):
            sync_folder(folder)

    @contextmanager
    def _database(self) -> Iterator[Path]:
        """A copy of the backup's database."""
        with TemporaryDirectory(prefix="fedprune-restore-") as scratch:
            path = Path(scratch) / DATABASE
            write_whole(path, self._read(self.manifest.database), private=True)
            yield path

    def _read(self, entry: Entry) -> bytes:
        data = self._read_file(entry.place, entry.size)
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise StorageError(f"the backup {self._path} is damaged: {entry.place}", hint=_HINT)
        return data


@contextmanager
def opened(path: Path) -> Iterator[Backup]:
    """Open a backup, a folder or a tar file; raises `StorageError` if it is missing or damaged."""
    if path.is_dir():
        yield Backup(path, lambda place, limit: _read_file(path / place, limit))
        return
    with storage_errors(f"can't read {path}"):
        try:
            with tarfile.open(path, "r:") as tar:
                members = {m.name: m for m in tar.getmembers() if m.isreg()}
                yield Backup(path, lambda place, limit: _read_member(tar, members.get(place), place, limit))
        except (tarfile.TarError, EOFError) as error:
            raise StorageError(f"{path} is no backup, or damaged ({error})", hint=_HINT) from error


def check_target(target: Path) -> None:
    """Make sure that nothing would be overwritten; raises `ConfigError`."""
    with storage_errors(f"can't look at {target}"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(
                f"{target} is there already, and isn't empty", hint="Restore to a new folder, or move that one away."
            )


def _read_file(path: Path, limit: int) -> bytes:
    with storage_errors(f"can't read {path}"):
        if path.stat().st_size > limit:
            raise StorageError(f"{path} is damaged: it is too long", hint=_HINT)
        return path.read_bytes()


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo | None, place: str, limit: int) -> bytes:
    file = None if member is None or member.size > limit else tar.extractfile(member)
    if file is None:
        raise StorageError(f"{tar.name!s}: {place} is missing or too long", hint=_HINT)
    with file:
        return file.read()


def _remove(folder: Path) -> None:
    with storage_errors(f"can't delete {folder}"):
        if folder.exists():
            shutil.rmtree(folder)
