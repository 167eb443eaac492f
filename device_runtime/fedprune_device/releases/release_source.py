"""Where a board gets a release from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

from fedprune.blobs.blob_store import BlobStore
from fedprune.core.disk import storage_errors
from fedprune.releases.release import FILES, MANIFEST, SIGNATURE
from fedprune.security.keys import SIGNATURE as SIGNATURE_BYTES
from fedprune.wire.release_messages import MAX_MANIFEST


class ReleaseSource(Protocol):
    """A release as its server gives it, piece by piece, so that what was cut off goes on where it was."""

    def manifest(self) -> bytes:
        """The manifest, as it was signed."""

    def signature(self) -> bytes:
        """The server's signature on it."""

    def read(self, sha256: str, at: int, limit: int) -> bytes:
        """Some bytes of a file of the release, at most `limit`, from offset `at`; empty only at its end."""


class FolderSource:
    """A release's folder, as `fedprune.releases.release.write_release` makes it, on a stick or a share for example.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def manifest(self) -> bytes:
        """The manifest."""
        return _read(self._folder / MANIFEST, 0, MAX_MANIFEST + 1)

    def signature(self) -> bytes:
        """Its signature."""
        return _read(self._folder / SIGNATURE, 0, SIGNATURE_BYTES + 1)

    def read(self, sha256: str, at: int, limit: int) -> bytes:
        """Some bytes of a file."""
        return _read(self._folder / FILES / sha256, at, limit)


class DownloadedSource:
    """A release whose files were pulled over the network.

    Args:
        manifest: The manifest, as it was signed.
        signature: The server's signature on it.
        files: Where its files are.
    """

    def __init__(self, manifest: bytes, signature: bytes, files: BlobStore) -> None:
        self._manifest = manifest
        self._signature = signature
        self._files = files

    def manifest(self) -> bytes:
        """The manifest."""
        return self._manifest

    def signature(self) -> bytes:
        """Its signature."""
        return self._signature

    def read(self, sha256: str, at: int, limit: int) -> bytes:
        """Some bytes of a file."""
        return _read(self._files.path(sha256), at, limit)


def _read(path: Path, at: int, limit: int) -> bytes:
    with storage_errors(f"can't read {path}"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            return os.pread(descriptor, limit, at)
        finally:
            os.close(descriptor)
