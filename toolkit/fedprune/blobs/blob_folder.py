"""The folder of a blob store: where blobs are, how much room they have, and how files get there whole."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from fedprune.core.disk import storage_errors, sync_folder, write_all
from fedprune.core.errors import StorageError, StorageFullError
from fedprune.core.validation import is_digest


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
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def has(self, sha256: str) -> bool:
        """Whether the blob is here."""
        return self.path(sha256).is_file()

    def path(self, sha256: str) -> Path:
        """Where the blob is, or would be. Raises `StorageError` if `sha256` is no digest."""
        if not is_digest(sha256):
            raise StorageError("name of a blob", expected="64 hex digits", got=repr(sha256)[:80])
        return self.root / sha256[:2] / sha256

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

    def write_file(self, path: Path, data: bytes | memoryview, *, flush: bool = True) -> None:
        """Write a file so that it appears whole or not at all; without `flush` a power cut may leave an empty one."""
        temporary = self.root / "tmp" / f"{os.getpid()}-{secrets.token_hex(8)}"
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
