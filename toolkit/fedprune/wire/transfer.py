"""Transfer of blobs, without network I/O: messages go in, messages come out.

The receiver drives the transfer. It requests leaves, and never has more than a window of them outstanding, so that the
broker never holds more. A broker's acknowledgement only means that the broker has the message: a default Mosquitto
acknowledged 3,000 messages for a slow subscriber and delivered 1,132 of them. The sender is stateless. Chunks may get
lost, arrive twice, late or in any order; each leaf is verified on arrival.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TypeVar

from msgspec.structs import replace

from fedprune.blobs.blob_ref import DIGEST, LEAF, BlobRef
from fedprune.blobs.blob_store import BlobStore
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import ProtocolError, StorageError
from fedprune.wire.chunk import MAX_PACKET, Chunk, ChunkLimit, leaves_per_chunk, read_chunks
from fedprune.wire.messages import MAX_REQUEST, BlobNotFound, BlobRequest, UploadRequest

# The average below which a transfer is too slow: a board ends its download or upload, and the server's uploads make
# room for others.
LEAST_BYTES_PER_S = 8192

_REMEMBERED = 4096


_Request = TypeVar("_Request", bound="BlobRequest | UploadRequest")


def with_request_id(request: _Request) -> _Request:
    # From the system, as all random pauses: a user's program may seed `random` alike on every board and at every start.
    return replace(request, number=secrets.randbits(31))


class SeenRequests:
    """The numbers of the latest requests, to recognise duplicates. They are random, because a sender that restarts
    doesn't remember earlier ones, and requests may overtake births."""

    def __init__(self) -> None:
        self._seen: OrderedDict[tuple[str, int], None] = OrderedDict()

    def is_duplicate(self, device: str, request: BlobRequest | UploadRequest) -> bool:
        """Whether this very request has come from the device before; one without a number never has."""
        if request.number is None:
            return False
        key = device, request.number
        if key in self._seen:
            return True
        self._seen[key] = None
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)
        return False


MAX_PATIENCE = 120.0

_DECAY = 0.95
# Assumed response time, in multiples of the time for connecting, until the first response was measured. Pieces of blobs
# are longer than the packets of a handshake, and queue behind each other.
_ROUND_TRIPS = 2.0


class ResponseTime:
    """A decaying maximum of response times in seconds (`slowest`), shared by all transfers from one peer."""

    def __init__(self) -> None:
        self.slowest = 0.0

    def connected(self, took: float) -> None:
        """Connecting took this many seconds, which is two round trips."""
        self.slowest = max(self.slowest, min(_ROUND_TRIPS * took, MAX_PATIENCE))

    def told(self, slowest: float) -> None:
        """The peer has measured this response time."""
        self.slowest = max(self.slowest, min(slowest, MAX_PATIENCE))

    def came(self, took: float) -> None:
        """A request that was sent once was answered after this many seconds."""
        self.slowest = max(_DECAY * self.slowest, took)

    def patience(self, least: float) -> float:
        """Seconds, at least `least`, after which a request or its answer was very likely lost."""
        return min(max(least, 2 * self.slowest), max(MAX_PATIENCE, least))


# Leaves of a request at least.
CHUNK_LEAVES = leaves_per_chunk(MAX_PACKET)

# Outstanding leaves of one blob at first: 1 MiB.
WINDOW_LEAVES = 32

# Outstanding leaves on a fast link: 4 MiB. They wait in no queue there, and a small window would leave the link idle.
WIDE_WINDOW_LEAVES = 128

_QUICK_S = 0.1
# Response times below which the window grows, and above which it shrinks.
_SLOW_S = 1.0

PATIENCE = 5.0

# Damaged arrivals of one leaf, or of the leaf table, after which the transfer fails.
MAX_TRIES = 8


class Pull:
    """The download of one blob.

    The caller sends the requests that the methods return, passes every chunk of this blob to `on_chunk`, and calls
    `on_tick` about once a second, after all chunks that have arrived. After a reconnection it calls `start` again.

    Args:
        chunk_leaves: Minimum number of leaves per request, unless fewer are missing.
        window_leaves: Outstanding leaves at most.
        limit: Leaves of a chunk; shared by all pulls through one broker.
        patience_s: Seconds without progress before outstanding leaves are requested again. It grows with each
            unsuccessful repetition, and with the response time.
        answers: Response time; shared by all pulls from one peer.
        lend: Writes leaves that are available locally; called once, when the leaf table is complete.
    """

    def __init__(
        self,
        ref: BlobRef,
        partial: PartialBlob,
        *,
        chunk_leaves: int = CHUNK_LEAVES,
        window_leaves: int = WIDE_WINDOW_LEAVES,
        limit: ChunkLimit | None = None,
        patience_s: float = PATIENCE,
        answers: ResponseTime | None = None,
        lend: Callable[[PartialBlob], object] | None = None,
    ) -> None:
        self.ref = ref
        self.stalls = 0
        """Consecutive repetitions without any progress."""
        self._partial = partial
        self._lend = lend
        self._limit = limit or ChunkLimit()
        self._came = False  # whether any requested leaf has
        self._chunk = chunk_leaves
        self._most = window_leaves
        self._window = self._least = min(window_leaves, WINDOW_LEAVES)
        self._answers = answers or ResponseTime()
        self._base = self._patience = patience_s
        self._asked: dict[
            int, tuple[int, float]
        ] = {}  # outstanding leaf or piece: serial number and time of the request
        self._twice: set[int] = set()  # those requested twice, which may come twice
        self._serial = 0
        self._newest = 0  # highest serial number that has arrived
        self._moved_at = 0.0
        self._tries: dict[int, int] = {}
        self._cursor = 0
        self._pieces: dict[int, bytes] = {}
        self._done = False

    @property
    def done(self) -> bool:
        return self._done

    @property
    def progress(self) -> tuple[int, int]:
        """Leaves that have arrived, and leaves in all."""
        return self._partial.count, self.ref.leaf_count

    @property
    def outstanding(self) -> int:
        """Outstanding leaves or pieces; never more than the window."""
        return len(self._asked)

    def start(self, now: float) -> list[BlobRequest]:
        """Begin, or begin again after a reconnection: all outstanding leaves are considered lost. Raises
        `ProtocolError` if the reference contradicts itself."""
        if self._partial.complete:
            self._asked.clear()
            self._done = True
            return []
        self.give_up()
        self._moved_at = now
        self._patience, self._window = self._answers.patience(self._base), self._least
        self._twice.clear()
        wants = self._again(list(self._asked), now)
        return wants + self._advance(now)

    def remind(self, now: float) -> list[BlobRequest]:
        """Request again what should have arrived by now: the sender has reconnected and may have lost all requests."""
        return self._repeat([i for i, (_, at) in self._asked.items() if now - at >= self._answers.slowest], now)

    def on_chunk(self, chunk: Chunk, now: float) -> list[BlobRequest]:
        """Process a chunk; leaves that were not requested are ignored. Raises `ProtocolError` if a leaf or the leaf
        table arrived damaged too often, or the reference contradicts itself."""
        if self._done or chunk.sha256 != self.ref.sha256 or chunk.part != self._part:
            return []
        bad: list[int] = []
        self._limit.arrived(-(-len(chunk.payload) // LEAF))
        for first, payload in chunk.runs(self._asked):
            self._came = True
            bad += self._keep(first, payload, now)
        return self._again(bad, now) + self._advance(now)

    def on_tick(self, now: float) -> list[BlobRequest]:
        """Request again what seems lost. Raises as `on_chunk`."""
        if self._done or not self._asked:
            return []
        if now - self._moved_at > self._patience:
            self._window = self._least
            self.give_up()
            self.stalls += 1
            self._patience = min(2 * self._patience, max(MAX_PATIENCE, self._base))
            return self._repeat(list(self._asked), now)
        overtaken = []
        for index, (serial, asked_at) in self._asked.items():  # in the order of asking
            if serial >= self._newest or now - asked_at <= self._patience:
                break
            overtaken.append(index)
        return self._repeat(overtaken, now)

    def give_up(self) -> None:
        """Note that the outstanding leaves were in vain: if none has arrived, the chunks may have been too large, and
        smaller ones are requested next."""
        if len(self._asked) > 1 and not self._came:
            self._limit.silent()
        self._came = False

    @property
    def _part(self) -> str:
        return "leaves" if self._partial.table is None else "data"

    def _keep(self, first: int, payload: memoryview, now: float) -> list[int]:
        """Store consecutive requested leaves or pieces; returns the indices of damaged ones."""
        indices = range(first, first - (-len(payload) // LEAF))
        if self._part == "data":
            bad = self._partial.write_leaves(first, payload)
        else:
            length = self.ref.leaf_count * DIGEST
            pieces = {i: bytes(payload[(i - first) * LEAF : (i - first + 1) * LEAF]) for i in indices}
            bad = [i for i, piece in pieces.items() if len(piece) != min(LEAF, length - i * LEAF)]
            self._pieces.update({i: piece for i, piece in pieces.items() if i not in bad})
        for index in indices:
            if index in bad:
                self._count_try(index)
                continue
            serial, asked_at = self._asked.pop(index)
            self._newest = max(self._newest, serial)
            self._progressed(None if index in self._twice else now - asked_at, now)
            self._twice.discard(index)
        return bad

    def _progressed(self, took: float | None, now: float) -> None:
        self.stalls = 0
        self._moved_at = now
        if took is None:
            return  # either request may have been answered, so that the time is ambiguous (Karn's algorithm)
        self._answers.came(took)
        if took < _QUICK_S:
            self._window = min(self._window + 1, self._most)
        elif took > _SLOW_S:
            self._window = self._least
        self._patience = self._answers.patience(self._base)

    def _count_try(self, index: int) -> None:
        tries = self._tries[index] = self._tries.get(index, 0) + 1
        if tries >= MAX_TRIES:
            what = f"leaf {index}" if self._part == "data" else "leaf table"
            raise ProtocolError(
                f"{what} of blob {self.ref.sha256} arrived damaged {tries} times",
                hint="The sender's copy is damaged, or someone else publishes on its topic.",
            )

    def _advance(self, now: float) -> list[BlobRequest]:
        """Request what fits into the window; go on to the data when the leaf table is complete."""
        if self._done:
            return []
        if self._part == "leaves":
            if len(self._pieces) < self.ref.piece_count:
                return self._fill(self.ref.piece_count, now)
            table = b"".join(self._pieces[i] for i in range(self.ref.piece_count))
            self._pieces.clear()
            self._cursor = 0
            if not self._partial.set_table(table):
                self._count_try(0)
                return self._fill(self.ref.piece_count, now)
            self._tries.clear()
            self._came = False
        lend, self._lend = self._lend, None
        if lend is not None:
            lend(self._partial)
        if self._partial.count == self.ref.leaf_count:
            self._partial.finish()
            self._done = True
            return []
        return self._fill(self.ref.leaf_count, now)

    def _fill(self, total: int, now: float) -> list[BlobRequest]:
        data = self._part == "data"
        free = self._window - len(self._asked)
        if free < max(self._chunk, self._window // 4) and self._asked and total - self._cursor > free:
            return []  # each request costs both sides a message: wait until one can hold more
        new: list[int] = []
        while self._cursor < total and len(new) < free:
            index = self._cursor
            self._cursor += 1
            if not (self._partial.present[index] if data else index in self._pieces):
                new.append(index)
        return self._again(new, now)

    def _repeat(self, indices: list[int], now: float) -> list[BlobRequest]:
        """Request again what may still arrive; the patience starts again, so that the answers have time to come."""
        if indices:
            self._moved_at = now
        self._twice.update(indices)
        return self._again(indices, now)

    def _again(self, indices: Iterable[int], now: float) -> list[BlobRequest]:
        wants: list[BlobRequest] = []
        first = count = 0
        for index in sorted(indices):
            self._serial += 1
            self._asked.pop(index, None)
            self._asked[index] = (self._serial, now)
            if count and index == first + count:
                count += 1
                continue
            if count:
                wants.append(self._want(first, count))
            first, count = index, 1
        if count:
            wants.append(self._want(first, count))
        return wants

    def _want(self, first: int, count: int) -> BlobRequest:
        return BlobRequest(self.ref.sha256, self._part, first, count, self._limit.wanted)


class BlobSender:
    """Answers blob requests from the first of its stores that has the blob; it is stateless."""

    def __init__(self, *stores: BlobStore) -> None:
        self._stores = stores

    def leaves(self, sha256: str) -> int:
        """Leaves of a blob; 0 for one that no store has."""
        store = next((s for s in self._stores if s.has(sha256)), None)
        try:
            return 0 if store is None else -(-store.size(sha256) // LEAF)
        except StorageError:
            return 0

    def answer(self, want: BlobRequest, max_packet: int = MAX_PACKET) -> Iterator[bytes] | BlobNotFound:
        """The requested chunks, as far as the blob goes, read as they are consumed; or that no store has the blob.

        Raises `ProtocolError` if not even one leaf fits into an MQTT packet of `max_packet` bytes.
        """
        step = min(leaves_per_chunk(max_packet), want.most or MAX_REQUEST)
        store = next((s for s in self._stores if s.has(want.sha256)), None)
        if store is None:
            return BlobNotFound(want.sha256)
        if want.part == "leaves":
            try:
                return _pieces(want, store.table(want.sha256), step)
            except StorageError:
                if store.has(want.sha256):
                    raise
                return BlobNotFound(want.sha256)  # deleted meanwhile
        return _leaves(store, want, step)


def _leaves(store: BlobStore, want: BlobRequest, step: int) -> Iterator[bytes]:
    step = -(-want.count // -(-want.count // step))  # chunks of one size, where the last would be a small one
    with (
        suppress(StorageError, OSError),
        store.open(want.sha256) as file,
    ):  # deleted: the next request is answered accordingly
        yield from read_chunks(file, want.sha256, want.first, want.count, step)


def _pieces(want: BlobRequest, table: bytes, step: int) -> Iterator[bytes]:
    end = want.first + want.count
    for first in range(want.first, end, step):
        payload = table[first * LEAF : min(first + step, end) * LEAF]
        if not payload:
            return
        yield Chunk(want.sha256, "leaves", first, payload).to_bytes()
