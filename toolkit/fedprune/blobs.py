"""Blob stores: folders of files that are named by the sha256 of what they hold.

A file appears under its name only when it is whole and on the disk; what arrives bit by bit grows in `partial/` and can
be resumed after any kind of death, because each leaf is verified against the blob's leaf table when a partial blob is
opened again. Nothing but the leaf table needs to be remembered for that.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedprune.errors import ProtocolError, StorageError, StorageFullError
from fedprune.wire.blob_ref import DIGEST, LEAF, BlobRef, is_digest, leaf_table

MAX_SIZE = 2**30
"""Default limit of one blob's size."""

RESERVE = 1024 * 1024
"""Default number of bytes that stay free on the disk."""

_TABLE = ".leaves"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class BlobStore:
    """A content-addressed folder: `<root>/<first two hex digits>/<sha256>`, each with its leaf table beside it.

    Args:
        root: The folder; made if missing.
        max_size: Bytes that no blob may exceed.
        reserve: Bytes that must stay free on the disk when a blob is written.
        durable: Flush files to the disk before they appear. A simulation can do without.

    Raises:
        StorageError: The folder can't be made.
    """

    def __init__(self, root: Path, *, max_size: int = MAX_SIZE, reserve: int = RESERVE, durable: bool = True) -> None:
        self.root = root
        self.max_size = max_size
        self.reserve = reserve
        self.durable = durable
        with storage_errors(f"can't make blob store {root}"):
            for folder in (root, root / "tmp", root / "partial"):
                folder.mkdir(parents=True, exist_ok=True)
        self._sweep()

    def put(self, data: bytes | memoryview) -> BlobRef:
        """Keep these bytes; keeping them twice costs nothing.

        Raises:
            StorageFullError: The disk is full, or the blob is larger than the store allows.
            StorageError: The disk fails.
        """
        table = leaf_table(data)
        ref = BlobRef(hashlib.sha256(data).hexdigest(), len(data), hashlib.sha256(table).hexdigest())
        if not self._whole(ref):
            self.check_room(ref.size)
            self.write_file(self._table_path(ref.sha256), table)
            try:
                self.write_file(self.path(ref.sha256), data)
            except StorageError:
                self._table_path(ref.sha256).unlink(missing_ok=True)
                raise
        return ref

    def ref(self, sha256: str) -> BlobRef:
        """The reference of a blob that is here.

        Raises:
            StorageError: It is not here.
        """
        size = self.size(sha256)
        return BlobRef(sha256, size, hashlib.sha256(self.table(sha256)).hexdigest())

    def has(self, sha256: str) -> bool:
        """Whether the blob is here."""
        return self.path(sha256).is_file()

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be.

        Raises:
            StorageError: `sha256` is no digest.
        """
        if not is_digest(sha256):
            raise StorageError("name of a blob", expected="64 hex digits", got=repr(sha256)[:80])
        return self.root / sha256[:2] / sha256

    def size(self, sha256: str) -> int:
        """Bytes of a blob that is here.

        Raises:
            StorageError: It is not here.
        """
        try:
            return self.path(sha256).stat().st_size
        except FileNotFoundError as error:
            raise StorageError(f"blob {sha256} is not in {self.root}") from error

    def read(self, sha256: str) -> bytes:
        """A blob's bytes, checked against its name.

        Raises:
            StorageError: It is not here, or damaged.
        """
        self.size(sha256)
        path = self.path(sha256)
        with storage_errors(f"can't read {path}"):
            data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise StorageError(
                f"blob {path} is damaged", hint="Delete the file; it is fetched or made again when it is needed."
            )
        return data

    def read_leaves(self, sha256: str, first: int, count: int) -> bytes:
        """Bytes of `count` leaves from leaf `first` on, as far as the blob goes; not checked.

        Raises:
            StorageError: The blob is not here or can't be read.
        """
        path = self.path(sha256)
        with storage_errors(f"can't read {path}"), path.open("rb", buffering=0) as file:
            return os.pread(file.fileno(), count * LEAF, first * LEAF)

    def table(self, sha256: str) -> bytes:
        """The leaf table of a blob that is here; made again if it is missing.

        Raises:
            StorageError: The blob is not here or can't be read.
        """
        expected = -(-self.size(sha256) // LEAF) * DIGEST
        path = self._table_path(sha256)
        with suppress(FileNotFoundError), storage_errors(f"can't read {path}", missing=True):
            table = path.read_bytes()
            if len(table) == expected:
                return table
        table = leaf_table(self.read(sha256))
        self.write_file(path, table)
        return table

    def partial(self, ref: BlobRef) -> PartialBlob:
        """A blob that is to arrive, with what has arrived of it so far.

        Raises:
            StorageFullError: The disk has no room for what is missing, or the blob is larger than the store allows.
            StorageError: The disk fails.
        """
        return PartialBlob(self, ref)

    def delete(self, sha256: str) -> None:
        """Forget a blob, whole or partial; it need not be here.

        Raises:
            StorageError: The disk fails.
        """
        path = self.path(sha256)
        with storage_errors(f"can't delete {path}"):
            path.unlink(missing_ok=True)
            self._table_path(sha256).unlink(missing_ok=True)
            for name in (sha256, sha256 + _TABLE):
                (self.root / "partial" / name).unlink(missing_ok=True)

    def names(self) -> list[str]:
        """Digests of all blobs that are here, sorted."""
        return sorted(p.name for p in self.root.glob("[0-9a-f][0-9a-f]/*") if is_digest(p.name))

    def check_size(self, size: int) -> None:
        """Make sure that a blob may be this large.

        Raises:
            StorageFullError: It may not.
        """
        if size > self.max_size:
            raise StorageFullError(
                "blob is larger than this store allows", expected=f"at most {self.max_size} bytes", got=size
            )

    def check_room(self, size: int) -> None:
        """Make sure that this many more bytes fit.

        Raises:
            StorageFullError: They don't, or no blob may be that large.
        """
        self.check_size(size)
        free = shutil.disk_usage(self.root).free
        if size + self.reserve > free:
            raise StorageFullError(
                f"no room in {self.root}",
                expected=f"{size + self.reserve} bytes",
                got=f"{free} free",
                hint="Free some space; nothing was written.",
            )

    def write_file(self, path: Path, data: bytes | memoryview) -> None:
        """Write a file so that it appears whole or not at all.

        Raises:
            StorageFullError: The disk is full; nothing is left behind.
            StorageError: The disk fails.
        """
        temporary = self.root / "tmp" / f"{os.getpid()}-{secrets.token_hex(8)}"
        try:
            with storage_errors(f"can't write {path}"):
                descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
                try:
                    _write(descriptor, data)
                    if self.durable:
                        os.fsync(descriptor)
                finally:
                    os.close(descriptor)
                self.move(temporary, path)
        except StorageError:
            temporary.unlink(missing_ok=True)
            raise

    def move(self, source: Path, target: Path) -> None:
        """Put a finished file in its place."""
        target.parent.mkdir(exist_ok=True)
        source.replace(target)
        if self.durable:
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def _whole(self, ref: BlobRef) -> bool:
        """Whether the blob is here with the right length (a file cut short by a failing disk is written again)."""
        try:
            return self.path(ref.sha256).stat().st_size == ref.size
        except FileNotFoundError:
            return False

    def _table_path(self, sha256: str) -> Path:
        path = self.path(sha256)
        return path.with_name(path.name + _TABLE)

    def _sweep(self) -> None:
        """Remove temporary files of processes that are no more."""
        for path in (self.root / "tmp").iterdir():
            pid = path.name.split("-")[0]
            if pid.isdigit() and not Path("/proc", pid).exists():
                path.unlink(missing_ok=True)


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

    def __init__(self, store: BlobStore, ref: BlobRef) -> None:
        self._descriptor: int | None = None
        store.check_size(ref.size)
        self.store = store
        self.ref = ref
        self.table: bytes | None = None
        self.present = bytearray(ref.leaf_count)
        self.count = 0
        self._data = store.root / "partial" / ref.sha256
        self._leaves = store.root / "partial" / (ref.sha256 + _TABLE)
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
                _write(self._open(), leaf, index * LEAF)
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
                self.store.write_file(target.with_name(target.name + _TABLE), self.table)
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


@contextmanager
def storage_errors(what: str, *, missing: bool = False) -> Iterator[None]:
    """Turn errors of the operating system into ours.

    Args:
        what: What can't be done, for the message.
        missing: Let FileNotFoundError through.

    Raises:
        StorageFullError: The disk or a quota is full.
        StorageError: Anything else.
    """
    try:
        yield
    except FileNotFoundError as error:
        if missing:
            raise
        raise StorageError(f"{what}: {error.strerror}") from error
    except OSError as error:
        if error.errno in _FULL:
            raise StorageFullError(
                f"{what}: {error.strerror}", hint="Free some space; what was there before is untouched."
            ) from error
        raise StorageError(f"{what}: {error.strerror}") from error


def _write(descriptor: int, data: bytes | memoryview, at: int = 0) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, at)
        view, at = view[written:], at + written
