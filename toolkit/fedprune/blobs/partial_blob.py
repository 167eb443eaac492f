"""A content-addressed folder, and blobs that arrive in it in pieces.

They can be resumed after any crash: each leaf is verified against the blob's leaf table when a partial blob is opened
again, so that only the leaf table has to be kept.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from fedprune.blobs.blob_ref import DIGEST, LEAF, SUFFIX, BlobRef, leaf_table, read_table_file, table_file
from fedprune.core.disk import make_private_folder, storage_errors, sync_folder, write_all
from fedprune.core.errors import ProtocolError, StorageError, StorageFullError
from fedprune.core.validation import is_digest


def process_name(pid: int | str) -> str:
    """A process's id and start time: in a container every start of a server may have the same id."""
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
    except OSError:
        return f"{pid}."
    return f"{pid}.{int(stat.rpartition(b')')[2].split()[19])}"  # after the program's name, in which anything may be


class BlobFolder:
    """A content-addressed folder, `<root>/<first two hex digits>/<sha256>`, made with `tmp` and `partial` in it.

    Args:
        reserve: Bytes that must stay free on the disk when a blob is written.
        durable: Flush files to the disk before they appear. A simulation can do without.
    """

    def __init__(self, root: Path, max_size: int, reserve: int, *, durable: bool) -> None:
        self.root = root
        self.max_size = max_size
        self.reserve = reserve
        self.durable = durable
        with storage_errors(f"can't make blob store {root}"):
            for folder in (root, root / "tmp", root / "partial"):
                make_private_folder(folder)

    def has(self, sha256: str) -> bool:
        return self.path(sha256).is_file()

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be. Raises `StorageError` if `sha256` is no digest."""
        if not is_digest(sha256):
            raise StorageError("name of a blob", expected="64 hex digits", got=repr(sha256)[:80])
        return self.root.joinpath(sha256[:2], sha256)

    def check_size(self, size: int) -> None:
        """Make sure that a blob may be this large. Raises `StorageFullError` if it may not."""
        if size > self.max_size:
            raise StorageFullError(
                "blob is larger than this store allows", expected=f"at most {self.max_size} bytes", got=size
            )

    def check_room(self, size: int) -> None:
        """Make sure that this many more bytes fit. Raises `StorageFullError` if they don't, or no blob may be that
        large."""
        self.check_size(size)
        free = shutil.disk_usage(self.root).free
        if size + self.reserve > free:
            raise StorageFullError(
                f"no room in {self.root}",
                expected=f"{size + self.reserve} bytes",
                got=f"{free} free",
                hint="Free some space; nothing was written.",
            )

    def temporary(self) -> Path:
        """A new name for a file of this process, which is removed as a leftover once the process has ended."""
        return self.root / "tmp" / f"{process_name(os.getpid())}-{secrets.token_hex(8)}"

    def write_file(self, path: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
        """Write a file so that it appears whole or not at all; without `flush` a power cut may leave an empty one."""
        temporary = self.temporary()
        try:
            with storage_errors(f"can't write {path}"):
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                try:
                    write_all(descriptor, data)
                    if self.durable and flush:
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                self.move(temporary, path, flush=flush)
        except StorageError:
            temporary.unlink(missing_ok=True)
            raise

    def move(self, source: Path, target: Path, *, flush: bool = True) -> None:
        """Put a finished file in its place, and flush the folder if it must be there after a power cut."""
        target.parent.mkdir(mode=0o700, exist_ok=True)
        source.replace(target)
        if self.durable and flush:
            sync_folder(target.parent)


# Bytes between flushes of a download, so that the last flush has little left to write.
_FLUSH_BYTES = 4 * 2**20


class PartialBlob:
    """A blob on its way into a store.

    Leaves are written in any order, each verified before it is written; `finish` verifies the whole and gives it its
    name. The digest of the whole is computed as leaves arrive without a gap, so that little is left for the end. Two
    partials of the same blob may grow at once: they write the same bytes.

    Args:
        vouched: Whether a trusted party, such as a signed offer, has named both digests: verified leaves then suffice,
            and the whole is not hashed. Never for a blob that its sender has named.
    """

    def __init__(self, store: BlobFolder, ref: BlobRef, *, vouched: bool = False) -> None:
        self._descriptor: int | None = None
        store.check_size(ref.size)
        self.store = store
        self.ref = ref
        self.table: bytes | None = None
        self.present = bytearray(ref.leaf_count)
        self.count = 0
        self._vouched = vouched
        self._whole, self._hashed = hashlib.sha256(), 0  # the digest of the first leaves, and of how many
        self._flushed = 0  # where the part ends that the disk has begun with
        self._data = store.root / "partial" / ref.sha256
        self._leaves = store.root / "partial" / (ref.sha256 + SUFFIX)
        if self.complete:
            self.present = bytearray(b"\1" * ref.leaf_count)
            self.count = ref.leaf_count
            return
        self._resume()
        if self.count < ref.leaf_count:
            store.check_room(ref.size - self.count * LEAF)

    @property
    def complete(self) -> bool:
        return self.store.has(self.ref.sha256)

    def set_table(self, table: bytes) -> bool:
        """Keep the leaf table, if it is the one that the reference names."""
        if len(table) != self.ref.leaf_count * DIGEST or hashlib.sha256(table).hexdigest() != self.ref.leaves:
            return False
        # Not flushed: it is verified when the partial is opened again, and small to pull once more.
        if self.ref.leaf_count > 1:
            self.store.write_file(self._leaves, table_file(table), flush=False)
        if self.table is None:
            self.table = table
            with storage_errors(f"can't read {self._data}"):
                self._look()
        return True

    def write(self, index: int, leaf: bytes | memoryview) -> bool:
        """Keep a leaf, if it matches the table. Needs the table; a full disk keeps what has arrived before."""
        return not self.write_leaves(index, leaf)

    def write_leaves(self, first: int, payload: bytes | memoryview) -> list[int]:
        """Keep those of some consecutive leaves that match the table; returns the indices of the others."""
        view = memoryview(payload)
        indices = range(first, first + max(1, -(-len(view) // LEAF)))
        wrong = self._wrong(indices, view)
        new = [i for i in indices if i not in wrong and not self.present[i]]
        with storage_errors(f"can't write {self._data}"):
            for start, end in _runs(new):
                self._write_run(start, end, view[(start - first) * LEAF : (end - first) * LEAF])
        return wrong

    def _write_run(self, start: int, end: int, data: memoryview) -> None:
        """Write the leaves from `start` up to `end`, which are right."""
        write_all(self._open(), data, start * LEAF)
        self.present[start:end] = b"\1" * (end - start)
        self.count += end - start
        if start == self._hashed and not self._vouched:
            self._whole.update(data)
            self._hashed = end
        self._hash_on()
        if end * LEAF - self._flushed >= _FLUSH_BYTES:
            _begin_to_flush(self._open(), self._flushed, end * LEAF)
            self._flushed = end * LEAF

    def _hash_on(self) -> None:
        """Hash what follows a gap that is closed now; it is read back."""
        while not self._vouched and self._hashed < len(self.present) and self.present[self._hashed]:
            self._whole.update(os.pread(self._open(), self.ref.leaf_size(self._hashed), self._hashed * LEAF))
            self._hashed += 1

    def finish(self) -> None:
        """Verify the whole, unless the reference is vouched for, and give it its name.

        Raises:
            ProtocolError: All leaves are right but the whole is not: the reference contradicts itself. What has arrived
                is deleted.
            StorageError: Leaves are missing.
        """
        if self.complete:
            self.close()
            return
        if self.count < self.ref.leaf_count or self.table is None:
            raise StorageError(f"blob {self.ref.sha256} is not complete yet")
        with storage_errors(f"can't finish {self._data}"):
            descriptor = self._open()
            os.ftruncate(descriptor, self.ref.size)
            self._hash_on()
            found = self.ref.sha256 if self._vouched else self._whole.hexdigest()
            if found != self.ref.sha256:
                self.discard()
                raise ProtocolError("blob's leaves don't make up the blob", expected=self.ref.sha256, got=found)
            if self.store.durable:
                os.fsync(descriptor)
            meant = os.fstat(descriptor)
            self.close()
            target = self.store.path(self.ref.sha256)
            with suppress(FileNotFoundError):  # another partial of the same blob was faster
                if not os.path.samestat(meant, self._data.stat()):  # deleted, and begun again by another
                    raise StorageError(f"{self._data} was replaced while it was being finished")
                if self._leaves.is_file():
                    self.store.move(self._leaves, target.with_name(target.name + SUFFIX), flush=False)
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
        self._whole, self._hashed = hashlib.sha256(), 0

    def close(self) -> None:
        """Close the file; what has arrived stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _resume(self) -> None:
        with storage_errors(f"can't read {self._data}"):
            raw = self._leaves.read_bytes() if self._leaves.is_file() else b""
            table = read_table_file(raw, self.ref.leaf_count)
            if table is None or hashlib.sha256(table).hexdigest() != self.ref.leaves:
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
            self._look()

    def _look(self) -> None:
        """Find out which leaves are on the disk already. Needs the table."""
        if not self._data.is_file():
            return
        descriptor = self._open()
        length = os.fstat(descriptor).st_size
        for index in range(min(len(self.present), -(-length // LEAF))):
            leaf = os.pread(descriptor, self.ref.leaf_size(index), index * LEAF)
            if self._matches(index, leaf):
                self.present[index] = 1
                self.count += 1
                if index == self._hashed and not self._vouched:
                    self._whole.update(leaf)
                    self._hashed += 1

    def _wrong(self, indices: range, view: memoryview) -> list[int]:
        """Those of some consecutive leaves that don't match the table."""
        first, end = indices.start, indices.stop
        whole = len(view) == min(end * LEAF, self.ref.size) - first * LEAF
        if first >= 0 and whole and leaf_table(view) == (self.table or b"")[first * DIGEST : end * DIGEST]:
            return []
        return [i for i in indices if not self._matches(i, view[(i - first) * LEAF : (i - first + 1) * LEAF])]

    def _matches(self, index: int, leaf: bytes | memoryview) -> bool:
        table = self.table or b""
        expected = table[index * DIGEST : (index + 1) * DIGEST] if index >= 0 else b""
        return len(leaf) == self.ref.leaf_size(index) and hashlib.sha256(leaf).digest() == expected

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self._data, os.O_RDWR | os.O_CREAT, 0o600)
        return self._descriptor

    def __del__(self) -> None:
        self.close()


def _runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Rising indices as runs, each from its first one up to behind its last."""
    for _, run in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        found = [index for _, index in run]
        yield found[0], found[-1] + 1


def _begin_to_flush(descriptor: int, start: int, end: int) -> None:
    """Let Linux write out a file's new pages without waiting: that is the first thing this advice does."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
