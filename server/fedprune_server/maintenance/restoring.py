"""A state folder made from a backup, after all of the backup was found to be whole."""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked, storage_errors, sync_folder
from fedprune.core.errors import ConfigError, StorageError
from fedprune.output.tables import Advance
from fedprune.security.signed_channel import EpochFile
from fedprune_server.enrollment.pki import FOLDER as IDENTITY
from fedprune_server.maintenance.backup_manifest import NAME, Entry, Manifest
from fedprune_server.maintenance.backup_record import record_restore
from fedprune_server.maintenance.inventory import inventory
from fedprune_server.storage.copying import fill
from fedprune_server.storage.state_folder import keep as keep_place
from fedprune_server.storage.state_folder import url_of
from fedprune_server.storage.storage import Storage

_MAX_MANIFEST = 64 * 2**20


class Source(Protocol):
    """A backup that is read from; `where` is its folder or file, for messages."""

    where: str

    def read(self, place: str, limit: int) -> bytes:
        """A file of it; raises `StorageError` if it is missing, larger than `limit`, or can't be read."""
        ...


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.where = str(path)

    def read(self, place: str, limit: int) -> bytes:
        path = self._path / place
        with storage_errors(f"can't read {path}"):
            if path.stat().st_size > limit:
                raise StorageError(f"{path} is damaged: it is too long", hint="Take another backup.")
            return path.read_bytes()


class _Tar:
    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self.where = str(tar.name)
        self._members: Mapping[str, tarfile.TarInfo] = {m.name: m for m in tar.getmembers() if m.isreg()}

    def read(self, place: str, limit: int) -> bytes:
        member = self._members.get(place)
        file = None if member is None or member.size > limit else self._tar.extractfile(member)
        if file is None:
            raise StorageError(f"{self._tar.name!s}: {place} is missing or too long", hint="Take another backup.")
        with file:
            return file.read()


@contextmanager
def opened(path: Path) -> Iterator[Source]:
    """Open a backup; raises `StorageError` if there is none, or it is damaged."""
    if path.is_dir():
        yield _Folder(path)
        return
    with storage_errors(f"can't read {path}"):
        try:
            with tarfile.open(path, "r:") as tar:
                yield _Tar(tar)
        except (tarfile.TarError, EOFError) as error:
            raise StorageError(f"{path} is no backup, or damaged ({error})", hint="Take another backup.") from error


def read_manifest(source: Source, where: Path) -> Manifest:
    """What a backup has; raises `StorageError` if it is no backup, or damaged."""
    return Manifest.parse(source.read(NAME, _MAX_MANIFEST), f"{where}: {NAME}")


def verify(source: Source, manifest: Manifest, advance: Advance) -> None:
    """Make sure that a backup is whole, and that the job finds in it all that it refers to."""
    for entry in manifest.entries:
        _read(source, entry)
        advance(entry.size)
    with TemporaryDirectory(prefix="fedprune-restore-") as scratch:
        path = Path(scratch) / "server.db"
        write_whole(path, _read(source, manifest.database), private=True)
        with Storage(f"sqlite:///{path}") as storage:  # migrated, where it is of an older version
            needs = inventory(storage)
    missing = needs.references - {e.sha256 for e in manifest.entries if e.blob}
    if missing:
        raise StorageError(f"the backup {source.where} has not all that its job needs: blob {min(missing)} is missing")


def restore(source: Source, manifest: Manifest, target: Path, database: str | None, advance: Advance) -> None:
    """Make a state folder of a backup that was verified: it appears whole, or not at all.

    Args:
        source: The backup.
        manifest: What it has.
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
            _write(source, manifest, partial, database, advance)
            with storage_errors(f"can't make {target}"):
                with suppress(FileNotFoundError):
                    target.rmdir()  # which is empty
                partial.replace(target)
                sync_folder(target.parent)
        finally:
            _remove(partial)
            lock.unlink(missing_ok=True)


def check_target(target: Path) -> None:
    """Make sure that nothing would be overwritten; raises `ConfigError`."""
    with storage_errors(f"can't look at {target}"):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ConfigError(
                f"{target} is there already, and isn't empty", hint="Restore to a new folder, or move that one away."
            )


def _write(source: Source, manifest: Manifest, folder: Path, database: str | None, advance: Advance) -> None:
    with storage_errors(f"can't make {folder}"):
        folder.mkdir(mode=0o700)
    for entry in manifest.entries:
        if database is not None and entry == manifest.database:
            continue
        path = folder / entry.path
        with storage_errors(f"can't make {path.parent}"):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_whole(path, _read(source, entry), private=entry.private)
        advance(entry.size)
    if manifest.has_identity:
        EpochFile(folder / IDENTITY / "epoch").pass_over()
        record_restore(folder, manifest)
    if database is not None:
        with TemporaryDirectory(prefix="fedprune-restore-") as scratch:
            copy = Path(scratch) / "server.db"
            write_whole(copy, _read(source, manifest.database), private=True)
            fill(url_of(folder, database), copy, manifest.digest())
        keep_place(folder, url_of(folder, database))
    with storage_errors(f"can't write {folder}"):
        sync_folder(folder)


def _read(source: Source, entry: Entry) -> bytes:
    data = source.read(entry.place, entry.size)
    if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
        raise StorageError(f"the backup {source.where} is damaged: {entry.place}", hint="Take another backup.")
    return data


def _remove(folder: Path) -> None:
    with storage_errors(f"can't delete {folder}"):
        if folder.exists():
            shutil.rmtree(folder)
