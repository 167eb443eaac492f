"""A content-addressed folder, and blobs that arrive in it in pieces.

A partial blob can be resumed after any crash. When it is opened again, each leaf (32 KiB) on the disk is verified
against the leaf table, the list of the leaves' digests, so that no record of what has arrived has to be kept.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import suppress
from itertools import groupby
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
from fedprune.core.disk import flush_folder, make_private_folder, open_own_file, storage_errors, write_all
from fedprune.core.errors import ProtocolError, StorageError, StorageFullError
from fedprune.core.validation import is_digest


def process_name(pid: int | str) -> str:
    """A process's id and start time. In a container a server may get the same id at every start."""
    try:
        stat = Path("/proc", str(pid), "stat").read_bytes()
    except OSError:
        return f"{pid}."
    # Counted from the last bracket: the program's name before it may hold spaces and brackets.
    return f"{pid}.{int(stat.rpartition(b')')[2].split()[19])}"


class BlobFolder:
    """A content-addressed folder, `<root>/<first two hex digits>/<sha256>`, made with `tmp` and `partial` in it.

    Args:
        reserve: Bytes that must stay free on the disk when a blob is written.
        durable: Flush files to the disk before they appear. A simulation can do without.
    """

    def __init__(self, root: Path, max_size: int, reserve: int, *, durable: bool) -> None:
        self.root = root
        self._root_text = str(root)
        self.max_size = max_size
        self.reserve = reserve
        self.durable = durable
        with storage_errors(f"can't make blob store {root}"):
            for folder in (root, root / "tmp", root / "partial"):
                make_private_folder(folder)

    def has(self, sha256: str) -> bool:
        _check_name(sha256)
        try:  # without pathlib, which takes longer than the system's call: a server asks dozens of times per update
            return stat.S_ISREG(os.stat(f"{self._root_text}/{sha256[:2]}/{sha256}").st_mode)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            return False

    def path(self, sha256: str) -> Path:
        """The path of a blob, whether it exists or not. Raises `StorageError` if `sha256` is no digest."""
        _check_name(sha256)
        return self.root.joinpath(sha256[:2], sha256)

    def check_size(self, size: int) -> None:
        """Raise `StorageFullError` if no blob may be this large."""
        if size > self.max_size:
            raise StorageFullError(
                "blob is larger than this store allows", expected=f"at most {self.max_size} bytes", got=size
            )

    def check_room(self, size: int) -> None:
        """Raise `StorageFullError` if this many more bytes don't fit, or no blob may be that large."""
        self.check_size(size)
        free = shutil.disk_usage(self.root).free
        if size + self.reserve > free:
            raise StorageFullError(
                f"no room in {self.root}",
                expected=f"{size + self.reserve} bytes",
                got=f"{free} free",
                hint="Free some space; nothing was written.",
            )

    def temporary_path(self) -> Path:
        """A new path for an unfinished file, whose name tells a later process whether this one still runs."""
        return self.root / "tmp" / f"{process_name(os.getpid())}-{secrets.token_hex(8)}"

    def write_file(self, path: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
        """Write a file so that it appears whole or not at all; without `flush` a power cut may leave an empty one."""
        temporary = self.temporary_path()
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
        """Rename a finished file to its path, and flush the folder if the file must survive a power cut."""
        try:
            source.replace(target)
        except FileNotFoundError:  # the first blob of its folder, or `source` itself is missing
            target.parent.mkdir(mode=0o700, exist_ok=True)
            source.replace(target)
        if self.durable and flush:
            flush_folder(target.parent)


def _check_name(sha256: str) -> None:
    if not is_digest(sha256):
        raise StorageError("name of a blob", expected="64 hex digits", got=repr(sha256)[:80])


# Leaves of the largest blob whose table isn't kept once the blob is complete: a server receives thousands of such
# updates and is never asked for their tables, and each is computed again in a millisecond.
_MAX_DROPPED_LEAVES = 32

# Bytes between flushes of a download, so that the last flush has little left to write.
_FLUSH_BYTES = 4 * 2**20


class PartialBlob:
    """A blob on its way into a store.

    Leaves are verified and written in any order; `finish` verifies the whole blob and gives it its name. The digest of
    the whole is computed while leaves arrive without a gap, so that `finish` has little left to read. Two partials of
    the same blob may grow at once: they write the same bytes.

    `vouched` says that a trusted party, such as a signed offer, has named both digests: verified leaves then suffice,
    and the whole is not hashed. It is never True for a blob that its sender has named.
    """

    def __init__(self, store: BlobFolder, ref: BlobRef, *, vouched: bool = False) -> None:
        self._descriptor: int | None = None
        store.check_size(ref.size)
        self.store = store
        self.ref = ref
        self.table: bytes | None = None
        self.present_leaves = bytearray(ref.leaf_count)
        self.present_count = 0
        self._is_vouched = vouched
        self._hasher, self._hashed_leaves = hashlib.sha256(), 0  # of the leaves before the first gap; their number
        self._flushed_bytes = 0  # bytes whose write-back the kernel was asked to start
        self._data_path = store.root / "partial" / ref.sha256
        self._table_path = store.root / "partial" / (ref.sha256 + TABLE_SUFFIX)
        if self.is_complete:
            self.present_leaves = bytearray(b"\1" * ref.leaf_count)
            self.present_count = ref.leaf_count
            return
        self._resume()
        if self.present_count < ref.leaf_count:
            store.check_room(ref.size - self.present_count * LEAF_BYTES)

    @property
    def is_complete(self) -> bool:
        return self.store.has(self.ref.sha256)

    def set_table(self, table: bytes) -> bool:
        """Keep the leaf table if it is the one that the reference names; returns whether it is."""
        if len(table) != self.ref.leaf_count * DIGEST_BYTES or hashlib.sha256(table).hexdigest() != self.ref.leaves:
            return False
        # In place and not flushed: its digest is checked when the partial is opened again, and it is small enough to be
        # pulled again.
        if self.ref.leaf_count > 1:
            with storage_errors(f"can't write {self._table_path}"):
                descriptor = open_own_file(self._table_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                try:
                    write_all(descriptor, table_file(table))
                finally:
                    os.close(descriptor)
        if self.table is None:
            self.table = table
            with storage_errors(f"can't read {self._data_path}"):
                self._find_stored_leaves()
        return True

    def write(self, index: int, leaf: bytes | memoryview) -> bool:
        """Keep a leaf if it matches the table, which must be set; on a full disk earlier leaves stay."""
        return not self.write_leaves(index, leaf)

    def write_leaves(self, first: int, payload: bytes | memoryview) -> list[int]:
        """Keep those of some consecutive leaves that match the table; returns the indices of those that don't."""
        view = memoryview(payload)
        indices = range(first, first + max(1, -(-len(view) // LEAF_BYTES)))
        mismatches = self._mismatches(indices, view)
        new = [i for i in indices if i not in mismatches and not self.present_leaves[i]]
        with storage_errors(f"can't write {self._data_path}"):
            for start, end in _index_runs(new):
                self._write_run(start, end, view[(start - first) * LEAF_BYTES : (end - first) * LEAF_BYTES])
        return mismatches

    def _write_run(self, start: int, end: int, data: memoryview) -> None:
        """Write verified leaves, from `start` up to `end`."""
        write_all(self._open_file(), data, start * LEAF_BYTES)
        self.present_leaves[start:end] = b"\1" * (end - start)
        self.present_count += end - start
        if start == self._hashed_leaves and not self._is_vouched:
            self._hasher.update(data)
            self._hashed_leaves = end
        self._hash_contiguous()
        if end * LEAF_BYTES - self._flushed_bytes >= _FLUSH_BYTES:
            _start_write_back(self._open_file(), self._flushed_bytes, end * LEAF_BYTES)
            self._flushed_bytes = end * LEAF_BYTES

    def _hash_contiguous(self) -> None:
        """Hash the leaves after a gap that has just closed; they are read back from the disk."""
        while (
            not self._is_vouched
            and self._hashed_leaves < len(self.present_leaves)
            and self.present_leaves[self._hashed_leaves]
        ):
            self._hasher.update(
                os.pread(self._open_file(), self.ref.leaf_size(self._hashed_leaves), self._hashed_leaves * LEAF_BYTES)
            )
            self._hashed_leaves += 1

    def finish(self) -> None:
        """Verify the whole blob, unless its reference is vouched for, and give it its name.

        Raises `StorageError` if leaves are missing. If all leaves are right but the whole is not, the reference
        contradicts itself: what has arrived is deleted, and `ProtocolError` raised.
        """
        if self.is_complete:
            self.close()
            return
        if self.present_count < self.ref.leaf_count or self.table is None:
            raise StorageError(f"blob {self.ref.sha256} is not complete yet")
        with storage_errors(f"can't finish {self._data_path}"):
            descriptor = self._open_file()
            os.ftruncate(descriptor, self.ref.size)
            self._hash_contiguous()
            digest = self.ref.sha256 if self._is_vouched else self._hasher.hexdigest()
            if digest != self.ref.sha256:
                self.discard()
                raise ProtocolError("blob's leaves don't make up the blob", expected=self.ref.sha256, got=digest)
            if self.store.durable:
                os.fsync(descriptor)
            written_status = os.fstat(descriptor)
            self.close()
            target = self.store.path(self.ref.sha256)
            try:
                if not os.path.samestat(written_status, self._data_path.stat()):  # deleted, and begun again by another
                    raise StorageError(f"{self._data_path} was replaced while it was being finished")
                if self.ref.leaf_count > _MAX_DROPPED_LEAVES and self._table_path.is_file():
                    self.store.move(self._table_path, target.with_name(target.name + TABLE_SUFFIX), flush=False)
                self.store.move(self._data_path, target)
            except FileNotFoundError as error:  # another partial of the same blob was faster, or somebody deleted it
                if not self.is_complete:
                    raise StorageError(f"{self._data_path} has vanished while it was being finished") from error
            if self.ref.leaf_count > 1:
                self._table_path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete all leaves that have arrived."""
        self.close()
        self._data_path.unlink(missing_ok=True)
        self._table_path.unlink(missing_ok=True)
        self.table = None
        self.present_leaves = bytearray(self.ref.leaf_count)
        self.present_count = 0
        self._hasher, self._hashed_leaves = hashlib.sha256(), 0

    def close(self) -> None:
        """Close the file; leaves that have arrived stay on the disk."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _resume(self) -> None:
        with storage_errors(f"can't read {self._data_path}"):
            raw = self._table_path.read_bytes() if self.ref.leaf_count > 1 and self._table_path.is_file() else b""
            table = read_table_file(raw, self.ref.leaf_count)
            if table is None or hashlib.sha256(table).hexdigest() != self.ref.leaves:
                if self.ref.leaf_count > 1:
                    return
                # A blob of one leaf: its digest is the table, which need not be sent.
                table = bytes.fromhex(self.ref.sha256) if self.ref.leaf_count else b""
                if hashlib.sha256(table).hexdigest() != self.ref.leaves:
                    raise ProtocolError(
                        f"reference of blob {self.ref.sha256} contradicts itself",
                        expected=f"leaves {hashlib.sha256(table).hexdigest()}",
                        got=self.ref.leaves,
                    )
            self.table = table
            self._find_stored_leaves()

    def _find_stored_leaves(self) -> None:
        """Find the leaves that are on the disk already. Needs the table."""
        if not self._data_path.is_file():
            return
        descriptor = self._open_file()
        length = os.fstat(descriptor).st_size
        for index in range(min(len(self.present_leaves), -(-length // LEAF_BYTES))):
            leaf = os.pread(descriptor, self.ref.leaf_size(index), index * LEAF_BYTES)
            if self._matches(index, leaf):
                self.present_leaves[index] = 1
                self.present_count += 1
                if index == self._hashed_leaves and not self._is_vouched:
                    self._hasher.update(leaf)
                    self._hashed_leaves += 1

    def _mismatches(self, indices: range, view: memoryview) -> list[int]:
        """The indices of those of some consecutive leaves that don't match the table."""
        # One comparison for all of them: leaves are wrong only on a damaged link or by an attacker.
        first, end = indices.start, indices.stop
        is_full_length = len(view) == min(end * LEAF_BYTES, self.ref.size) - first * LEAF_BYTES
        if (
            first >= 0
            and is_full_length
            and leaf_table(view) == (self.table or b"")[first * DIGEST_BYTES : end * DIGEST_BYTES]
        ):
            return []
        return [i for i in indices if not self._matches(i, view[(i - first) * LEAF_BYTES :][:LEAF_BYTES])]

    def _matches(self, index: int, leaf: bytes | memoryview) -> bool:
        table = self.table or b""
        expected = table[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] if index >= 0 else b""
        return len(leaf) == self.ref.leaf_size(index) and hashlib.sha256(leaf).digest() == expected

    def _open_file(self) -> int:
        if self._descriptor is None:
            self._descriptor = open_own_file(self._data_path, os.O_RDWR | os.O_CREAT)
        return self._descriptor

    def __del__(self) -> None:
        self.close()


def _index_runs(indices: list[int]) -> Iterator[tuple[int, int]]:
    """Split ascending indices into runs of consecutive ones, as (first, end)."""
    for _, pairs in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        indices_of_run = [index for _, index in pairs]
        yield indices_of_run[0], indices_of_run[-1] + 1


def _start_write_back(descriptor: int, start: int, end: int) -> None:
    """Let Linux start writing a file's new pages to the disk, without waiting: it does so before it drops pages."""
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
