"""Blobs that arrive bit by bit.

They can be resumed after any kind of death, because each leaf is verified against the blob's leaf table when a partial
blob is opened again. Nothing but the leaf table needs to be remembered for that.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from fedprune.disk import storage_errors, write_all
from fedprune.errors import ProtocolError, StorageError
from fedprune.wire.blob_ref import DIGEST, LEAF, BlobRef

TABLE = ".leaves"
"""What a leaf table's file name ends with, beside its blob's."""


class Home(Protocol):
    """What a partial blob needs of the store that it grows in; `BlobStore` has it."""

    root: Path
    durable: bool

    def has(self, sha256: str) -> bool:
        """Whether a blob is there, whole."""
        ...

    def path(self, sha256: str) -> Path:
        """Where a whole blob is, or would be."""
        ...

    def check_size(self, size: int) -> None:
        """Make sure that a blob may be this large."""
        ...

    def check_room(self, size: int) -> None:
        """Make sure that this many more bytes fit."""
        ...

    def write_file(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file so that it appears whole or not at all."""
        ...

    def move(self, source: Path, target: Path) -> None:
        """Put a finished file in its place."""
        ...


class PartialBlob:
    """A blob on its way into a store.

    Leaves are written in any order, each verified before it is written; `finish` verifies the whole and gives it its
    name. Two of the same blob may grow at once: they write the same bytes.

    Args:
        store: Where it grows.
        ref: What it shall become.

    Raises:
        StorageFullError: There is no room for it.
        StorageError: The disk fails.
    """

    def __init__(self, store: Home, ref: BlobRef) -> None:
        self._descriptor: int | None = None
        store.check_size(ref.size)
        self.store = store
        self.ref = ref
        self.table: bytes | None = None
        self.present = bytearray(ref.leaf_count)
        self.count = 0
        self._data = store.root / "partial" / ref.sha256
        self._leaves = store.root / "partial" / (ref.sha256 + TABLE)
        if self.complete:
            self.present = bytearray(b"\1" * ref.leaf_count)
            self.count = ref.leaf_count
            return
        self._resume()
        if self.count < ref.leaf_count:
            store.check_room(ref.size - self.count * LEAF)

    @property
    def complete(self) -> bool:
        """Whether the whole blob is in the store."""
        return self.store.has(self.ref.sha256)

    def set_table(self, table: bytes) -> bool:
        """Keep the leaf table, if it is the one that the reference names.

        Raises:
            StorageError: The disk is full or fails.
        """
        if len(table) != self.ref.leaf_count * DIGEST or hashlib.sha256(table).hexdigest() != self.ref.leaves:
            return False
        self.store.write_file(self._leaves, table)
        self.table = table
        return True

    def write(self, index: int, leaf: bytes | memoryview) -> bool:
        """Keep a leaf, if it is what the table says. Needs the table.

        Raises:
            StorageFullError: The disk is full; what has arrived before is kept.
            StorageError: The disk fails.
        """
        if self.table is None or not 0 <= index < len(self.present) or not self._matches(index, leaf):
            return False
        if not self.present[index]:
            with storage_errors(f"can't write {self._data}"):
                write_all(self._open(), leaf, index * LEAF)
            self.present[index] = 1
            self.count += 1
        return True

    def finish(self) -> None:
        """Verify the whole and give it its name.

        Raises:
            ProtocolError: All leaves are right but the whole is not: the reference contradicts itself. What has arrived
                is thrown away.
            StorageError: Leaves are missing, or the disk fails.
        """
        if self.complete:
            self.close()
            return
        if self.count < self.ref.leaf_count or self.table is None:
            raise StorageError(f"blob {self.ref.sha256} is not complete yet")
        with storage_errors(f"can't finish {self._data}"):
            descriptor = self._open()
            os.ftruncate(descriptor, self.ref.size)
            found = hashlib.sha256()
            for at in range(0, self.ref.size, 32 * LEAF):
                found.update(os.pread(descriptor, 32 * LEAF, at))
            if found.hexdigest() != self.ref.sha256:
                self.discard()
                raise ProtocolError(
                    "blob's leaves don't make up the blob", expected=self.ref.sha256, got=found.hexdigest()
                )
            if self.store.durable:
                os.fsync(descriptor)
            self.close()
            target = self.store.path(self.ref.sha256)
            with suppress(FileNotFoundError):  # another partial of the same blob was faster
                self.store.write_file(target.with_name(target.name + TABLE), self.table)
                self.store.move(self._data, target)
            self._leaves.unlink(missing_ok=True)
        if not self.complete:
            raise StorageError(f"{self._data} has vanished while it was being finished")

    def discard(self) -> None:
        """Throw away what has arrived."""
        self.close()
        self._data.unlink(missing_ok=True)
        self._leaves.unlink(missing_ok=True)
        self.table = None
        self.present = bytearray(self.ref.leaf_count)
        self.count = 0

    def close(self) -> None:
        """Close the file; what has arrived stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _resume(self) -> None:
        with storage_errors(f"can't read {self._data}"):
            table = self._leaves.read_bytes() if self._leaves.is_file() else b""
            if len(table) != self.ref.leaf_count * DIGEST or hashlib.sha256(table).hexdigest() != self.ref.leaves:
                if self.ref.leaf_count > 1:
                    return
                # The only leaf of a small blob is the blob, so that its table is known without being sent.
                table = bytes.fromhex(self.ref.sha256) if self.ref.leaf_count else b""
                if hashlib.sha256(table).hexdigest() != self.ref.leaves:
                    raise ProtocolError(
                        f"reference of blob {self.ref.sha256} contradicts itself",
                        expected=f"leaves {hashlib.sha256(table).hexdigest()}",
                        got=self.ref.leaves,
                    )
            self.table = table
            descriptor = self._open()
            length = os.fstat(descriptor).st_size
            for index in range(min(len(self.present), -(-length // LEAF))):
                if self._matches(index, os.pread(descriptor, self.ref.leaf_size(index), index * LEAF)):
                    self.present[index] = 1
                    self.count += 1

    def _matches(self, index: int, leaf: bytes | memoryview) -> bool:
        table = self.table or b""
        expected = table[index * DIGEST : (index + 1) * DIGEST]
        return len(leaf) == self.ref.leaf_size(index) and hashlib.sha256(leaf).digest() == expected

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self._data, os.O_RDWR | os.O_CREAT, 0o644)
        return self._descriptor

    def __del__(self) -> None:
        self.close()
