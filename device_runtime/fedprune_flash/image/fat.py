"""A FAT file system in an image: files and folders read and written without root, a mount or another program.

No kept library fits: pyfatfs rests on the package `fs`, which nobody maintains. Checked against fsck.fat and mtools.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from fedprune.core.errors import ImageError
from fedprune_flash.image import fat_names
from fedprune_flash.image.fat_table import FatTable, read_layout
from fedprune_flash.image.region import Region

MAX_FILE = 2**32 - 1
_ENTRY = 32
_FREE, _END = 0xE5, 0x00
_LONG, _FOLDER, _LABEL, _ARCHIVE = 0x0F, 0x10, 0x08, 0x20
_MAX_FOLDER = 65_536 * _ENTRY
_PIECE = 2**20


@dataclass(frozen=True)
class FatEntry:
    """A file or folder.

    Attributes:
        name: As people read it.
        folder: Whether it is one.
        size: Bytes of a file.
        first: Its first cluster; 0 where it has none.
        short: Its short name, eleven bytes.
        at: The place of its short entry in the folder, in bytes.
        slots: How many entries it takes, those of the long name included.
    """

    name: str
    folder: bool
    size: int
    first: int
    short: bytes
    at: int
    slots: int


class Fat:
    """A FAT file system of 12, 16 or 32 bits. Paths are separated by `/` and begin at the root; letters' case is kept
    and ignored. What is written is on the disk after `flush`.

    Args:
        region: Its partition.
        when: The time that new files bear; now by default.

    Raises:
        ImageError: It is none, or damaged.
    """

    def __init__(self, region: Region, when: datetime | None = None) -> None:
        self._region = region
        self._shape = read_layout(region)
        self._table = FatTable(region, self._shape)
        self._when = _stamp(when or datetime.now())  # FAT holds local time

    @property
    def bits(self) -> int:
        """12, 16 or 32."""
        return self._shape.bits

    @property
    def cluster(self) -> int:
        """Bytes of a cluster, of which every file takes whole ones."""
        return self._shape.cluster

    @property
    def free(self) -> int:
        """Bytes of free clusters."""
        return self._table.free * self._shape.cluster

    def find(self, path: str) -> FatEntry | None:
        """A file or folder; None where there is none.

        Raises:
            ImageError: The file system is damaged.
        """
        folder = _Folder(self._region, self._shape_root(), self)
        parts = [p for p in path.split("/") if p]
        for index, part in enumerate(parts):
            found = folder.find(part)
            if found is None or index == len(parts) - 1:
                return found
            if not found.folder:
                return None
            folder = self._folder(found)
        return None

    def listing(self, path: str = "") -> list[FatEntry]:
        """What a folder holds, in the order of its entries, without `.` and `..`.

        Raises:
            ImageError: There is no such folder, or the file system is damaged.
        """
        return list(self._open(path).entries())

    def read(self, path: str, limit: int = 2**20) -> bytes:
        """A file's content.

        Args:
            path: The file.
            limit: How long it may be.

        Raises:
            ImageError: There is none, it is longer, or the file system is damaged.
        """
        found = self.find(path)
        if found is None or found.folder:
            raise ImageError(f"{self._region.name} has no file {path}")
        clusters = self._table.chain(found.first)
        if found.size > min(limit, len(clusters) * self._shape.cluster):
            raise ImageError(f"{path} of {self._region.name}", expected=f"at most {limit} bytes", got=found.size)
        raw = b"".join(self._region.read(at, count) for at, count in self._runs(clusters))
        return raw[: found.size]

    def write(self, path: str, data: bytes | BinaryIO, size: int | None = None) -> None:
        """Write a file, in place of the one that is there, and the folders that it needs.

        Args:
            path: The file.
            data: Its content, or an open file with it.
            size: How many bytes that file gives.

        Raises:
            ImageError: No room, a folder of that name, a name that FAT forbids, or content that ends too early.
        """
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        size = len(data) if isinstance(data, bytes) else size or 0
        if size > MAX_FILE:
            raise ImageError(f"{path} is too large for FAT", expected=f"at most {MAX_FILE} bytes", got=size)
        above, _, name = path.strip("/").rpartition("/")
        fat_names.checked_name(name)
        self.make_folder(above)
        folder = self._open(above)
        before = folder.find(name)
        if before is not None and before.folder:
            raise ImageError(f"{path} is a folder of {self._region.name}")
        if before is not None:
            self._table.give_back(self._table.chain(before.first))
        clusters = self._table.take(-(-size // self._shape.cluster))
        self._fill(clusters, source, size, path)
        first = clusters[0] if clusters else 0
        if before is None:
            folder.add(name, _ARCHIVE, first, size, self._when)
        else:
            folder.change(before, first, size, self._when)

    def make_folder(self, path: str) -> None:
        """Make a folder and those above it; what is there stays.

        Raises:
            ImageError: No room, a file of that name, or a name that FAT forbids.
        """
        above = ""
        for part in (p for p in path.split("/") if p):
            folder = self._open(above)
            found = folder.find(part)
            if found is None:
                fat_names.checked_name(part)
                (cluster,) = self._table.take(1)
                parent = folder.first if above else 0
                raw = _entry(b".          ", _FOLDER, cluster, 0, self._when)
                raw += _entry(b"..         ", _FOLDER, parent, 0, self._when)
                at = self._place(cluster)
                self._region.write(at, raw.ljust(self._shape.cluster, b"\0"))
                folder.add(part, _FOLDER, cluster, 0, self._when)
            elif not found.folder:
                raise ImageError(f"{part} is a file of {self._region.name}, no folder")
            above = f"{above}/{part}"

    def remove(self, path: str) -> None:
        """Delete a file, or a folder that is empty; what isn't there is fine.

        Raises:
            ImageError: The folder isn't empty.
        """
        found = self.find(path)
        if found is None:
            return
        if found.folder and self.listing(path):
            raise ImageError(f"the folder {path} of {self._region.name} is not empty")
        self._table.give_back(self._table.chain(found.first))
        self._open(path.strip("/").rpartition("/")[0]).drop(found)

    def flush(self) -> None:
        """Write what is still in memory."""
        self._table.flush()

    def clusters_for(self, size: int) -> int:
        """How many clusters so many bytes take."""
        return -(-size // self._shape.cluster)

    def _open(self, path: str) -> _Folder:
        if not path.strip("/"):
            return _Folder(self._region, self._shape_root(), self)
        found = self.find(path)
        if found is None or not found.folder:
            raise ImageError(f"{self._region.name} has no folder {path}")
        return self._folder(found)

    def _folder(self, entry: FatEntry) -> _Folder:
        return _Folder(self._region, self._table.chain(entry.first), self)

    def _shape_root(self) -> list[int]:
        return self._table.chain(self._shape.root_cluster) if self._shape.bits == 32 else []

    def _fill(self, clusters: list[int], source: BinaryIO, size: int, path: str) -> None:
        for at, room in self._runs(clusters):
            done = 0
            while done < room:
                wanted = min(_PIECE, room - done)
                piece = source.read(min(wanted, size))
                if len(piece) < min(wanted, size):
                    raise ImageError(
                        f"{path} is shorter than it should be", expected=f"{size} more bytes", got=len(piece)
                    )
                size -= len(piece)
                self._region.write(at + done, piece.ljust(wanted, b"\0"))
                done += wanted

    def _runs(self, clusters: list[int]) -> Iterator[tuple[int, int]]:
        """Places and lengths of clusters, those that lie one behind the other in one."""
        start = 0
        for index in range(1, len(clusters) + 1):
            if index == len(clusters) or clusters[index] != clusters[index - 1] + 1:
                yield self._place(clusters[start]), (index - start) * self._shape.cluster
                start = index

    def _place(self, cluster: int) -> int:
        return self._shape.data + (cluster - 2) * self._shape.cluster

    def places(self, clusters: list[int]) -> list[tuple[int, int]]:
        """Where a folder's bytes are: those of the root have a place of their own in 12 and 16 bits."""
        return list(self._runs(clusters)) if clusters else [(self._shape.root, self._shape.root_bytes)]

    def grow(self, clusters: list[int]) -> None:
        """Give a folder another cluster.

        Raises:
            ImageError: There is none, or it is the root of 12 or 16 bits, which can't grow.
        """
        if not clusters:
            raise ImageError(f"the root folder of {self._region.name} is full")
        (new,) = self._table.take(1, after=clusters[-1])
        self._region.write(self._place(new), bytes(self._shape.cluster))
        clusters.append(new)


class _Folder:
    """A folder's entries."""

    def __init__(self, region: Region, clusters: list[int], fat: Fat) -> None:
        self._region, self._clusters, self._fat = region, clusters, fat
        self.first = clusters[0] if clusters else 0

    def entries(self) -> Iterator[FatEntry]:
        """All but labels, `.` and `..`."""
        raw = self._bytes()
        parts: list[bytes] = []
        for at in range(0, len(raw), _ENTRY):
            row = raw[at : at + _ENTRY]
            if row[0] == _END:
                return
            if row[0] == _FREE:
                parts = []
            elif row[11] & 0x3F == _LONG:
                parts = [*([] if row[0] & 0x40 else parts), row]
            else:
                if not row[11] & _LABEL and not row.startswith((b".          ", b"..         ")):
                    yield self._read(row, parts, at)
                parts = []

    def _read(self, row: bytes, parts: list[bytes], at: int) -> FatEntry:
        short = bytes(row[:11])
        name = None
        numbers = [p[0] & 0x3F for p in parts]
        if numbers == list(range(len(parts), 0, -1)) and all(p[13] == fat_names.checksum(short) for p in parts):
            name = fat_names.long_name(b"".join(fat_names.long_part(p) for p in reversed(parts)))
        slots = 1 + (len(parts) if name else 0)
        high, low = struct.unpack_from("<H", row, 20)[0], struct.unpack_from("<H", row, 26)[0]
        first = low | (high << 16 if self._fat.bits == 32 else 0)
        size = struct.unpack_from("<I", row, 28)[0]
        return FatEntry(
            name or fat_names.unpacked(short, row[12]), bool(row[11] & _FOLDER), size, first, short, at, slots
        )

    def find(self, name: str) -> FatEntry | None:
        """The entry whose long or short name it is."""
        wanted = fat_names.folded(name)
        for entry in self.entries():
            if wanted in (fat_names.folded(entry.name), fat_names.folded(fat_names.unpacked(entry.short, 0))):
                return entry
        return None

    def add(self, name: str, attributes: int, first: int, size: int, when: bytes) -> None:
        """Add an entry, in the first gap that is large enough."""
        if fat_names.is_short(name):
            short, before = fat_names.packed(name), b""
        else:
            short = fat_names.alias(name, {e.short for e in self.entries()})
            before = fat_names.long_entries(name, short)
        raw = before + _entry(short, attributes, first, size, when)
        self._write(self._gap(len(raw) // _ENTRY), raw)

    def change(self, entry: FatEntry, first: int, size: int, when: bytes) -> None:
        """Let an entry tell of another content."""
        row = self._bytes()[entry.at : entry.at + _ENTRY]
        new = bytearray(_entry(entry.short, row[11] | _ARCHIVE, first, size, when))
        new[12:20] = row[12:20]  # case, and the time of making
        self._write(entry.at, new)

    def drop(self, entry: FatEntry) -> None:
        """Free an entry, and those of its long name."""
        for index in range(entry.slots):
            self._write(entry.at - index * _ENTRY, bytes((_FREE,)))

    def _gap(self, count: int) -> int:
        while True:
            raw = self._bytes()
            run, ended = 0, False
            for at in range(0, len(raw), _ENTRY):
                ended = ended or raw[at] == _END  # all that follows is free
                run = run + 1 if ended or raw[at] == _FREE else 0
                if run == count:
                    return at - (count - 1) * _ENTRY
            if len(raw) >= _MAX_FOLDER:
                raise ImageError(f"a folder of {self._region.name} is full")
            self._fat.grow(self._clusters)

    def _bytes(self) -> bytes:
        return b"".join(self._region.read(at, count) for at, count in self._fat.places(self._clusters))

    def _write(self, at: int, data: bytes | bytearray) -> None:
        for place, count in self._fat.places(self._clusters):
            if at < count:
                part = data[: count - at]
                self._region.write(place + at, part)
                data = data[len(part) :]
                at = 0
                if not data:
                    return
            else:
                at -= count


def _entry(short: bytes, attributes: int, first: int, size: int, when: bytes) -> bytes:
    high, low = first >> 16, first & 0xFFFF
    # Small letters' flags and hundredths; made; read; the cluster's high half; changed; its low half; size.
    return (
        short
        + struct.pack("<BBB", attributes, 0, 0)
        + when
        + when[2:]
        + struct.pack("<H", high)
        + when
        + struct.pack("<HI", low, size)
    )


def _stamp(when: datetime) -> bytes:
    """Time and date as FAT holds them, from 1980 on, in steps of two seconds."""
    year = min(max(when.year, 1980), 2107)
    date = year - 1980 << 9 | when.month << 5 | when.day
    return struct.pack("<HH", when.hour << 11 | when.minute << 5 | when.second // 2, date)
