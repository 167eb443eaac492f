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

from fedprune.blobs.blob_ref import DIGEST, LEAF, SUFFIX, BlobRef, leaf_table, read_table_file, table_file
from fedprune.blobs.partial_blob import BlobFolder, PartialBlob, process_name
from fedprune.core.disk import read_file, storage_errors
from fedprune.core.errors import StorageError
from fedprune.core.validation import is_digest

# Default limit of one blob's size.
MAX_SIZE = 2**30

# Default number of bytes that stay free on the disk.
RESERVE = 1024 * 1024

# By digest an object's key and size in a bucket.
Objects = Mapping[str, tuple[str, int]]

_LOST = "Was the folder copied in part, or something in it deleted? Restore a backup of it, or begin in a new one."


class MissingBlobError(StorageError):
    """A store doesn't have a blob."""


class BlobStore(BlobFolder):
    """A content-addressed folder, with a file of the leaf table next to each blob that has several leaves.

    A store may keep its blobs elsewhere, with the folder as a cache: what callers ask about that has its trivial answer
    here.

    Args:
        sweep: Remove unfinished files of this machine's dead processes. Not for a folder that machines share: a process
            of another machine would look dead.
    """

    def __init__(
        self,
        root: Path,
        *,
        max_size: int = MAX_SIZE,
        reserve: int = RESERVE,
        durable: bool = True,
        sweep: bool = True,
    ) -> None:
        super().__init__(root, max_size, reserve, durable=durable)
        self._checked: dict[str, tuple[int, int, int]] = {}
        if sweep:
            self._sweep()

    def put(self, data: bytes | memoryview) -> BlobRef:
        """Store these bytes; a second time costs nothing. Raises `StorageFullError` if the disk is full, or the blob
        is larger than the store allows."""
        table = leaf_table(data)
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(table).hexdigest())
        if not self._whole(ref):
            self.check_room(ref.size)
            self.write_file(self.path(ref.sha256), data)
            self._keep_table(ref.sha256, table)
        return ref

    def ref(self, sha256: str) -> BlobRef:
        """The reference of a blob that is here. Raises `StorageError` if it is not here."""
        size = self.size(sha256)
        return BlobRef(sha256, size, hashlib.sha256(self.table(sha256)).hexdigest())

    def size(self, sha256: str) -> int:
        """Bytes of a blob that is here. Raises `MissingBlobError` if it is not here."""
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError as error:
            raise self._missing(sha256) from error

    def read(self, sha256: str) -> bytes:
        """A blob's bytes, checked against its name. Raises `MissingBlobError` if it is not here, and `StorageError` if
        it is damaged."""
        path = self.path(sha256)
        try:
            with storage_errors(f"can't read {path}", missing=True):
                data = read_file(path)
        except FileNotFoundError as error:
            raise self._missing(sha256) from error
        self._expect(sha256, data)
        return data

    def map(self, sha256: str) -> memoryview:
        """A blob's bytes as a memory-mapped view, checked when it is first mapped and once the file has changed. Raises
        `StorageError` if it is not here, or damaged."""
        self.size(sha256)
        path = self.path(sha256)
        with storage_errors(f"can't read {path}"), path.open("rb") as file:
            about = os.fstat(file.fileno())
            # An empty file can't be mapped.
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if about.st_size else b"")
        state = (about.st_ino, about.st_size, about.st_mtime_ns)
        if self._checked.get(sha256) != state:
            self._expect(sha256, view)
            self._checked[sha256] = state
        return view

    def _missing(self, sha256: str) -> MissingBlobError:
        return MissingBlobError(f"blob {sha256} is not in {self.root}", hint=_LOST)

    def _expect(self, sha256: str, data: bytes | memoryview) -> None:
        """Make sure that bytes have the digest in a blob's name."""
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
        """Bytes of `count` leaves from leaf `first` on, as far as the blob goes; not checked. Raises `StorageError`
        if the blob is not here or can't be read."""
        with self.open(sha256) as file, storage_errors(f"can't read {self.path(sha256)}"):
            return os.pread(file.fileno(), count * LEAF, first * LEAF)

    def table(self, sha256: str) -> bytes:
        """The leaf table of a blob that is here; made again if it is missing. Raises `StorageError` if the blob is
        not here or can't be read."""
        count = -(-self.size(sha256) // LEAF)
        path = self._table_path(sha256)
        with suppress(FileNotFoundError), storage_errors(f"can't read {path}", missing=True):
            found = read_table_file(path.read_bytes(), count) if count > 1 else bytes.fromhex(sha256) * count
            if found is not None:
                return found
        table = leaf_table(self.read(sha256))
        self._keep_table(sha256, table)
        return table

    def partial(self, ref: BlobRef, *, vouched: bool = False) -> PartialBlob:
        """The partial blob of a transfer, with the leaves that have arrived; `vouched` as of `PartialBlob`."""
        return PartialBlob(self, ref, vouched=vouched)

    def delete(self, sha256: str) -> None:
        """Delete a blob, whole or partial, if it is in the store. Raises `StorageError` if the disk fails."""
        path = self.path(sha256)
        self._checked.pop(sha256, None)
        with storage_errors(f"can't delete {path}"):
            path.unlink(missing_ok=True)
            self._table_path(sha256).unlink(missing_ok=True)
        self.drop_partial(sha256)

    def drop_partial(self, sha256: str) -> None:
        """Delete what has arrived of a blob that isn't whole. Raises `StorageError` if the disk fails."""
        with storage_errors(f"can't tidy {self.root / 'partial'}"):
            for name in (sha256, sha256 + SUFFIX):
                (self.root / "partial" / name).unlink(missing_ok=True)

    def drop_partials(self, kept: AbstractSet[str]) -> None:
        """Delete partial blobs, except these. Raises `StorageError` if the disk fails."""
        folder = self.root / "partial"
        with storage_errors(f"can't tidy {folder}"):
            for path in folder.iterdir():
                if path.name.removesuffix(SUFFIX) not in kept:
                    path.unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Digests of all blobs that are here, sorted."""
        return sorted(p.name for p in self.root.glob("[0-9a-f][0-9a-f]/*") if is_digest(p.name))

    # Where blobs are kept.

    def describe(self) -> str:
        """Where blobs are kept, for messages."""
        return str(self.root)

    def local(self) -> BlobStore:
        """The blobs that can be read without waiting for another machine."""
        return self

    def opener(self) -> Callable[[], BlobStore]:
        """Opens this store in a process of another machine; can be pickled."""
        return partial(_open_shared, self.root.resolve(), durable=self.durable)

    def claim(self, number: str, job: str, model: bytes) -> None:
        """Mark the place as a job's, and keep the job's first model there."""

    def first_model(self) -> bytes | None:
        """The model that `claim` has kept, if it has."""
        return None

    def flush(self, sha256: str) -> None:
        """Bring a blob of the folder to where blobs are kept. Raises `StorageError` if it isn't here, or is damaged."""

    @property
    def away(self) -> bool:
        """Whether updates wait because the place where blobs are kept can't be used."""
        return False

    def learn(self, news: Objects) -> None:
        """Note blobs that a helper has stored."""

    def news(self) -> Objects:
        """Blobs stored since the last call, for `learn`."""
        return {}

    def url_for(self, ref: BlobRef, seconds: int) -> tuple[str, str] | None:
        """Key and address of a new object as which a device may upload a blob for so long; None if it can't."""
        return None

    def adopt(self, ref: BlobRef, keys: Sequence[str] = ()) -> bool:
        """Verify what a device has uploaded as this blob, and keep it if it is right; returns whether it was."""
        return self.has(ref.sha256)

    def clear(self, keys: Iterable[str]) -> None:
        """Delete objects in the background that are not known to be blobs."""

    def close(self) -> None:
        """Wait for what runs in the background, for some seconds at most."""

    def _whole(self, ref: BlobRef) -> bool:
        """Whether the blob is here with the right length (a file cut short by a failing disk is written again)."""
        try:
            return self.path(ref.sha256).stat().st_size == ref.size
        except FileNotFoundError:
            return False

    def _keep_table(self, sha256: str, table: bytes) -> None:
        """Store a leaf table next to its blob, if there is room: it is made again where it is missing."""
        if len(table) > DIGEST:
            with suppress(StorageError):
                self.write_file(self._table_path(sha256), table_file(table), flush=False)

    def _table_path(self, sha256: str) -> Path:
        path = self.path(sha256)
        return path.with_name(path.name + SUFFIX)

    def _sweep(self) -> None:
        """Remove temporary files of processes that are no more."""
        for path in (self.root / "tmp").iterdir():
            name = path.name.split("-")[0]
            pid = name.split(".")[0]
            if pid.isdigit() and name != process_name(pid):
                path.unlink(missing_ok=True)


def _open_shared(root: Path, *, durable: bool) -> BlobStore:
    if not root.is_dir():
        raise StorageError(f"there is no folder {root} on this machine")
    return BlobStore(root, durable=durable, sweep=False)
