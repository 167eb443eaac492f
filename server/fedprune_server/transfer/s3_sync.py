"""Copies blobs between the state folder and a bucket on threads, so that the server's loop doesn't wait for them."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fedprune.blobs.blob_ref import BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.core.errors import StorageError, StorageFullError
from fedprune_server.storage.s3.retry_policy import StoppedError
from fedprune_server.transfer.upload_place import ArrivedUpdate, Outcome

log = logging.getLogger("fedprune.server")

_MAX_THREADS = 4


@dataclass(frozen=True)
class Adoption:
    """An update that a device claims to have put into the bucket, usually under the last of `keys`."""

    device: str
    ref: BlobRef
    keys: tuple[str, ...] = field(default=(), compare=False)

    @property
    def weights(self) -> str:
        return self.ref.sha256


class BucketSync:
    """Copies arrived updates into the bucket, verifies those that devices have put there, and fetches requested blobs.

    Without a bucket nothing is left to do, and `store` is the folder. `local_store` has the blobs of the folder;
    reading them never waits for the bucket."""

    def __init__(self, store: BlobStore) -> None:
        self.store, self.local_store = store, store.local()
        self._orders: queue.Queue[ArrivedUpdate | Adoption | str | None] = queue.Queue()
        self._finished: queue.Queue[ArrivedUpdate | Exception] = queue.Queue()
        self._adopted: queue.SimpleQueue[tuple[Adoption, bool]] = queue.SimpleQueue()
        self._under_way: set[ArrivedUpdate | Adoption] = set()
        self._delayed: set[ArrivedUpdate | Adoption] = set()
        self._fetching: set[str] = set()
        self._unfetchable: set[str] = set()
        self._threads: list[threading.Thread] = []

    @property
    def has_work(self) -> bool:
        """Whether an update is being copied into the bucket, or verified there."""
        return bool(self._under_way)

    @property
    def is_stuck(self) -> bool:
        """Whether updates wait because the bucket couldn't be used. Until they are in it, no deadline should pass."""
        if self.store.is_unreachable:
            self._delayed |= self._under_way
        self._delayed &= self._under_way
        return bool(self._delayed)

    @property
    def digests(self) -> set[str]:
        """Digests of updates that are being copied into the bucket, or verified there."""
        return {a.weights for a in self._under_way}

    def take_stored(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """Outcomes of updates that the bucket has by now. Raises `StorageError` if the folder fails."""
        reportable: list[Outcome] = []
        for outcome in outcomes:
            if not isinstance(outcome, ArrivedUpdate) or self.store.has(outcome.weights):
                reportable.append(outcome)
            elif outcome not in self._under_way:
                self._under_way.add(outcome)
                self._order(outcome)
        while not self._finished.empty():
            ended = self._finished.get()
            if isinstance(ended, Exception):
                raise ended
            self._under_way.discard(ended)
            reportable.append(ended)
        return reportable

    def adopt(self, device: str, ref: BlobRef, keys: Iterable[str] = ()) -> None:
        """Verify an update that a device has put into the bucket, unless that is under way already."""
        adoption = Adoption(device, ref, tuple(keys))
        if adoption not in self._under_way:
            self._under_way.add(adoption)
            self._order(adoption)

    def is_verifying(self, device: str, ref: BlobRef) -> bool:
        """Whether an update is being verified."""
        return Adoption(device, ref) in self._under_way

    def take_adopted(self) -> list[tuple[Adoption, bool]]:
        """The updates that were verified since the last call, and whether they were right."""
        results = []
        while not self._adopted.empty():
            results.append(self._adopted.get())
            self._under_way.discard(results[-1][0])
        return results

    def is_coming(self, sha256: str) -> bool:
        """Whether a blob that isn't in the folder will be there in a moment, because the bucket has it; fetches it."""
        if sha256 in self._unfetchable or not self.store.has(sha256):
            return False
        if sha256 not in self._fetching:
            self._fetching.add(sha256)
            self._order(sha256)
        return True

    def prefetch(self, digests: Iterable[str]) -> None:
        """Fetch blobs that devices may soon request."""
        for digest in sorted(digests):
            if not self.local_store.has(digest):
                self.is_coming(digest)

    def close(self) -> None:
        """Stop waiting for the bucket."""
        self.store.close()
        for _ in self._threads:
            self._orders.put(None)

    def _order(self, order: ArrivedUpdate | Adoption | str) -> None:
        if len(self._threads) < _MAX_THREADS:
            # Daemon threads: the process must be able to end while the bucket is away.
            thread = threading.Thread(target=self._run, name="fedprune-bucket-sync", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._orders.put(order)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            try:
                self._carry_out(order)
            except StoppedError:  # noqa: PERF203 - each turn waits for the network anyway
                return
            except Exception as error:  # noqa: BLE001 - it is raised again where the loop collects it
                self._finished.put(error)

    def _carry_out(self, order: ArrivedUpdate | Adoption | str) -> None:
        if isinstance(order, ArrivedUpdate):
            self.store.flush(order.weights)
            self._finished.put(order)
            return
        if isinstance(order, Adoption):
            self._adopted.put((order, self.store.adopt_upload(order.ref, order.keys)))
            return
        try:
            self.store.size(order)  # which fetches it if it is not in the folder
        except StoppedError:
            raise
        except StorageError as error:
            log.error("%s", error)
            if not isinstance(error, StorageFullError):  # else it is tried again at the next request
                self._unfetchable.add(order)  # from now on requests for it are answered with `BlobNotFound`
        self._fetching.discard(order)
