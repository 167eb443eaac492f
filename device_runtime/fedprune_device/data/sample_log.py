"""The samples' log within a bounded size: where each sample is, and room that is made for more.

The oldest segment is reclaimed: its samples that still count are written again, at the log's end, and its file is
deleted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from fedprune.core.closeable import Closeable
from fedprune.core.errors import StorageError, StorageFullError
from fedprune_device.data.reservoir import Reservoir
from fedprune_device.data.segment_log import Kind, LogRecord, RecordPosition, SegmentLog, counts_record, payload_name
from fedprune_device.data.stored_array import OpenFiles

_LOG = logging.getLogger("fedprune.device")

# Segments that the space on the disk is divided into: reclaiming one rewrites at most this share of the samples.
SEGMENTS = 16
# Bytes of samples that are rewritten with one sync, so that reclaiming a segment of many small samples is fast.
_REWRITE_BYTES = 256 * 1024


class SampleLog(Closeable):
    """The records of the samples that `reservoir` keeps, of at most `max_bytes` bytes.

    `on_damage` is called with the name of a sample whose bytes aren't those that were written.

    Attributes:
        positions: Where each sample is, by name.
    """

    def __init__(
        self, root: Path, key: bytes, max_bytes: int, reservoir: Reservoir, on_damage: Callable[[str], None]
    ) -> None:
        self._max_bytes, self._segment_bytes = max_bytes, max_bytes // SEGMENTS
        self._reservoir, self._on_damage = reservoir, on_damage
        self._log = SegmentLog(root, key, self._segment_bytes)
        self.positions: dict[str, RecordPosition] = {}

    @property
    def size(self) -> int:
        """Bytes on the disk."""
        return self._log.size

    def replay(self) -> Iterator[tuple[LogRecord, RecordPosition]]:
        """All records, in the order in which they were written."""
        return self._log.replay()

    def open_segments(self, segments: list[int]) -> OpenFiles:
        return self._log.open_segments(segments)

    def read(self, name: str) -> bytes | None:
        """A sample's bytes; None, and `on_damage` is called, if they are damaged."""
        position = self.positions[name]
        payload = self._log.read(position, self._log.open_segments([position.segment]))
        if payload_name(payload).hex() == name:
            return payload
        self._on_damage(name)
        return None

    def write(self, records: list[LogRecord]) -> list[RecordPosition]:
        """Append records, and make room for them first. Raises `StorageError` if the disk fails or is full."""
        self._make_room(sum(r.size for r in records))
        return self._append(records)

    def write_counts(self) -> None:
        """Write the counts of seen samples, unsynced: if they get lost, slightly too many new samples are kept."""
        record = counts_record(self._reservoir.seen_counts)
        try:
            self._make_room(record.size)
            self._log.append([record], sync=False)
        except StorageError as error:
            _LOG.warning("can't note how many samples were seen: %s", error)

    def close(self) -> None:
        self._log.close()

    def _append(self, records: list[LogRecord]) -> list[RecordPosition]:
        # Each segment begins with the counts: those of a segment that is reclaimed are gone.
        if self._log.needs_new_segment(sum(r.size for r in records)):
            counts = counts_record(self._reservoir.seen_counts)
            if counts.size <= self._segment_bytes // 4:
                return self._log.append([counts, *records])[1:]
        return self._log.append(records)

    def _make_room(self, need: int) -> None:
        """Reclaim the oldest segments until the log, with `need` more bytes, stays within its limit."""
        for _ in range(4 * SEGMENTS):
            segments = self._log.segments
            if len(segments) < 2 or self._log.size + need + self._segment_bytes <= self._max_bytes:
                return
            self._rewrite_segment(segments[0])
            self._log.remove_oldest()
        raise StorageFullError("no room for samples", expected=f"at most {self._max_bytes} bytes", got=self._log.size)

    def _rewrite_segment(self, segment: int) -> None:
        live = {n: p for n, p in self.positions.items() if p.segment == segment}
        if not live:
            return
        batch: list[LogRecord] = []
        size = 0
        file = self._log.open_segments([segment])
        for name, position in live.items():
            payload = self._log.read(position, file)
            if payload_name(payload).hex() != name:
                self._on_damage(name)
                continue
            record = LogRecord(Kind.SAMPLE, bytes.fromhex(name), self._reservoir.label(name), 0, payload)
            size += record.size
            # A batch never spans two segments.
            if batch and (size > _REWRITE_BYTES or self._log.needs_new_segment(size)):
                self._rewrite(batch)
                batch, size = [], record.size
            batch.append(record)
        self._rewrite(batch)

    def _rewrite(self, records: list[LogRecord]) -> None:
        if records:
            positions = self._append(records)
            self.positions.update((r.name.hex(), position) for r, position in zip(records, positions, strict=True))
