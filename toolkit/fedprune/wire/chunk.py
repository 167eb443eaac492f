"""Chunks: binary messages with a part of a blob or of its leaf table.

A leaf is 32 KiB of a blob (the last one may be shorter); the leaf table has the leaves' hashes. A chunk is a header of
44 bytes and the bytes of consecutive leaves, or of consecutive 32 KiB pieces of the leaf table.

    offset  bytes
    0       3      "FPC"
    3       1      version, 1
    4       1      part: 0 data, 1 leaves
    5       3      zero
    8       4      index of the first leaf or piece, little-endian
    12      32     sha256 of the blob
    44      ...    payload, 1 byte to 1 MiB
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterator
from dataclasses import dataclass
from io import RawIOBase

from fedprune.blobs.blob_ref import LEAF_BYTES
from fedprune.core.errors import ProtocolError
from fedprune.wire.messages import BLOB_PARTS

HEADER_STRUCT = struct.Struct("<3sBB3sI32s")
# Payload bytes that no chunk may exceed.
MAX_PAYLOAD_BYTES = 1024 * 1024

# Quality of service of chunks: lost ones are requested again, and the acknowledgements of QoS 1 cost up to two thirds
# of the rate where TCP's delayed acknowledgements meet Nagle's algorithm, as in a default Mosquitto.
CHUNK_QOS = 0

# Default limit of an MQTT packet with a chunk: three leaves fit, and every known broker accepts it.
DEFAULT_MAX_PACKET = 128 * 1024

# Bytes of an MQTT packet for topic, packet header and chunk header.
PACKET_OVERHEAD_BYTES = 512

_MAGIC = b"FPC"
_VERSION = 1


@dataclass(frozen=True)
class Chunk:
    """Consecutive leaves of a blob (part `data`), or pieces of its leaf table (part `leaves`)."""

    sha256: str
    part: str
    first: int
    payload: bytes | memoryview

    def to_bytes(self) -> bytes:
        """The chunk as it is sent. Raises `ProtocolError` if the payload is empty or too long."""
        _check_payload(len(self.payload))
        return b"".join((chunk_header(self.sha256, self.part, self.first), self.payload))

    @classmethod
    def parse(cls, raw: bytes) -> Chunk:
        """Read and check a chunk. Its payload is verified against the leaf table by the transfer (`Pull`). Raises
        `ProtocolError` if the header or the payload's length is wrong."""
        if len(raw) < HEADER_STRUCT.size:
            raise ProtocolError("chunk is cut short", expected=f"more than {HEADER_STRUCT.size} bytes", got=len(raw))
        magic, version, part_number, zero, first, digest = HEADER_STRUCT.unpack_from(raw)
        if magic != _MAGIC or version != _VERSION or zero != b"\0" * 3:
            raise ProtocolError("chunk header", expected="FPC, version 1", got=raw[:8].hex())
        if part_number >= len(BLOB_PARTS):
            raise ProtocolError("part of a chunk", expected="0 or 1", got=part_number)
        _check_payload(len(raw) - HEADER_STRUCT.size)
        return cls(digest.hex(), BLOB_PARTS[part_number], first, memoryview(raw)[HEADER_STRUCT.size :])

    def leaves(self) -> Iterator[tuple[int, memoryview]]:
        view = memoryview(self.payload)
        for offset in range(0, len(view), LEAF_BYTES):
            yield self.first + offset // LEAF_BYTES, view[offset : offset + LEAF_BYTES]

    def runs(self, indices: Container[int]) -> Iterator[tuple[int, memoryview]]:
        """The leaves or pieces with these indices, as runs of consecutive ones with the index of their first."""
        view, count = memoryview(self.payload), -(-len(self.payload) // LEAF_BYTES)
        position = 0
        while position < count:
            end = position
            while end < count and self.first + end in indices:
                end += 1
            if end > position:
                yield self.first + position, view[position * LEAF_BYTES : end * LEAF_BYTES]
            position = end + 1


def chunk_header(sha256: str, part: str, first: int) -> bytes:
    return HEADER_STRUCT.pack(_MAGIC, _VERSION, BLOB_PARTS.index(part), b"\0" * 3, first, bytes.fromhex(sha256))


def read_chunks(file: RawIOBase, sha256: str, first: int, count: int, step: int) -> Iterator[bytes]:
    """Encoded chunks of `step` leaves each, read from a blob's file as they are consumed: `count` leaves from `first`
    on, as far as the blob goes."""
    # One buffer for all chunks: fresh memory costs more time than reading into it.
    buffer = bytearray(HEADER_STRUCT.size + step * LEAF_BYTES)
    with memoryview(buffer) as view:
        for leaf in range(first, first + count, step):
            view[: HEADER_STRUCT.size] = chunk_header(sha256, "data", leaf)
            file.seek(leaf * LEAF_BYTES)
            length = file.readinto(view[HEADER_STRUCT.size :][: min(step, first + count - leaf) * LEAF_BYTES])
            if not length:
                return
            yield bytes(view[: HEADER_STRUCT.size + length])


def leaves_per_chunk(max_packet: int) -> int:
    """The number of leaves that fit into an MQTT packet of `max_packet` bytes. Raises `ProtocolError` if not even
    one fits."""
    count = min(max_packet - PACKET_OVERHEAD_BYTES, MAX_PAYLOAD_BYTES) // LEAF_BYTES
    if count < 1:
        min_bytes = f"at least {LEAF_BYTES + PACKET_OVERHEAD_BYTES} bytes"
        raise ProtocolError("the broker's packet limit is too low", expected=min_bytes, got=max_packet)
    return count


def _check_payload(length: int) -> None:
    if not 0 < length <= MAX_PAYLOAD_BYTES:
        raise ProtocolError("payload of a chunk", expected=f"1 to {MAX_PAYLOAD_BYTES} bytes", got=length)


class ChunkLimit:
    """The number of leaves of a received chunk, shared by all transfers through one broker.

    A broker with a lower packet limit drops a chunk silently, or disconnects its sender. If chunks of several leaves
    were requested and none came, smaller ones are requested next. If those don't come either, the size was not the
    reason. `max_packet` is the largest MQTT packet, in bytes, that the broker is known to accept.
    """

    def __init__(self, max_packet: int = DEFAULT_MAX_PACKET) -> None:
        self.leaves = self._initial_leaves = leaves_per_chunk(max_packet)
        self._proven_leaves = 0

    @property
    def requested_limit(self) -> int | None:
        """The limit to put into a request; None if the sender applies it anyway."""
        return self.leaves if self.leaves < leaves_per_chunk(DEFAULT_MAX_PACKET) else None

    def note_arrival(self, leaves: int) -> None:
        """Note that a chunk of this many leaves has arrived."""
        self._proven_leaves = max(self._proven_leaves, leaves)

    def note_silence(self) -> None:
        """Note that several leaves were requested and none came: halve the limit, or start again from the first one."""
        if self._proven_leaves >= self.leaves:
            return  # such chunks have come through: there is another reason
        self.leaves = max(self.leaves // 2, self._proven_leaves) if self.leaves > 1 else self._initial_leaves
