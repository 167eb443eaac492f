"""A release on its way to a board: its files as blobs over the wire, one by one, and then into the free slot."""

from __future__ import annotations

import threading

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import FedpruneError, ReleaseError
from fedprune.releases.release import Release
from fedprune.wire.chunk import Chunk
from fedprune.wire.messages import BlobRequest
from fedprune.wire.release_messages import ReleaseOffer
from fedprune.wire.transfer import Pull
from fedprune_device.releases.installer import ReleaseInstaller
from fedprune_device.releases.release_source import DownloadedSource


class ReleaseDownload:
    """What is still to come of a release. Does no network I/O: it says what to ask for.

    What has arrived stays over restarts, and what lies there of other releases is deleted.

    Args:
        updater: Installs releases.
        offer: What the server said.

    Attributes:
        release: The release.

    Raises:
        ReleaseError: It is refused; the reason is in the message.
        StorageFullError: There is no room.
        StorageError: The disk fails.
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
        """Whether all files are there, each what its digest says."""
        return self._pull is None and all(self._store.has(r.sha256) for r in self._refs)

    @property
    def progress(self) -> tuple[int, int]:
        """Leaves that are there, and leaves in all."""
        here = sum(r.leaf_count for r in self._refs if self._store.has(r.sha256))
        coming = 0 if self._pull is None or self._pull.done else self._pull.progress[0]
        return here + coming, sum(r.leaf_count for r in self._refs)

    def start(self, now: float) -> list[BlobRequest]:
        """What to ask for at first, and on every new connection.

        Raises:
            ProtocolError: The offer contradicts itself.
            StorageError: The disk fails or is full.
        """
        wants = [] if self._pull is None else self._pull.start(now)
        return wants + self._onward(now)

    def wants(self, sha256: str) -> bool:
        """Whether it is this blob that is being pulled."""
        return self._pull is not None and self._pull.ref.sha256 == sha256

    def chunk(self, chunk: Chunk, now: float) -> list[BlobRequest]:
        """Take in a chunk of the blob that is being pulled.

        Raises:
            ProtocolError: The blob can't be had from this server.
            StorageError: The disk fails or is full.
        """
        wants = [] if self._pull is None else self._pull.on_chunk(chunk, now)
        return wants + self._onward(now)

    def tick(self, now: float) -> list[BlobRequest]:
        """What to ask for again.

        Raises:
            ProtocolError: As `chunk`.
            StorageError: The disk fails or is full.
        """
        return [] if self._pull is None else self._pull.on_tick(now)

    def _onward(self, now: float) -> list[BlobRequest]:
        """Go on to the next file when one is there: one window at a time is enough for any broker."""
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
    """Unpacks a release in a thread, so that the loop goes on listening, and the watchdog is fed.

    Args:
        updater: Installs it.
        pulled: Its files, all there.

    Attributes:
        error: Why it failed; None if it went well.
    """

    def __init__(self, updater: ReleaseInstaller, pulled: ReleaseDownload) -> None:
        self.error: FedpruneError | None = ReleaseError("unpacking it ended without a word")
        self._updater = updater
        self._pulled = pulled
        self._thread = threading.Thread(target=self._run, name="fedprune-staging", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it is still at it."""
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
    """An offered release as the updater reads it."""
    return DownloadedSource(offer.manifest.encode(), bytes.fromhex(offer.signature), updater.pulled())


def delete_downloads(updater: ReleaseInstaller, keep: Release | None = None) -> None:
    """Delete what was pulled, but of one release.

    Args:
        updater: Installs releases.
        keep: The release whose files stay.
    """
    store = updater.pulled()
    kept = set() if keep is None else {f.sha256 for f in keep.files}
    for name in store.names():
        if name not in kept:
            store.delete(name)
    store.drop_partials(kept)
    if keep is None:
        updater.clear()
