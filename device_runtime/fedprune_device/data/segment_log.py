"""Stores samples in an append-only log of segments, which wears a flash card little and survives power cuts.

A sample in a file of its own costs a write of the folder, of an inode and of both their journals; here it is one
write and one sync at the end of a file. Nothing is changed in place. Every record has a head with a digest of its
own, keyed so that no sample can pass for a record, and names its payload by its digest: so a damaged payload is
recognised and skipped. A power cut tears only the end of a segment; that segment is never written to again.

Space is reclaimed from the oldest segment on: its live records are appended again, and the file is deleted. A deletion
in the oldest segment can only be of an older record, which is gone already, so that deletions aren't appended again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from fedprune.core.disk import flush_folder, open_own_file, storage_errors, write_all
from fedprune_device.data.stored_array import OpenFiles

_LOG = logging.getLogger("fedprune.device")

_MAGIC = b"FpS1"
_HEAD_STRUCT = struct.Struct("<4sB3xiIQ16s")
_SEAL_BYTES = 8
HEAD_BYTES = _HEAD_STRUCT.size + _SEAL_BYTES
NAME_BYTES = 16
_SEGMENT_FILE = re.compile(r"segment-(\d{8})\.log")


class Kind(IntEnum):
    """The kinds of records."""

    SAMPLE = 1  # a sample is kept, with a label; an older record of the same sample no longer counts
    DROPPED = 2  # a sample made room for another one
    DELETED = 3  # the application deleted a sample
    COUNTS = 4  # how many samples were seen; the payload is JSON


@dataclass(frozen=True)
class RecordPosition:
    """The position of a record's payload: segment, offset and size."""

    segment: int
    offset: int
    size: int


@dataclass(frozen=True)
class LogRecord:
    """One record: `name` has 16 bytes, a sample's name or a digest of the payload; `label` is -1 without a class.

    `seen_count` counts samples of that class, 0 for unknown. The payload is empty where a record is read from a log.
    """

    kind: Kind
    name: bytes
    label: int = 0
    seen_count: int = 0
    payload: bytes = b""

    @property
    def size(self) -> int:
        return HEAD_BYTES + len(self.payload)


def payload_name(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:NAME_BYTES]


def counts_record(seen_counts: Mapping[int, int]) -> LogRecord:
    """A record of how many samples of each class were ever seen."""
    payload = json.dumps({str(c): n for c, n in seen_counts.items()}).encode()
    return LogRecord(Kind.COUNTS, payload_name(payload), payload=payload)


def counts_in(record: LogRecord) -> dict[int, int]:
    """The number of samples of each class that were seen; raises `ValueError` if the record is damaged."""
    if payload_name(record.payload) != record.name:
        raise ValueError("the digest is another")
    try:
        return {int(label): int(seen_count) for label, seen_count in json.loads(record.payload).items()}
    except (AttributeError, TypeError) as error:
        raise ValueError(str(error)) from error


class SegmentLog:
    """The log, for one writer at a time. `key` is secret and keys the heads' digests."""

    def __init__(self, root: Path, key: bytes, segment_bytes: int) -> None:
        self._root, self._key, self._segment_bytes = root, key, segment_bytes
        with storage_errors(f"can't read {root}"):
            root.mkdir(parents=True, exist_ok=True)
            files = [(m, p.stat().st_size) for p in root.iterdir() if (m := _SEGMENT_FILE.fullmatch(p.name))]
        self._sizes = dict(sorted((int(m[1]), size) for m, size in files))
        self._last_segment = max(self._sizes, default=0)
        self._descriptor: int | None = None
        self._torn = True  # the last segment may end in a torn record, until it has been read to its end

    @property
    def size(self) -> int:
        return sum(self._sizes.values())

    @property
    def segments(self) -> list[int]:
        return list(self._sizes)

    def path(self, segment: int) -> Path:
        return self._root / f"segment-{segment:08}.log"

    def replay(self) -> Iterator[tuple[LogRecord, RecordPosition]]:
        """All records, oldest first. Damaged bytes are skipped and logged."""
        for segment in self._sizes:
            with storage_errors(f"can't read {self.path(segment)}"):
                data = self.path(segment).read_bytes()
            position = 0
            while position < len(data):
                record, size = self._parse(data, position)
                if record is None:
                    next_record = data.find(_MAGIC, position + 1)
                    _LOG.warning("%s: damaged or torn at byte %d", self.path(segment).name, position)
                    position = next_record if next_record >= 0 else len(data)
                    self._torn = True
                    continue
                self._torn = False
                yield record, RecordPosition(segment, position + HEAD_BYTES, size)
                position += HEAD_BYTES + size
        self._torn = self._torn or not self._sizes

    def needs_new_segment(self, need: int) -> bool:
        size = self._sizes.get(self._last_segment, self._segment_bytes)
        return self._torn or (size > 0 and size + need > self._segment_bytes)

    def open_segments(self, segments: Sequence[int]) -> OpenFiles:
        """Segments that stay readable whatever is written or removed."""
        descriptors: list[int] = []
        try:
            with storage_errors(f"can't read {self._root}"):
                descriptors += (os.open(self.path(n), os.O_RDONLY | os.O_CLOEXEC) for n in segments)
        finally:
            copy = OpenFiles(*descriptors)
        return copy

    def read(self, position: RecordPosition, segment: OpenFiles) -> bytes:
        """A payload of an opened segment; shorter if the file was cut off."""
        with storage_errors(f"can't read {self._root}"):
            return os.pread(segment.fileno(), position.size, position.offset)

    def remove_oldest(self) -> None:
        segment = next(iter(self._sizes))
        if segment == self._last_segment:
            self._torn = True
            self.close()
        with storage_errors(f"can't write {self._root}"):
            self.path(segment).unlink(missing_ok=True)
            flush_folder(self._root)
        del self._sizes[segment]

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def append(self, records: Sequence[LogRecord], *, sync: bool = True) -> list[RecordPosition]:
        """Write records, all or none, and return where their payloads are stored; without `sync` they may get lost."""
        with storage_errors(f"can't write {self._root}"):
            if self.needs_new_segment(sum(r.size for r in records)):
                self.close()
                number = self._last_segment + 1
                path = self.path(number)
                self._descriptor = open_own_file(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
                flush_folder(self._root)
                self._last_segment, self._sizes[number], self._torn = number, 0, False
            if self._descriptor is None:
                self._descriptor = open_own_file(self.path(self._last_segment), os.O_RDWR)
            descriptor = self._descriptor
            start = end = self._sizes[self._last_segment]
            positions, buffers = [], []
            for record in records:
                size = len(record.payload)
                head = _HEAD_STRUCT.pack(_MAGIC, record.kind, record.label, size, record.seen_count, record.name)
                positions.append(RecordPosition(self._last_segment, end + HEAD_BYTES, size))
                buffers += [head, self._seal(head), record.payload]
                end += record.size
            # Until all is written: after an error nothing is ever appended behind a record that may be torn.
            self._torn = True
            try:
                write_all(descriptor, b"".join(buffers), start)
                if sync:
                    os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, start)
                self._sizes[self._last_segment] = os.fstat(descriptor).st_size
                self._torn = self._sizes[self._last_segment] != start
                raise
            self._sizes[self._last_segment], self._torn = end, False
        return positions

    def _seal(self, head: bytes) -> bytes:
        return hashlib.blake2b(head, digest_size=_SEAL_BYTES, key=self._key).digest()

    def _parse(self, data: bytes, start: int) -> tuple[LogRecord | None, int]:
        head = data[start : start + _HEAD_STRUCT.size]
        if len(head) < _HEAD_STRUCT.size or data[start + _HEAD_STRUCT.size : start + HEAD_BYTES] != self._seal(head):
            return None, 0
        _, kind, label, size, seen_count, name = _HEAD_STRUCT.unpack(head)
        if start + HEAD_BYTES + size > len(data) or kind not in {*Kind}:
            return None, 0
        payload = data[start + HEAD_BYTES : start + HEAD_BYTES + size] if kind == Kind.COUNTS else b""
        return LogRecord(Kind(kind), name, label, seen_count, payload), size
