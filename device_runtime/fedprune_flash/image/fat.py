"""A FAT file system in an image: files and folders read and written without root, a mount or another program.

Source: Microsoft, FAT32 File System Specification, 1.03 (2000). Checked against fsck.fat and mtools. The one library,
pyfatfs, depends on the package `fs`, which is no longer maintained.
"""

from __future__ import annotations

import io
import struct
from array import array
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import BinaryIO

from fedprune.core.errors import ImageError, shown
from fedprune_flash.image.partitions import Region

MAX_FILE = 2**32 - 1
_ENTRY = 32
_FREE, _END = 0xE5, 0x00
_LONG, _FOLDER, _LABEL, _ARCHIVE = 0x0F, 0x10, 0x08, 0x20
_MAX_FOLDER = 65_536 * _ENTRY
_PIECE = 2**20

_FAT12_CLUSTERS = 4084
_MAX_TABLE = 64 * 2**20  # bytes of a table that are read: that of a partition of 64 GB

_UNKNOWN = 0xFFFFFFFF
_RESERVED_BITS = 0xF0000000

_MAX_NAME = 255
_PER_ENTRY = 13  # UTF-16 units of a long name that one directory entry holds

_FORBIDDEN = frozenset('"*/:<>?\\|')
_SHORT = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_CODEPAGE = "cp850"
_LOWER_BASE, _LOWER_EXTENSION = 0x08, 0x10


@dataclass(frozen=True)
class FatEntry:
    """A file or folder: its long name, else its short one; its first cluster, 0 for none; its short entry's offset."""

    name: str
    folder: bool
    size: int
    first: int
    short: bytes
    at: int


class Fat:
    """A FAT file system of 12, 16 or 32 bits. Every method raises `ImageError` where it is damaged.

    Paths are separated by `/` and begin at the root; the case of names is kept and ignored. Changes are in the file
    after `flush`. New files have the time `when`; now by default.
    """

    def __init__(self, region: Region, when: datetime | None = None) -> None:
        self._region = region
        self._layout = _read_layout(region)
        self._table = _Table(region, self._layout)
        self._when = _stamp(when or datetime.now())  # FAT holds local time

    @property
    def bits(self) -> int:
        return self._layout.bits

    @property
    def cluster(self) -> int:
        return self._layout.cluster

    @property
    def free(self) -> int:
        return self._table.free * self._layout.cluster

    def find(self, path: str) -> FatEntry | None:
        found, clusters = None, self._root_clusters()
        for part in (p for p in path.split("/") if p):
            if found is not None:
                if not found.folder:
                    return None
                clusters = self._table.chain(found.first)
            found = _Folder(self._region, clusters, self).find(part)
            if found is None:
                return None
        return found

    def listing(self, path: str = "") -> list[FatEntry]:
        return list(self._open(path).entries())

    def read(self, path: str, limit: int = 2**20) -> bytes:
        """A file's content, of at most `limit` bytes."""
        found = self.find(path)
        if found is None or found.folder:
            raise ImageError(f"{self._region.name} has no file {path}")
        clusters = self._table.chain(found.first)
        if found.size > min(limit, len(clusters) * self._layout.cluster):
            raise ImageError(f"{path} of {self._region.name}", expected=f"at most {limit} bytes", got=found.size)
        raw = b"".join(self._region.read(at, count) for at, count in self._runs(clusters))
        return raw[: found.size]

    def write(self, path: str, data: bytes | BinaryIO, size: int | None = None) -> None:
        """Write or replace a file, and make the folders that it needs. Of an open file `size` bytes are read.

        Raises `ImageError` if there is no room, a folder has that name, FAT forbids it, or the content ends too early.
        """
        source = io.BytesIO(data) if isinstance(data, bytes) else data
        size = len(data) if isinstance(data, bytes) else size or 0
        if size > MAX_FILE:
            raise ImageError(f"{path} is too large for FAT", expected=f"at most {MAX_FILE} bytes", got=size)
        above, _, name = path.strip("/").rpartition("/")
        _check_name(name)
        self.make_folder(above)
        folder = self._open(above)
        before = folder.find(name)
        if before is not None and before.folder:
            raise ImageError(f"{path} is a folder of {self._region.name}")
        if before is not None:
            self._table.release(self._table.chain(before.first))
        clusters = self._table.take(-(-size // self._layout.cluster))
        self._fill(clusters, source, size, path)
        first = clusters[0] if clusters else 0
        if before is None:
            folder.add(name, _ARCHIVE, first, size, self._when)
        else:
            folder.change(before, first, size, self._when)

    def make_folder(self, path: str) -> None:
        above = ""
        for part in (p for p in path.split("/") if p):
            folder = self._open(above)
            found = folder.find(part)
            if found is None:
                _check_name(part)
                (cluster,) = self._table.take(1)
                parent = folder.first if above else 0
                raw = _entry(b".          ", _FOLDER, cluster, 0, self._when)
                raw += _entry(b"..         ", _FOLDER, parent, 0, self._when)
                at = self._place(cluster)
                self._region.write(at, raw.ljust(self._layout.cluster, b"\0"))
                folder.add(part, _FOLDER, cluster, 0, self._when)
            elif not found.folder:
                raise ImageError(f"{part} is a file of {self._region.name}, no folder")
            above = f"{above}/{part}"

    def flush(self) -> None:
        self._table.flush()

    def clusters_for(self, size: int) -> int:
        return -(-size // self._layout.cluster)

    def _open(self, path: str) -> _Folder:
        if not path.strip("/"):
            return _Folder(self._region, self._root_clusters(), self)
        found = self.find(path)
        if found is None or not found.folder:
            raise ImageError(f"{self._region.name} has no folder {path}")
        return _Folder(self._region, self._table.chain(found.first), self)

    def _root_clusters(self) -> list[int]:
        return self._table.chain(self._layout.root_cluster) if self._layout.bits == 32 else []

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
        """Offset and length in bytes of each run of adjacent clusters."""
        start = 0
        for index in range(1, len(clusters) + 1):
            if index == len(clusters) or clusters[index] != clusters[index - 1] + 1:
                yield self._place(clusters[start]), (index - start) * self._layout.cluster
                start = index

    def _place(self, cluster: int) -> int:
        return self._layout.data + (cluster - 2) * self._layout.cluster

    def places(self, clusters: list[int]) -> list[tuple[int, int]]:
        """Offset and length of a folder's parts; without clusters, of the root folder of 12 and 16 bits."""
        return list(self._runs(clusters)) if clusters else [(self._layout.root, self._layout.root_bytes)]

    def grow(self, clusters: list[int]) -> None:
        """Give a folder another cluster; the root of 12 and 16 bits can't grow."""
        if not clusters:
            raise ImageError(f"the root folder of {self._region.name} is full")
        (new,) = self._table.take(1, after=clusters[-1])
        self._region.write(self._place(new), bytes(self._layout.cluster))
        clusters.append(new)


class _Folder:
    def __init__(self, region: Region, clusters: list[int], fat: Fat) -> None:
        self._region, self._clusters, self._fat = region, clusters, fat
        self.first = clusters[0] if clusters else 0

    def entries(self) -> Iterator[FatEntry]:
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
        if numbers == list(range(len(parts), 0, -1)) and all(p[13] == _checksum(short) for p in parts):
            name = _long_name(b"".join(_long_part(p) for p in reversed(parts)))
        high, low = struct.unpack_from("<H", row, 20)[0], struct.unpack_from("<H", row, 26)[0]
        first = low | (high << 16 if self._fat.bits == 32 else 0)
        size = struct.unpack_from("<I", row, 28)[0]
        return FatEntry(name or _unpacked(short, row[12]), bool(row[11] & _FOLDER), size, first, short, at)

    def find(self, name: str) -> FatEntry | None:
        wanted = _folded(name)
        for entry in self.entries():
            if wanted in (_folded(entry.name), _folded(_unpacked(entry.short, 0))):
                return entry
        return None

    def add(self, name: str, attributes: int, first: int, size: int, when: bytes) -> None:
        if _is_short(name):
            short, before = _packed(name), b""
        else:
            short = _alias(name, {e.short for e in self.entries()})
            before = _long_entries(name, short)
        raw = before + _entry(short, attributes, first, size, when)
        self._write(self._gap(len(raw) // _ENTRY), raw)

    def change(self, entry: FatEntry, first: int, size: int, when: bytes) -> None:
        row = self._bytes()[entry.at : entry.at + _ENTRY]
        new = bytearray(_entry(entry.short, row[11] | _ARCHIVE, first, size, when))
        new[12:20] = row[12:20]  # case, and the time of making
        self._write(entry.at, new)

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
    """Time and date as FAT stores them, from 1980 on, in steps of two seconds."""
    year = min(max(when.year, 1980), 2107)
    date = year - 1980 << 9 | when.month << 5 | when.day
    return struct.pack("<HH", when.hour << 11 | when.minute << 5 | when.second // 2, date)


@dataclass(frozen=True)
class _Layout:
    """Where each part is, in bytes from the beginning of the partition.

    `tables` are the copies of the table; a fixed root folder begins at `root` (12 and 16 bits) or in `root_cluster` (32
    bits), cluster 2 at `data`. The sector `info` has the number of free clusters; 0 without one.
    """

    bits: int
    cluster: int
    tables: tuple[int, ...]
    table_bytes: int
    root: int
    root_bytes: int
    root_cluster: int
    data: int
    clusters: int
    info: int


def _read_layout(region: Region) -> _Layout:
    """The layout in a boot sector. The number of bits follows Linux (fs/fat/inode.c)."""
    raw = region.read(0, 512)
    sector, per_cluster, reserved, copies, entries, small, _, length = struct.unpack_from("<HBHBHHBH", raw, 11)
    (large,) = struct.unpack_from("<I", raw, 32)
    long_length, flags, _, root_cluster, info = struct.unpack_from("<IHHIH", raw, 36)
    sectors = small or large
    fits = sector in (512, 1024, 2048, 4096) and per_cluster and not per_cluster & (per_cluster - 1)
    if raw[510:512] != b"\x55\xaa" or not fits or not reserved or not 1 <= copies <= 4 or not sectors:
        raise ImageError(f"{region.name} holds no FAT file system")
    wide = length == 0
    length = length or long_length
    root_sectors = -(-entries * 32 // sector)
    data = reserved + copies * length + root_sectors
    clusters = (sectors - data) // per_cluster
    if not length or length * sector > _MAX_TABLE or sectors * sector > region.size or clusters < 1:
        raise ImageError(
            f"the FAT file system of {region.name} doesn't fit it", expected=region.size, got=sectors * sector
        )
    bits = 32 if wide else 12 if clusters <= _FAT12_CLUSTERS else 16
    if (clusters + 2) * bits > length * sector * 8 or wide == bool(entries):
        raise ImageError(f"the FAT file system of {region.name} contradicts itself")
    tables = [(reserved + i * length) * sector for i in range(copies)]
    if wide and flags & 0x80:  # the copies differ, and one is named
        if flags & 0x0F >= copies:
            raise ImageError(f"the FAT file system of {region.name} contradicts itself")
        tables = [tables[flags & 0x0F]]
    return _Layout(
        bits,
        per_cluster * sector,
        tuple(tables),
        length * sector,
        (reserved + copies * length) * sector,
        root_sectors * sector,
        root_cluster if wide else 0,
        data * sector,
        clusters,
        info * sector if wide and 0 < info < reserved else 0,
    )


class _Table:
    """Which cluster follows which; changes are in memory until `flush`."""

    def __init__(self, region: Region, layout: _Layout) -> None:
        self._region, self._layout = region, layout
        raw = region.read(layout.tables[0], layout.table_bytes)
        self._next = _decoded(raw, layout.bits, layout.clusters + 2)
        self._raw = raw
        self._mask = 0x0FFFFFFF if layout.bits == 32 else (1 << layout.bits) - 1
        self._end = self._mask & ~7  # the first value that ends a chain
        self._bad = self._end - 1
        self._hint = 2
        self.free = sum(1 for i in range(2, len(self._next)) if not self._next[i] & self._mask)

    def chain(self, first: int) -> list[int]:
        """The clusters of a file or folder; none for cluster 0, which an empty file has."""
        found: list[int] = []
        cluster = first
        while cluster and cluster < self._end:
            if not 2 <= cluster < len(self._next) or len(found) >= self._layout.clusters or cluster == self._bad:
                raise ImageError(f"the FAT file system of {self._region.name} is damaged: cluster {cluster} of a chain")
            found.append(cluster)
            cluster = self._next[cluster] & self._mask
        if not cluster and found:
            raise ImageError(f"the FAT file system of {self._region.name} is damaged: a chain has no end")
        return found

    def take(self, count: int, after: int = 0) -> list[int]:
        """Chain up free clusters, after the last cluster of an existing chain if `after` isn't 0."""
        if count > self.free:
            raise ImageError(f"{self._region.name} is full", expected=f"{count} free clusters", got=self.free)
        if not count:
            return []
        found: list[int] = []
        for cluster in self._looked_through():
            if not self._next[cluster] & self._mask:
                found.append(cluster)
                if len(found) == count:
                    break
        for cluster, following in zip(found, [*found[1:], self._mask], strict=True):
            self._set(cluster, following)
        if after:
            self._set(after, found[0])
        self.free -= count
        self._hint = found[-1]
        return found

    def release(self, clusters: list[int]) -> None:
        for cluster in clusters:
            self._set(cluster, 0)
        self.free += len(clusters)
        self._hint = min([self._hint, *clusters])

    def flush(self) -> None:
        raw = _encoded(self._next, self._layout.bits, self._raw)
        for start in self._layout.tables:
            self._region.write(start, raw)
        if not self._layout.info:
            return
        info = bytearray(self._region.read(self._layout.info, 512))
        if info[:4] == b"RRaA" and info[484:488] == b"rrAa":
            struct.pack_into("<II", info, 488, self.free, self._hint if self.free else _UNKNOWN)
            self._region.write(self._layout.info, info)

    def _looked_through(self) -> Iterator[int]:
        yield from range(self._hint, len(self._next))
        yield from range(2, self._hint)

    def _set(self, cluster: int, value: int) -> None:
        kept = self._next[cluster] & _RESERVED_BITS if self._layout.bits == 32 else 0
        self._next[cluster] = kept | value


def _decoded(raw: bytes, bits: int, count: int) -> array[int]:
    if bits == 12:
        pairs = (raw[i * 3 // 2] | raw[i * 3 // 2 + 1] << 8 for i in range(count))
        return array("I", [p >> 4 if i % 2 else p & 0xFFF for i, p in enumerate(pairs)])
    width = "<" + str(count) + ("H" if bits == 16 else "I")
    return array("I", struct.unpack_from(width, raw))


def _encoded(table: array[int], bits: int, before: bytes) -> bytearray:
    raw = bytearray(before)  # the rest of the last sector stays as it is
    if bits == 12:
        for i, value in enumerate(table):
            at = i * 3 // 2
            if i % 2:
                raw[at] = raw[at] & 0x0F | (value & 0x0F) << 4
                raw[at + 1] = value >> 4
            else:
                raw[at] = value & 0xFF
                raw[at + 1] = raw[at + 1] & 0xF0 | value >> 8
    else:
        struct.pack_into("<" + str(len(table)) + ("H" if bits == 16 else "I"), raw, 0, *table)
    return raw


def _check_name(name: str) -> None:
    bad = not name or name in (".", "..") or name[-1] in ". " or name[0] == " "
    if bad or any(c in _FORBIDDEN or ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise ImageError("name of a file", expected="one that FAT allows", got=shown(name))
    if len(name.encode("utf-16-le")) > 2 * _MAX_NAME:
        raise ImageError("name of a file", expected=f"at most {_MAX_NAME} characters", got=shown(name))


def _folded(name: str) -> str:
    """A name without its case; FAT takes names with equal folded names for one."""
    return "".join(c.upper() if len(c.upper()) == 1 else c for c in name)


def _is_short(name: str) -> bool:
    """Whether a name fits a short entry: eight and three capital letters."""
    base, dot, extension = name.partition(".")
    return (
        1 <= len(base) <= 8 and len(extension) <= 3 and bool(extension) == bool(dot) and set(base + extension) <= _SHORT
    )


def _packed(name: str) -> bytes:
    """A short name as an entry stores it: eleven bytes, padded with spaces."""
    base, _, extension = name.partition(".")
    return base.ljust(8).encode("ascii") + extension.ljust(3).encode("ascii")


def _unpacked(raw: bytes, case: int) -> str:
    """The text of a short name; `case` is byte 12 of its entry, by which Windows NT and Linux show it in lower case."""
    first = b"\xe5" if raw[0] == 0x05 else raw[:1]  # 0xE5 itself says that an entry is free
    base = (first + raw[1:8]).decode(_CODEPAGE).rstrip(" ")
    extension = raw[8:11].decode(_CODEPAGE).rstrip(" ")
    base = base.lower() if case & _LOWER_BASE else base
    extension = extension.lower() if case & _LOWER_EXTENSION else extension
    return f"{base}.{extension}" if extension else base


def _alias(name: str, taken: Collection[bytes]) -> bytes:
    """A short name for a long one that is not among those taken, such as NUMPY-~1.WHL."""
    stem, dot, extension = name.rpartition(".")
    if not dot or not stem.strip("."):
        stem, extension = name, ""
    base, last = _squeezed(stem) or "_", _squeezed(extension)[:3]
    for number in range(1, 1_000_000):
        tail = f"~{number}"
        found = _packed(f"{base[: 8 - len(tail)]}{tail}.{last}")
        if found not in taken:
            return found
    raise ImageError("the folder has no short name left", got=shown(name))


def _checksum(short: bytes) -> int:
    """The checksum by which long entries refer to their short one."""
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total


def _long_entries(name: str, short: bytes) -> bytes:
    """The entries of a long name, the last part first, as they precede the short one."""
    raw = name.encode("utf-16-le")
    units = len(raw) // 2
    count = -(-units // _PER_ENTRY)
    if units % _PER_ENTRY:
        raw += b"\0\0"
    raw = raw.ljust(count * _PER_ENTRY * 2, b"\xff")
    entries = []
    for index in range(count):
        part = raw[index * _PER_ENTRY * 2 :][: _PER_ENTRY * 2]
        order = index + 1 | (0x40 if index + 1 == count else 0)
        head = bytes((order,)) + part[:10] + bytes((0x0F, 0, _checksum(short)))
        entries.append(head + part[10:22] + b"\0\0" + part[22:26])
    return b"".join(reversed(entries))


def _long_part(entry: bytes) -> bytes:
    return entry[1:11] + entry[14:26] + entry[28:32]


def _long_name(parts: bytes) -> str | None:
    """A long name from the UTF-16 units of its entries, in order; None if they are damaged."""
    units = [parts[i : i + 2] for i in range(0, len(parts), 2)]
    end = next((i for i, u in enumerate(units) if u == b"\0\0"), len(units))
    try:
        return b"".join(units[:end]).decode("utf-16-le") or None
    except UnicodeDecodeError:
        return None


def _squeezed(text: str) -> str:
    return "".join(c if c in _SHORT else "_" for c in _folded(text) if c not in " .")
