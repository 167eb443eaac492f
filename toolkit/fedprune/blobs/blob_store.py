"""Blob stores: folders of files that are named by the sha256 of their content.

A file appears under its name only when it is whole and on the disk; until then it grows in `partial/`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import partial
from io import RawIOBase
from pathlib import Path

from fedprune.blobs.blob_ref import (
    DIGEST_BYTES,
    LEAF_BYTES,
    TABLE_SUFFIX,
    BlobRef,
    leaf_table,
    read_table_file,
    table_file,
)
from fedprune.blobs.partial_blob import BlobFolder, PartialBlob, process_name
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.validation import is_digest

# Default limit of one blob's size.
DEFAULT_MAX_BYTES = 2**30

# Default number of bytes that stay free on the disk.
DEFAULT_RESERVE_BYTES = 1024 * 1024

# Verified files that are remembered, of some 350 bytes each. One that was forgotten is only hashed again.
_MAX_VERIFIED_FILES = 4096

# The key and size of an object in a bucket, by the digest of its blob.
BucketObjects = Mapping[str, tuple[str, int]]

_MISSING_BLOB_HINT = (
    "Was the folder copied in part, or something in it deleted? Restore a backup of it, or begin in a new one."
)


class MissingBlobError(StorageError):
    """A store doesn't have a blob."""


class BlobStore(BlobFolder):
    """A content-addressed folder, with a file of the leaf table next to each blob that has several leaves.

    A subclass may keep its blobs elsewhere, with the folder as a cache. The methods about that place do nothing here.

    Args:
        sweep: Remove unfinished files of dead processes. Not for a folder that several machines share: a process of
            another machine would look dead.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_size: int = DEFAULT_MAX_BYTES,
        reserve: int = DEFAULT_RESERVE_BYTES,
        durable: bool = True,
        sweep: bool = True,
    ) -> None:
        super().__init__(root, max_size, reserve, durable=durable)
        self._verified_states: dict[str, tuple[int, int, int]] = {}
        if sweep:
            # Remove the temporary files of processes that have ended.
            for path in (self.root / "tmp").iterdir():
                name = path.name.split("-")[0]
                pid = name.split(".")[0]
                # With its start time a process is known even in a container, whose server always gets the same id.
                if pid.isdigit() and name != process_name(pid):
                    path.unlink(missing_ok=True)

    def put(self, data: bytes | memoryview) -> BlobRef:
        """Store these bytes, unless the store has them already. Raises `StorageFullError` if the disk is full, or the
        blob is larger than the store allows."""
        table = leaf_table(data)
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(table).hexdigest())
        if not self._is_complete(ref):
            self.check_room(ref.size)
            self.write_file(self.path(ref.sha256), data)
            self._store_table(ref.sha256, table)
        return ref

    def ref(self, sha256: str) -> BlobRef:
        """The reference of a blob that is here. Raises `StorageError` if it is not here."""
        return BlobRef(sha256, self.size(sha256), hashlib.sha256(self.table(sha256)).hexdigest())

    def size(self, sha256: str) -> int:
        """Bytes of a blob that is here. Raises `MissingBlobError` if it is not here."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError as error:
            raise self._missing_error(sha256) from error

    def read(self, sha256: str) -> bytes:
        """A blob's bytes, checked against its name. Raises `MissingBlobError` if it is not here, and `StorageError` if
        it is damaged."""
        path = self.path(sha256)
        try:
            with storage_errors(f"can't read {path}", missing=True):
                data = read_file(path)
        except FileNotFoundError as error:
            raise self._missing_error(sha256) from error
        self._check_digest(sha256, data)
        return data

    def map(self, sha256: str) -> memoryview:
        """A blob's bytes as a memory-mapped view, verified at the first call and after the file has changed. Raises
        `StorageError` if it is not here, or damaged.

        For what is large and shared or read again, such as models. A page that can't be read later, because the disk
        fails or the file was cut short, ends the process with SIGBUS; `read` raises `StorageError`.
        """
        self.size(sha256)
        path = self.path(sha256)
        with storage_errors(f"can't read {path}"), path.open("rb") as file:
            status = os.fstat(file.fileno())
            # An empty file can't be mapped.
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b"")
        # Who can write to the folder can also forge a time stamp: this finds failing disks, not attackers.
        file_state = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._verified_states.get(sha256) != file_state:
            self._check_digest(sha256, view)
            if len(self._verified_states) >= _MAX_VERIFIED_FILES:
                self._verified_states.clear()  # at once, since other threads may add some
            self._verified_states[sha256] = file_state
        return view

    def _missing_error(self, sha256: str) -> MissingBlobError:
        return MissingBlobError(f"blob {sha256} is not in {self.root}", hint=_MISSING_BLOB_HINT)

    def _check_digest(self, sha256: str, data: bytes | memoryview) -> None:
        """Raise `StorageError` if these bytes don't have the digest that is the blob's name."""
        path = self.path(sha256)
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                f"blob {path} is damaged",
                hint="On a board delete the file: it is fetched again. A server's or a simulation's comes back from a "
                "backup only; without one begin in a new folder.",
            )

    def open(self, sha256: str) -> RawIOBase:
        """A blob's file, to be read in pieces without verification. Raises `StorageError` if the blob is not here or
        can't be read."""
        path = self.path(sha256)
        with storage_errors(f"can't read {path}"):
            return path.open("rb", buffering=0)

    def read_leaves(self, sha256: str, first: int, count: int) -> bytes:
        """The bytes of `count` leaves from leaf `first` on, as far as the blob goes, without verification. Raises
        `StorageError` if the blob is not here or can't be read."""
        with self.open(sha256) as file, storage_errors(f"can't read {self.path(sha256)}"):
            return os.pread(file.fileno(), count * LEAF_BYTES, first * LEAF_BYTES)

    def table(self, sha256: str) -> bytes:
        """The leaf table of a blob that is here, computed again if its file is missing or damaged. Raises
        `StorageError` if the blob is not here or can't be read."""
        count = -(-self.size(sha256) // LEAF_BYTES)
        path = self._table_path(sha256)
        with suppress(FileNotFoundError), storage_errors(f"can't read {path}", missing=True):
            # A blob of one leaf has no table file: the digest of its leaf is its own name.
            stored_table = read_table_file(path.read_bytes(), count) if count > 1 else bytes.fromhex(sha256) * count
            if stored_table is not None:
                return stored_table
        table = leaf_table(self.read(sha256))
        self._store_table(sha256, table)
        return table

    def partial(self, ref: BlobRef, *, vouched: bool = False) -> PartialBlob:
        """The partial blob of a transfer, with the leaves that have arrived; for `vouched` see `PartialBlob`."""
        return PartialBlob(self, ref, vouched=vouched)

    def delete(self, sha256: str) -> None:
        """Delete a blob, whole or partial, if it is in the store. Raises `StorageError` if the disk fails."""
        path = self.path(sha256)
        self._verified_states.pop(sha256, None)
        with storage_errors(f"can't delete {path}"):
            path.unlink(missing_ok=True)
            self._table_path(sha256).unlink(missing_ok=True)
        self.drop_partial(sha256)

    def drop_partial(self, sha256: str) -> None:
        """Delete the leaves of a blob that is not complete. Raises `StorageError` if the disk fails."""
        with storage_errors(f"can't tidy {self.root / 'partial'}"):
            for name in (sha256, sha256 + TABLE_SUFFIX):
                (self.root / "partial" / name).unlink(missing_ok=True)

    def drop_partials(self, kept_digests: AbstractSet[str]) -> None:
        """Delete partial blobs, except these. Raises `StorageError` if the disk fails."""
        folder = self.root / "partial"
        with storage_errors(f"can't tidy {folder}"):
            for path in folder.iterdir():
                if path.name.removesuffix(TABLE_SUFFIX) not in kept_digests:
                    path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Digests of all blobs that are here, sorted."""
        return sorted(p.name for p in self.root.glob("[0-9a-f][0-9a-f]/*") if is_digest(p.name))

    # From here on: the place where blobs are kept, which is the folder itself unless a subclass says otherwise.

    def describe(self) -> str:
        """The place where blobs are kept, for messages."""
        return str(self.root)

    def local(self) -> BlobStore:
        """A store of the blobs that can be read without waiting for another machine."""
        return self

    def opener(self) -> Callable[[], BlobStore]:
        """A function that opens this store in another process, perhaps of another machine. It can be pickled."""
        return partial(_open_shared, self.root.resolve(), durable=self.durable)

    def claim(self, number: str, job: str, model: bytes) -> None:
        """Mark the place as that of a job, and store the job's first model there."""

    def first_model(self) -> bytes | None:
        """The model that `claim` stored, if it did."""
        return None

    def flush(self, sha256: str) -> None:
        """Copy a blob of the folder to the place where blobs are kept. Raises `StorageError` if it isn't here, or is
        damaged."""

    @property
    def is_unreachable(self) -> bool:
        """Whether the place can't be used at the moment, so that updates wait."""
        return False

    def note_objects(self, news: BucketObjects) -> None:
        """Note blobs that a worker process has stored in the place."""

    def take_new_objects(self) -> BucketObjects:
        """The blobs stored since the last call, for another process's `note_objects`."""
        return {}

    def url_for(self, ref: BlobRef, seconds: int) -> tuple[str, str] | None:
        """Key and URL of a new object as which a device may upload a blob for some seconds; None if it can't."""
        return None

    def adopt_upload(self, ref: BlobRef, keys: Sequence[str] = ()) -> bool:
        """Verify what a device has uploaded as this blob, and keep it if it is genuine; returns whether it is."""
        return self.has(ref.sha256)

    def delete_objects(self, keys: Iterable[str]) -> None:
        """Delete, in the background, objects that are not known to be blobs."""

    def close(self) -> None:
        """Wait for work in the background, for some seconds at most."""

    def _is_complete(self, ref: BlobRef) -> bool:
        """Whether the blob is here with the right length. A file that a failing disk cut short is written again."""
        try:
            return self.path(ref.sha256).stat().st_size == ref.size
        except FileNotFoundError:
            return False

    def _store_table(self, sha256: str, table: bytes) -> None:
        """Store a leaf table next to its blob if there is room; a missing one is computed again."""
        if len(table) > DIGEST_BYTES:
            with suppress(StorageError):
                self.write_file(self._table_path(sha256), table_file(table), flush=False)

    def _table_path(self, sha256: str) -> Path:
        path = self.path(sha256)
        return path.with_name(path.name + TABLE_SUFFIX)


def _open_shared(root: Path, *, durable: bool) -> BlobStore:
    if not root.is_dir():
        raise StorageError(f"there is no folder {root} on this machine")
    return BlobStore(root, durable=durable, sweep=False)
