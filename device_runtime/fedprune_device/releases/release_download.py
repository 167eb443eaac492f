"""Fetches the files of an offered release that a board lacks, and unpacks them in a thread."""

from __future__ import annotations

import threading

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import FedpruneError, ReleaseError
from fedprune.releases.release import Release
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune.wire.messages import BlobRequest
from fedprune.wire.transfer import Pull
from fedprune_device.releases.installer import ReleaseInstaller, ReleaseSource


class ReleaseDownload:
    """The missing parts of a release. Does no network I/O: it returns requests.

    Wheels that the running slot has are not fetched. Files that have arrived survive restarts; those of other releases
    are deleted.
    """

    def __init__(self, installer: ReleaseInstaller, offer: ReleaseOffer) -> None:
        self._store = installer.downloads
        self.source = ReleaseSource(offer.manifest.encode(), bytes.fromhex(offer.signature), self._store.path)
        self.release = release = installer.examine(self.source)
        if release.number != offer.number or len(release.files) != len(offer.leaves):
            raise ReleaseError(
                f"the offer of release {offer.number}",
                expected=f"release {release.number} with {len(release.files)} files, as its manifest says",
                got=f"{len(offer.leaves)} files",
            )
        pairs = zip(release.files, offer.leaves, strict=True)
        installed = installer.installed_files(release)
        self._refs = [BlobRef(file.sha256, file.size, leaves) for file, leaves in pairs if file not in installed]
        self._pull: Pull | None = None
        delete_downloads(installer, keep=release)

    @property
    def is_done(self) -> bool:
        return self._pull is None and all(self._store.has(r.sha256) for r in self._refs)

    @property
    def size(self) -> int:
        """Bytes that come from the server, arrived or not."""
        return sum(r.size for r in self._refs)

    @property
    def progress(self) -> tuple[int, int]:
        stored_leaves = sum(r.leaf_count for r in self._refs if self._store.has(r.sha256))
        arrived_leaves = 0 if self._pull is None or self._pull.is_done else self._pull.progress[0]
        return stored_leaves + arrived_leaves, sum(r.leaf_count for r in self._refs)

    def start(self, now: float) -> list[BlobRequest]:
        requests = [] if self._pull is None else self._pull.start(now)
        return requests + self._next_requests(now)

    def wants(self, sha256: str) -> bool:
        return self._pull is not None and self._pull.ref.sha256 == sha256

    def on_chunk(self, chunk: Chunk, now: float) -> list[BlobRequest]:
        """Record a chunk of the blob that is being downloaded; returns further requests."""
        requests = [] if self._pull is None else self._pull.on_chunk(chunk, now)
        return requests + self._next_requests(now)

    def on_tick(self, now: float) -> list[BlobRequest]:
        return [] if self._pull is None else self._pull.on_tick(now)

    def _next_requests(self, now: float) -> list[BlobRequest]:
        """Requests for the next file once one is complete: one window at a time is enough for any broker."""
        requests: list[BlobRequest] = []
        while self._pull is None or self._pull.is_done:
            self._pull = None
            missing = next((r for r in self._refs if not self._store.has(r.sha256)), None)
            if missing is None:
                break
            self._pull = Pull(missing, self._store.partial(missing))
            requests += self._pull.start(now)
        return requests


class StagingThread:
    """Installs a downloaded release in a thread, so that the loop continues and feeds the watchdog."""

    def __init__(self, installer: ReleaseInstaller, download: ReleaseDownload) -> None:
        self.error: FedpruneError | None = ReleaseError("unpacking it ended without an error message")
        self._installer = installer
        self._download = download
        self._thread = threading.Thread(target=self._run, name="fedprune-staging", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._installer.stage(self._download.source)
            self.error = None
        except FedpruneError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - the loop reports it to the server
            self.error = ReleaseError(f"it can't be unpacked ({type(error).__name__}: {error})")


def delete_downloads(installer: ReleaseInstaller, keep: Release | None = None) -> None:
    store = installer.downloads
    kept_names = set() if keep is None else {f.sha256 for f in keep.files}
    for name in store.names():
        if name not in kept_names:
            store.delete(name)
    store.drop_partials(kept_names)
