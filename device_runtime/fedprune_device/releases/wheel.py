"""Wheels unpacked into a slot without pip, which would need a network and minutes.

Releases and kits are installed by the same function, `install_wheels`. A wheel is a zip file
(https://packaging.python.org/en/latest/specifications/binary-distribution-format/). Its packages are at the root, or
under `*.data/purelib` and `*.data/platlib`; scripts, headers and data have no place in a slot.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from fedprune.core.disk import open_own_file
from fedprune.core.errors import ReleaseError, StorageError, value_text
from fedprune_device.launcher.slot_store import SlotRecord, SlotStore, files_digest
from fedprune_device.launcher.state import DamagedError

MAX_ENTRIES = 50_000
_CHUNK_BYTES = 2**20  # bytes that are unpacked or copied at once
_NO_FILE_ERRORS = (errno.ENOENT, errno.ENOTDIR, errno.EINVAL)
_DATA_PATH = re.compile(r"[^/]+\.data/(?P<scheme>[^/]+)/(?P<rest>.+)")
_PATH_PART = re.compile(r"[^/\\\x00-\x1f\x7f]{1,200}")


class WheelFiles(Protocol):
    """The files of a wheel, wherever they come from; `size` are their bytes and `paths` their paths in a slot."""

    name: str
    size: int
    paths: frozenset[str]

    def unpack(self, folder: Path | None) -> Iterator[tuple[str, str, int]]:
        """Write the files, unsynced, to an empty folder, or only read them; yields path, sha256 and size of each.

        Raises `ReleaseError` if a file is damaged.
        """


class DamagedCopyError(ReleaseError):
    """A file of an installed wheel is not what its slot's record says; the wheel must be fetched.

    Attributes:
        sha256: The wheel's.
    """

    sha256 = ""


class InstalledWheel(WheelFiles):
    """A wheel that a slot has unpacked: its files are copied from there.

    Args:
        slot: The folder of that slot.
        files: sha256 and size of the wheel's files by path, of that slot's record.
        sha256: The wheel's.
    """

    def __init__(self, slot: Path, name: str, files: Mapping[str, tuple[str, int]], sha256: str) -> None:
        self.name = name
        self._slot, self._files, self._sha256 = slot, files, sha256
        self.size = sum(size for _, size in files.values())
        self.paths = frozenset(files)

    def unpack(self, folder: Path | None) -> Iterator[tuple[str, str, int]]:
        for path, (sha256, size) in self._files.items():
            sha256_of_copy, count = hashlib.sha256(), 0
            source = self._source(path)
            if source is not None:
                with source, _create_file(folder, path) as write:
                    while chunk := source.read(_CHUNK_BYTES):
                        sha256_of_copy.update(chunk)
                        count += len(chunk)
                        write(chunk)
            if source is None or (sha256_of_copy.hexdigest(), count) != (sha256, size):
                error = DamagedCopyError(f"{self.name}: {value_text(path)} of the installed release is damaged")
                error.sha256 = self._sha256
                raise error
            yield path, sha256, size

    def _source(self, path: str) -> BinaryIO | None:
        """A file of the slot, open; None if there is none at this path."""
        try:
            # Links are not followed: a slot has none, and they could lead anywhere.
            return os.fdopen(open_own_file(self._slot / path, os.O_RDONLY), "rb")
        except OSError as error:
            if error.errno not in _NO_FILE_ERRORS:
                raise
            return None


class Wheel(WheelFiles):
    """A wheel whose names and sizes have been checked, and which is unpacked as it was checked.

    Raises `ReleaseError` if it isn't a wheel, or a path leads out of the slot.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self.name = name
        try:
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
            raise ReleaseError(f"{name} is no wheel ({error})") from error
        if len(entries) > MAX_ENTRIES:
            raise ReleaseError(f"{name}: too many files", expected=f"at most {MAX_ENTRIES}", got=len(entries))
        self._targets: dict[str, str] = {}
        self.size = 0
        targets: set[str] = set()
        for entry in entries:
            target = self._target(entry)
            if target is None:
                continue
            if target in targets:
                raise ReleaseError(f"{name}: {value_text(target)} is there twice")
            targets.add(target)
            self._targets[entry.filename] = target
            self.size += entry.file_size
        self.paths = frozenset(targets)
        folders = {str(folder) for target in targets for folder in PurePosixPath(target).parents}
        for target in sorted(targets & folders):
            raise ReleaseError(f"{name}: {value_text(target)} is a file and a folder")

    def unpack(self, folder: Path | None) -> Iterator[tuple[str, str, int]]:
        with zipfile.ZipFile(self._path) as archive:
            # Sizes and digests are counted while unpacking: an archive's own statements can't be trusted.
            for member_name, target in self._targets.items():
                entry = archive.getinfo(member_name)
                sha256, size = hashlib.sha256(), 0
                with _create_file(folder, target) as write:
                    for chunk in self._read_chunks(archive, entry, target):
                        size += len(chunk)
                        if size > entry.file_size:
                            break
                        sha256.update(chunk)
                        write(chunk)
                if size != entry.file_size:
                    raise ReleaseError(f"{self.name}: {value_text(target)}", expected=f"{entry.file_size} bytes")
                yield target, sha256.hexdigest(), size

    def _read_chunks(self, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: str) -> Iterator[bytes]:
        """A file's content. OSError here means an offset outside the archive, not a failing disk."""
        try:
            with archive.open(entry) as source:
                while chunk := source.read(_CHUNK_BYTES):
                    yield chunk
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
            raise ReleaseError(f"{self.name}: {value_text(target)} is damaged ({error})") from error

    def _target(self, entry: zipfile.ZipInfo) -> str | None:
        """The path of an entry within a slot; None if it isn't installed."""
        name = entry.filename
        inside = _DATA_PATH.fullmatch(name)
        if inside is not None:
            if inside["scheme"] not in ("purelib", "platlib"):
                return None
            name = inside["rest"]
        if entry.filename.endswith("/"):
            return None
        path_parts = name.split("/")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if (
            len(name) > 1000
            or any(path_part in (".", "..") or not _PATH_PART.fullmatch(path_part) for path_part in path_parts)
            or "__pycache__" in path_parts
            or kind not in (0, stat.S_IFREG)
            or entry.flag_bits & 1
            or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        ):
            raise ReleaseError(f"{self.name}: {value_text(entry.filename)}", expected="a plain file inside the slot")
        return name


def modules_of(wheel: WheelFiles) -> frozenset[str]:
    """Names of the top modules and packages that a wheel brings."""
    tops = {path.split("/")[0] for path in wheel.paths}
    return frozenset(top.split(".")[0] for top in tops if not top.endswith((".dist-info", ".libs")))


def check_distinct(wheels: Iterable[WheelFiles]) -> None:
    """Raise `ReleaseError` if two wheels have a file of the same path."""
    paths = set[str]()
    for wheel in wheels:
        duplicates = sorted(paths & wheel.paths)
        if duplicates:
            raise ReleaseError(f"{wheel.name}: {value_text(duplicates[0])} is in another wheel, too")
        paths |= wheel.paths


def install_wheels(
    store: SlotStore,
    slot: str,
    wheels: Iterable[WheelFiles],
    make_record: Callable[[dict[str, tuple[str, int]]], SlotRecord],
    key: bytes | None = None,
) -> None:
    """Replace what is in a slot that isn't running. Its record is written last, so an interrupted slot counts as empty.

    `make_record` checks what was unpacked, by sha256 and size of each path, and returns the slot's record, which `key`
    (default: the installed one) must have signed. If it raises, the slot is emptied. Raises `ReleaseError` if a wheel
    is damaged, `StorageError` if the disk gives back something else than was written.
    """
    folder = store.root / slot
    store.drop_record(slot)
    empty_folder(folder)
    files: dict[str, tuple[str, int]] = {}
    try:
        for wheel in wheels:
            files |= {path: (sha256, size) for path, sha256, size in wheel.unpack(folder)}
        os.sync()  # once for all files: thousands of syncs wear out a card
        record = make_record(files)
    except BaseException:
        with suppress(OSError):
            empty_folder(folder)
        raise
    store.write_record(slot, record)
    try:
        store.checked_record(slot, from_disk=True, key=key)
    except DamagedError as error:
        store.drop_record(slot)
        raise StorageError(
            f"the disk gives back something else than was written ({error})", hint="It may be failing."
        ) from error


def empty_folder(folder: Path) -> None:
    """Delete what is in a folder; links are deleted, never followed."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def contents_digest(wheels: Iterable[WheelFiles]) -> str:
    return files_digest({path: (sha256, size) for wheel in wheels for path, sha256, size in wheel.unpack(None)})


@contextmanager
def _create_file(folder: Path | None, target: str) -> Iterator[Callable[[bytes], object]]:
    """A new file, as a function that writes to it."""
    if folder is None:
        yield len
        return
    path = folder / target
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(chunk: bytes) -> None:
        while chunk:
            chunk = chunk[os.write(descriptor, chunk) :]

    try:
        yield write
    finally:
        os.close(descriptor)
