"""The download of a blob over MQTT, without network I/O: received chunks go in, requests come out.

The receiver drives the transfer, and the sender (`wire.blob_sender`) keeps no state. The receiver requests leaves
(pieces of 32 KiB, see `blobs.blob_ref`), and never has more than a window of them outstanding, so that the broker never
holds more. A broker's acknowledgement only means that the broker has the message: a default Mosquitto acknowledged
3,000 messages for a slow subscriber and delivered 1,132 of them. Chunks may get lost, arrive twice, late or in any
order; each leaf is verified on arrival.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from fedprune.blobs.blob_ref import DIGEST_BYTES, LEAF_BYTES, BlobRef
from fedprune.blobs.partial_blob import PartialBlob
from fedprune.core.errors import ProtocolError
from fedprune.wire.chunk import DEFAULT_MAX_PACKET, Chunk, ChunkLimit, leaves_per_chunk
from fedprune.wire.messages import BlobRequest
from fedprune.wire.response_time import MAX_PATIENCE_S, ResponseTime

# The average below which a transfer is too slow: a board ends its download or upload, and the server's uploads make
# room for others.
MIN_BYTES_PER_S = 8192

# The least number of leaves of a request: one full chunk.
CHUNK_LEAVES = leaves_per_chunk(DEFAULT_MAX_PACKET)

# Outstanding leaves of one blob at the beginning: 1 MiB.
WINDOW_LEAVES = 32

# Outstanding leaves on a fast link: 4 MiB. They wait in no queue there, and a small window would leave the link idle.
WIDE_WINDOW_LEAVES = 128

# Response times below which the window grows, and above which it shrinks.
_QUICK_RESPONSE_S, _SLOW_RESPONSE_S = 0.1, 1.0

# Seconds without progress before leaves are requested again; see `Pull`.
PATIENCE_S = 5.0

# Damaged arrivals of one leaf, or of the leaf table, after which the transfer fails.
MAX_TRIES = 8


class Pull:
    """The download of one blob.

    The caller sends the requests that the methods return, passes every chunk of this blob to `on_chunk`, and calls
    `on_tick` about once a second, after all chunks that have arrived. After a reconnection it calls `start` again.

    Args:
        chunk_leaves: Minimum number of leaves per request, unless fewer are missing.
        window_leaves: Outstanding leaves (requested, and not here yet) at most.
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
        patience_s: float = PATIENCE_S,
        answers: ResponseTime | None = None,
        lend: Callable[[PartialBlob], object] | None = None,
    ) -> None:
        self.ref = ref
        self.stalls = 0  # consecutive repetitions without any progress
        self._partial = partial
        self._lend = lend
        self._limit = limit or ChunkLimit()
        self._has_arrivals = False  # whether any requested leaf has
        self._chunk_leaves = chunk_leaves
        self._max_window = window_leaves
        self._window = self._min_window = min(window_leaves, WINDOW_LEAVES)
        self._answers = answers or ResponseTime()
        self._base_patience = self._patience = patience_s
        # By outstanding leaf or piece the serial number and time of its request, in the order of the requests.
        self._outstanding: dict[int, tuple[int, float]] = {}
        self._repeated: set[int] = set()  # those requested twice, which may come twice
        self._serial = 0
        self._newest_serial = 0  # highest serial number that has arrived
        self._progress_at = 0.0
        self._tries: dict[int, int] = {}
        self._cursor = 0
        self._pieces: dict[int, bytes] = {}
        self._is_done = False

    @property
    def is_done(self) -> bool:
        return self._is_done

    @property
    def progress(self) -> tuple[int, int]:
        """The number of leaves that have arrived, and of all leaves."""
        return self._partial.present_count, self.ref.leaf_count

    @property
    def outstanding(self) -> int:
        """Outstanding leaves or pieces; never more than the window."""
        return len(self._outstanding)

    def start(self, now: float) -> list[BlobRequest]:
        """Begin, or begin again after a reconnection, which has lost all outstanding leaves. Raises
        `ProtocolError` if the reference contradicts itself."""
        if self._partial.is_complete:
            self._outstanding.clear()
            self._is_done = True
            return []
        self.note_silence()
        self._progress_at = now
        self._patience, self._window = self._answers.patience(self._base_patience), self._min_window
        self._repeated.clear()
        requests = self._request(list(self._outstanding), now)
        return requests + self._advance(now)

    def repeat_due(self, now: float) -> list[BlobRequest]:
        """Repeat the requests whose answers are due: the sender has reconnected, and may have lost all requests."""
        return self._repeat(
            [i for i, (_, asked_at) in self._outstanding.items() if now - asked_at >= self._answers.slowest_s], now
        )

    def on_chunk(self, chunk: Chunk, now: float) -> list[BlobRequest]:
        """Process a chunk; leaves that were not requested are ignored. Raises `ProtocolError` if a leaf or the leaf
        table arrived damaged too often, or the reference contradicts itself."""
        if self._is_done or chunk.sha256 != self.ref.sha256 or chunk.part != self._part:
            return []
        damaged: list[int] = []
        self._limit.note_arrival(-(-len(chunk.payload) // LEAF_BYTES))
        for first, payload in chunk.runs(self._outstanding):
            self._has_arrivals = True
            damaged += self._store(first, payload, now)
        return self._request(damaged, now) + self._advance(now)

    def on_tick(self, now: float) -> list[BlobRequest]:
        """Repeat requests whose answers seem lost. Raises as `on_chunk`."""
        if self._is_done or not self._outstanding:
            return []
        if now - self._progress_at > self._patience:
            self._window = self._min_window
            self.note_silence()
            self.stalls += 1
            self._patience = min(2 * self._patience, max(MAX_PATIENCE_S, self._base_patience))
            return self._repeat(list(self._outstanding), now)
        # Leaves that later requests have overtaken for longer than the patience are lost, while the rest keeps
        # arriving.
        overtaken = []
        for index, (serial, asked_at) in self._outstanding.items():  # in the order of asking
            if serial >= self._newest_serial or now - asked_at <= self._patience:
                break
            overtaken.append(index)
        return self._repeat(overtaken, now)

    def note_silence(self) -> None:
        """Note that outstanding leaves don't come. If none has come at all, chunks may be too large for the broker, and
        smaller ones are requested next."""
        if len(self._outstanding) > 1 and not self._has_arrivals:
            self._limit.note_silence()
        self._has_arrivals = False

    @property
    def _part(self) -> str:
        return "leaves" if self._partial.table is None else "data"

    def _store(self, first: int, payload: memoryview, now: float) -> list[int]:
        """Store consecutive requested leaves or pieces; returns the indices of damaged ones."""
        indices = range(first, first - (-len(payload) // LEAF_BYTES))
        if self._part == "data":
            damaged = self._partial.write_leaves(first, payload)
        else:
            length = self.ref.leaf_count * DIGEST_BYTES
            pieces = {i: bytes(payload[(i - first) * LEAF_BYTES : (i - first + 1) * LEAF_BYTES]) for i in indices}
            damaged = [i for i, piece in pieces.items() if len(piece) != min(LEAF_BYTES, length - i * LEAF_BYTES)]
            self._pieces.update({i: piece for i, piece in pieces.items() if i not in damaged})
        for index in indices:
            if index in damaged:
                self._count_try(index)
                continue
            serial, asked_at = self._outstanding.pop(index)
            self._newest_serial = max(self._newest_serial, serial)
            self._note_progress(None if index in self._repeated else now - asked_at, now)
            self._repeated.discard(index)
        return damaged

    def _note_progress(self, response_s: float | None, now: float) -> None:
        self.stalls = 0
        self._progress_at = now
        if response_s is None:
            return  # either request may have been answered, so that the time is ambiguous (Karn's algorithm)
        self._answers.note_response(response_s)
        if response_s < _QUICK_RESPONSE_S:
            self._window = min(self._window + 1, self._max_window)
        elif response_s > _SLOW_RESPONSE_S:
            self._window = self._min_window
        self._patience = self._answers.patience(self._base_patience)

    def _count_try(self, index: int) -> None:
        tries = self._tries[index] = self._tries.get(index, 0) + 1
        if tries >= MAX_TRIES:
            what = f"leaf {index}" if self._part == "data" else "leaf table"
            raise ProtocolError(
                f"{what} of blob {self.ref.sha256} arrived damaged {tries} times",
                hint="The sender's copy is damaged, or someone else publishes on its topic.",
            )

    def _advance(self, now: float) -> list[BlobRequest]:
        """Request as much as fits into the window: first the leaf table, and the data once that is complete."""
        if self._is_done:
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
            self._has_arrivals = False
        lend, self._lend = self._lend, None
        if lend is not None:
            lend(self._partial)
        if self._partial.present_count == self.ref.leaf_count:
            self._partial.finish()
            self._is_done = True
            return []
        return self._fill(self.ref.leaf_count, now)

    def _fill(self, total: int, now: float) -> list[BlobRequest]:
        is_data = self._part == "data"
        free_slots = self._window - len(self._outstanding)
        if (
            free_slots < max(self._chunk_leaves, self._window // 4)
            and self._outstanding
            and total - self._cursor > free_slots
        ):
            return []  # each request costs both sides a message: wait until one can hold more
        missing_indices: list[int] = []
        while self._cursor < total and len(missing_indices) < free_slots:
            index = self._cursor
            self._cursor += 1
            if not (self._partial.present_leaves[index] if is_data else index in self._pieces):
                missing_indices.append(index)
        return self._request(missing_indices, now)

    def _repeat(self, indices: list[int], now: float) -> list[BlobRequest]:
        """Repeat requests whose answers may still arrive; the patience starts again, so that they have time to come."""
        if indices:
            self._progress_at = now
        self._repeated.update(indices)
        return self._request(indices, now)

    def _request(self, indices: Iterable[int], now: float) -> list[BlobRequest]:
        requests: list[BlobRequest] = []
        first = count = 0
        for index in sorted(indices):
            self._serial += 1
            self._outstanding.pop(index, None)
            self._outstanding[index] = (self._serial, now)
            if count and index == first + count:
                count += 1
                continue
            if count:
                requests.append(self._blob_request(first, count))
            first, count = index, 1
        if count:
            requests.append(self._blob_request(first, count))
        return requests

    def _blob_request(self, first: int, count: int) -> BlobRequest:
        return BlobRequest(self.ref.sha256, self._part, first, count, self._limit.requested_limit)
