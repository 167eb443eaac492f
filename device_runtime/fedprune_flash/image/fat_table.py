"""The shape of a FAT file system, from its boot sector, and its table of clusters.

Source: Microsoft, FAT32 File System Specification, 1.03 (2000). Which of 12, 16 and 32 bits it is follows Linux
(fs/fat/inode.c): 32 where the boot sector has no 16-bit length of the table, else by the number of clusters.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from fedprune.core.errors import ImageError
from fedprune_flash.image.region import Region

_FAT12_CLUSTERS = 4084
_MAX_TABLE = 64 * 2**20
"""Bytes of a table that are read: that of a partition of 64 GB."""

_UNKNOWN = 0xFFFFFFFF
_RESERVED_BITS = 0xF0000000


@dataclass(frozen=True)
class FatLayout:
    """Where everything lies, in bytes from the beginning of the partition.

    Attributes:
        bits: 12, 16 or 32.
        cluster: Bytes of a cluster.
        tables: Where each copy of the table begins.
        table_bytes: How long each is.
        mirrored: Whether all copies are kept alike; else the first of `tables` alone counts.
        root: Where the root folder begins, where it has a place of its own (12 and 16 bits).
        root_bytes: How long that is.
        root_cluster: Its first cluster (32 bits).
        data: Where cluster 2 begins.
        clusters: How many clusters there are.
        info: Where the sector with the number of free clusters is; 0 where there is none.
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


def read_layout(region: Region) -> FatLayout:
    """Read a boot sector.

    Raises:
        ImageError: It is none of a FAT file system, or doesn't fit the partition.
    """
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
    return FatLayout(
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


class FatTable:
    """Which cluster follows which; changes are in memory until `flush`.

    Args:
        region: The partition.
        shape: Its shape.
    """

    def __init__(self, region: Region, shape: FatLayout) -> None:
        self._region, self._shape = region, shape
        raw = region.read(shape.tables[0], shape.table_bytes)
        self._next = _decoded(raw, shape.bits, shape.clusters + 2)
        self._raw = raw
        self._mask = 0x0FFFFFFF if shape.bits == 32 else (1 << shape.bits) - 1
        self._end = self._mask & ~7  # the first value that ends a chain
        self._bad = self._end - 1
        self._hint = 2
        self.free = sum(1 for i in range(2, len(self._next)) if not self._next[i] & self._mask)

    def chain(self, first: int) -> list[int]:
        """The clusters of a file or folder; none for cluster 0, which an empty file has.

        Raises:
            ImageError: The chain leaves the partition or runs in a circle.
        """
        found: list[int] = []
        cluster = first
        while cluster and cluster < self._end:
            if not 2 <= cluster < len(self._next) or len(found) >= self._shape.clusters or cluster == self._bad:
                raise ImageError(f"the FAT file system of {self._region.name} is damaged: cluster {cluster} of a chain")
            found.append(cluster)
            cluster = self._next[cluster] & self._mask
        if not cluster and found:
            raise ImageError(f"the FAT file system of {self._region.name} is damaged: a chain has no end")
        return found

    def take(self, count: int, after: int = 0) -> list[int]:
        """Take free clusters and chain them up.

        Args:
            count: How many.
            after: The last cluster of the chain that they are added to; 0 for a new one.

        Raises:
            ImageError: There aren't as many.
        """
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

    def give_back(self, clusters: list[int]) -> None:
        """Make clusters free."""
        for cluster in clusters:
            self._set(cluster, 0)
        self.free += len(clusters)
        self._hint = min([self._hint, *clusters])

    def flush(self) -> None:
        """Write all copies of the table, and how many clusters are free."""
        raw = _encoded(self._next, self._shape.bits, self._raw)
        for start in self._shape.tables:
            self._region.write(start, raw)
        if not self._shape.info:
            return
        info = bytearray(self._region.read(self._shape.info, 512))
        if info[:4] == b"RRaA" and info[484:488] == b"rrAa":
            struct.pack_into("<II", info, 488, self.free, self._hint if self.free else _UNKNOWN)
            self._region.write(self._shape.info, info)

    def _looked_through(self) -> Iterator[int]:
        yield from range(self._hint, len(self._next))
        yield from range(2, self._hint)

    def _set(self, cluster: int, value: int) -> None:
        kept = self._next[cluster] & _RESERVED_BITS if self._shape.bits == 32 else 0
        self._next[cluster] = kept | value


def _decoded(raw: bytes, bits: int, count: int) -> array[int]:
    if bits == 12:
        pairs = (raw[i * 3 // 2] | raw[i * 3 // 2 + 1] << 8 for i in range(count))
        return array("I", [p >> 4 if i % 2 else p & 0xFFF for i, p in enumerate(pairs)])
    width = "<" + str(count) + ("H" if bits == 16 else "I")
    return array("I", struct.unpack_from(width, raw))


def _encoded(table: array[int], bits: int, before: bytes) -> bytearray:
    raw = bytearray(before)  # what lies behind the last cluster's entry stays as it is
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
