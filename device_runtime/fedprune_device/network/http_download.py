"""Downloads an offer's blobs over HTTPS, in a thread: what its web server has; MQTT downloads the rest.

A blob's table has the digests of its leaves, the pieces of 32 KiB in which it is stored and checked.

Nothing is trusted: the leaf table must be the one that the offer names, and every leaf is hashed before it is written.
MQTT continues with what was downloaded (`fedprune.blobs.partial_blob`), so that the two can take turns. Any error ends
the thread with one line that names it; what has arrived stays.
"""

from __future__ import annotations

import http.client
import logging
import ssl
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress

from fedprune.blobs.blob_ref import DIGEST_BYTES, LEAF_BYTES, BlobRef, leaf_digests, read_table_file
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import StorageError
from fedprune.wire.transfer import MIN_BYTES_PER_S
from fedprune.wire.urls import BlobUrl
from fedprune_device.network.http_transfer import HttpTransfer, HttpTransferError

_LOG = logging.getLogger("fedprune.device")

_ANSWER_ALLOWANCE_S = 1.0  # how long an answer's beginning may take without the fetch falling behind
_BATCH_LEAVES = 8  # leaves of 32 KiB that are held in memory at a time
_MAX_CUTS = 5  # connections that may break in the middle of a blob, if each brought something


class HttpFetch(HttpTransfer):
    """Downloads blobs from a base URL into a store, beginning at once.

    `done` and `total` count leaves, `received_bytes` those of verified leaves.
    """

    def __init__(
        self,
        store: BlobStore,
        base: BlobUrl,
        refs: Sequence[BlobRef],
        context: Callable[[], ssl.SSLContext],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(base, context, clock)
        self.base = base
        self.done, self.total = 0, sum(r.leaf_count for r in refs)
        self.received_bytes = 0
        self._store, self._refs = store, tuple(refs)
        self._cuts = 0
        self._thread.start()

    @property
    def progress(self) -> tuple[int, int]:
        return self.done, self.total

    def _log_end(self) -> None:
        if self.failure:
            text = "blobs at %s: %s; what is lacking comes over MQTT, %d bytes came from there"
            _LOG.warning(text, self.base, self.failure, self.received_bytes)
        else:
            _LOG.info("%d bytes came from %s", self.received_bytes, self.base)

    def _transfer(self) -> None:
        for ref in self._refs:
            self._fetch_blob(ref)

    def _fetch_blob(self, ref: BlobRef) -> None:
        with self._pause_stall_clock():
            partial = self._store.partial(ref, vouched=True)  # a signed offer has named both of its digests
        try:
            self.done += partial.present_count
            if partial.is_complete:
                return
            if partial.table is None:
                self._fetch_table(partial)
            with self._pause_stall_clock():
                self.done += reuse_leaves(self._store, partial)
            while partial.present_count < ref.leaf_count:
                self._fetch_missing(partial)
            self._check_stop()
            with self._pause_stall_clock():
                partial.finish()
        finally:
            partial.close()

    def _fetch_table(self, partial: PartialBlob) -> None:
        ref = partial.ref
        length = DIGEST_BYTES * (1 + ref.leaf_count)
        answer = self._request(self.base.table(ref.sha256), length)
        raw = bytearray()
        while len(raw) < length:
            raw += self._read(answer, min(LEAF_BYTES, length - len(raw)))
        table = read_table_file(bytes(raw), ref.leaf_count)
        count_before = partial.present_count
        if table is None or not partial.set_table(table):
            raise HttpTransferError(f"the leaf table of blob {ref.sha256[:12]} there is another one than the offer's")
        self.done += partial.present_count - count_before

    def _fetch_missing(self, partial: PartialBlob) -> None:
        count_before = partial.present_count
        try:
            for first, end in _gaps(partial.present_leaves):
                self._fetch_leaves(partial, first, end)
        except (OSError, http.client.HTTPException):
            self._connection.close()
            self._cuts += 1
            if self._ending.is_set() or partial.present_count == count_before or self._cuts > _MAX_CUTS:
                raise

    def _fetch_leaves(self, partial: PartialBlob, first: int, end: int) -> None:
        ref = partial.ref
        start, stop = first * LEAF_BYTES, min(end * LEAF_BYTES, ref.size)
        answer = self._request(self.base.blob(ref.sha256), stop - start, (start, ref.size))
        if answer.status == http.client.OK:
            first, end = 0, ref.leaf_count  # the server ignores ranges and sends the whole blob
        for batch_start in range(first, end, _BATCH_LEAVES):
            batch_end = min(batch_start + _BATCH_LEAVES, end)
            payload = b"".join(self._read(answer, ref.leaf_size(i)) for i in range(batch_start, batch_end))
            count_before = partial.present_count
            bad_leaves = partial.write_leaves(batch_start, payload)
            self.done += partial.present_count - count_before
            self.received_bytes += len(payload)
            if bad_leaves:
                raise HttpTransferError(
                    f"leaf {bad_leaves[0]} of blob {ref.sha256[:12]} there is not what the offer says"
                )

    def _request(self, path: str, length: int, range_: tuple[int, int] | None = None) -> http.client.HTTPResponse:
        """Request `length` bytes; `range_` is their offset and the whole's size, None for all. The body is unread."""
        headers = {"Accept-Encoding": "identity", "User-Agent": "fedprune"}
        is_whole = range_ is None or length == range_[1]
        start, size = range_ or (0, length)
        if not is_whole:
            headers["Range"] = f"bytes={start}-{start + length - 1}"
        answer = self._connection.get(path, headers, self._check_stop)
        self._note_progress(_ANSWER_ALLOWANCE_S)
        if 300 <= answer.status < 400:
            raise HttpTransferError(f"it redirects {path} ({answer.status}), which is not followed")
        if answer.status not in (200, 206) or (answer.status == 206 and is_whole):
            raise HttpTransferError(f"it answers {answer.status} to {path}")
        expected = size if answer.status == 200 else length
        if answer.getheader("Content-Encoding", "identity") != "identity" or answer.length != expected:
            got = answer.getheader("Content-Length", "nothing")[:40]
            raise HttpTransferError(
                f"it says that {path} has {got!r} bytes, and not the {expected} that the offer says"
            )
        if answer.status == 206:
            content_range = answer.getheader("Content-Range", "")
            expected_range = f"bytes {start}-{start + length - 1}/{size}"
            if content_range != expected_range:
                raise HttpTransferError(f"it gives {content_range[:80]!r} of {path}, and not {expected_range}")
        return answer

    def _read(self, answer: http.client.HTTPResponse, length: int) -> bytes:
        self._check_stop()
        data = answer.read(length)
        if len(data) != length:
            raise http.client.IncompleteRead(data, length - len(data))
        self._note_progress(length / MIN_BYTES_PER_S)
        return data


def _gaps(present: bytearray) -> Iterator[tuple[int, int]]:
    """Gaps of missing leaves as (first, end). `present` may change between two gaps, and is read again each time."""
    first = present.find(0)
    while first >= 0:
        end = present.find(1, first)
        end = len(present) if end < 0 else end
        yield first, end
        first = present.find(0, end)


def reuse_leaves(store: BlobStore, partial: PartialBlob) -> int:
    """Copy leaves that a blob lacks from stored blobs, instead of requesting them; returns their number.

    The next round's weights with frozen tensors differ from the last round's in a part only, and where both files have
    the same layout their leaves are equal. When a blob's leaf table comes, the tables of the stored blobs, 32 bytes for
    every 32 KiB, are searched for what it lacks. A copied leaf is hashed like one from the network, so that a donor may
    be damaged, or deleted meanwhile. Equal bytes that are shifted against the leaves' borders are not found.
    """
    missing = dict[bytes, list[int]]()
    for index, digest in enumerate(leaf_digests(partial.table or b"")):
        if not partial.present_leaves[index]:
            missing.setdefault(digest, []).append(index)
    count_before = partial.present_count
    for donor in store.names() if missing else ():
        for digest, leaf in _matching_leaves(store, donor, missing):
            if all(partial.write(index, leaf) for index in missing[digest]):  # all or none: their bytes are the same
                del missing[digest]
        if not missing:
            break
    if count := partial.present_count - count_before:
        _LOG.info("%d of %d leaves of blob %s were here", count, partial.ref.leaf_count, partial.ref.sha256[:12])
    return partial.present_count - count_before


def _matching_leaves(store: BlobStore, donor: str, missing: Collection[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Leaves of a stored blob that are missing elsewhere, with their digests."""
    with suppress(StorageError):  # deleted, or damaged
        for number, digest in enumerate(leaf_digests(store.table(donor))):
            if digest in missing:
                yield digest, store.read_leaves(donor, number, 1)
