"""The download of a release: its files as blobs over the wire, one by one, and then into the free slot."""

from __future__ import annotations

import threading

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import FedpruneError, ReleaseError
from fedprune.releases.release import Release
from fedprune.wire.chunk import Chunk
from fedprune.wire.fleet_messages import ReleaseOffer
from fedprune.wire.messages import BlobRequest
from fedprune.wire.transfer import Pull
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_device.releases.release_source import DownloadedSource


class ReleaseDownload:
    """What is still missing of a release. Does no network I/O: it returns requests.

    Files that have arrived survive restarts; those of other releases are deleted.
    """

    def __init__(self, updater: ReleaseInstaller, offer: ReleaseOffer) -> None:
        self._store = updater.pulled()
        self.source = offer_source(offer, updater)
        self.release = release = updater.examine(self.source)
        if release.number != offer.number or len(release.files) != len(offer.leaves):
            raise ReleaseError(
                f"the offer of release {offer.number}",
                expected=f"release {release.number} with {len(release.files)} files, as its manifest says",
                got=f"{len(offer.leaves)} files",
            )
        pairs = zip(release.files, offer.leaves, strict=True)
        self._refs = [BlobRef(file.sha256, file.size, leaves) for file, leaves in pairs]
        self._pull: Pull | None = None
        delete_downloads(updater, keep=release)

    @property
    def done(self) -> bool:
        return self._pull is None and all(self._store.has(r.sha256) for r in self._refs)

    @property
    def progress(self) -> tuple[int, int]:
        here = sum(r.leaf_count for r in self._refs if self._store.has(r.sha256))
        coming = 0 if self._pull is None or self._pull.done else self._pull.progress[0]
        return here + coming, sum(r.leaf_count for r in self._refs)

    def start(self, now: float) -> list[BlobRequest]:
        wants = [] if self._pull is None else self._pull.start(now)
        return wants + self._onward(now)

    def wants(self, sha256: str) -> bool:
        return self._pull is not None and self._pull.ref.sha256 == sha256

    def chunk(self, chunk: Chunk, now: float) -> list[BlobRequest]:
        """Record a chunk of the blob that is being downloaded; returns further requests."""
        wants = [] if self._pull is None else self._pull.on_chunk(chunk, now)
        return wants + self._onward(now)

    def tick(self, now: float) -> list[BlobRequest]:
        return [] if self._pull is None else self._pull.on_tick(now)

    def _onward(self, now: float) -> list[BlobRequest]:
        """Go on to the next file once one is complete: one window at a time is enough for any broker."""
        wants: list[BlobRequest] = []
        while self._pull is None or self._pull.done:
            self._pull = None
            missing = next((r for r in self._refs if not self._store.has(r.sha256)), None)
            if missing is None:
                break
            self._pull = Pull(missing, self._store.partial(missing))
            wants += self._pull.start(now)
        return wants


class StagingThread:
    """Installs a downloaded release in a thread, so that the loop goes on and feeds the watchdog."""

    def __init__(self, updater: ReleaseInstaller, pulled: ReleaseDownload) -> None:
        self.error: FedpruneError | None = ReleaseError("unpacking it ended without a word")
        self._updater = updater
        self._pulled = pulled
        self._thread = threading.Thread(target=self._run, name="fedprune-staging", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._updater.take(self._pulled.release)
            self._updater.stage(self._pulled.source)
            self.error = None
        except FedpruneError as error:
            self.error = error
        except Exception as error:  # noqa: BLE001 - the loop reports it to the server
            self.error = ReleaseError(f"it can't be unpacked ({type(error).__name__}: {error})")


def offer_source(offer: ReleaseOffer, updater: ReleaseInstaller) -> DownloadedSource:
    return DownloadedSource(offer.manifest.encode(), bytes.fromhex(offer.signature), updater.pulled())


def delete_downloads(updater: ReleaseInstaller, keep: Release | None = None) -> None:
    store = updater.pulled()
    kept = set() if keep is None else {f.sha256 for f in keep.files}
    for name in store.names():
        if name not in kept:
            store.delete(name)
    store.drop_partials(kept)
    if keep is None:
        updater.clear()
