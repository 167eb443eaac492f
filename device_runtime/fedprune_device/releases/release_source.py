"""Sources from which a board installs a release."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import storage_errors
from fedprune.releases.release import FILES, MANIFEST, SIGNATURE
from fedprune.security.keys import SIGNATURE as SIGNATURE_BYTES
from fedprune.wire.fleet_messages import MAX_MANIFEST


class ReleaseSource(Protocol):
    """A release that is read piece by piece, so that an interrupted installation continues where it was."""

    def manifest(self) -> bytes:
        """The manifest, as it was signed."""

    def signature(self) -> bytes:
        """The server's signature of the manifest."""

    def read(self, sha256: str, at: int, limit: int) -> bytes:
        """Bytes of a file of the release, at most `limit`, from offset `at`; empty only at its end."""


class FolderSource:
    """A release's folder on a stick or a share, as `fedprune.releases.release.write_release` makes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def manifest(self) -> bytes:
        return _read(self._folder / MANIFEST, 0, MAX_MANIFEST + 1)

    def signature(self) -> bytes:
        return _read(self._folder / SIGNATURE, 0, SIGNATURE_BYTES + 1)

    def read(self, sha256: str, at: int, limit: int) -> bytes:
        return _read(self._folder / FILES / sha256, at, limit)


class DownloadedSource:
    """A release with a signed manifest, whose files were downloaded into a store."""

    def __init__(self, manifest: bytes, signature: bytes, files: BlobStore) -> None:
        self._manifest = manifest
        self._signature = signature
        self._files = files

    def manifest(self) -> bytes:
        return self._manifest

    def signature(self) -> bytes:
        return self._signature

    def read(self, sha256: str, at: int, limit: int) -> bytes:
        return _read(self._files.path(sha256), at, limit)


def _read(path: Path, at: int, limit: int) -> bytes:
    with storage_errors(f"can't read {path}"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, limit, at)
        finally:
            os.close(descriptor)
