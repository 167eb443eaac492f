"""The partitions of an image, from the four entries of its master boot record.

Layout: https://wiki.osdev.org/MBR_(x86). A Raspberry Pi boots from the first FAT partition; its root file system is an
ext4 one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO

from fedprune.core.errors import ImageError

SECTOR = 512  # the unit of the table's numbers
FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})
LINUX_TYPE = 0x83
# A disk with a GUID partition table has one entry of this type in its master boot record, which protects the rest.
_GPT_TYPE = 0xEE
_ENTRIES_OFFSET = 446  # where the entries begin in the first sector


@dataclass(frozen=True)
class Partition:
    """A partition: number (from 1), type, and start and size in bytes."""

    number: int
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Partitions:
    """The FAT partition from which a board boots, and its Linux partitions: two where updates alternate."""

    boot: Partition
    roots: tuple[Partition, ...]


def read_partitions(file: BinaryIO, size: int, name: str = "the image") -> Partitions:
    """Read the partitions of an image of `size` bytes.

    Raises `ImageError` if they are invalid or there is no boot partition.
    """
    file.seek(0)
    head = file.read(2 * SECTOR)
    if len(head) < 2 * SECTOR or head[510:512] != b"\x55\xaa":
        raise ImageError(
            f"{name} has no partition table",
            expected="a master boot record",
            hint="Give an image of Raspberry Pi OS (.img, .img.xz or .img.gz); download it again if it is one.",
        )
    partitions = []
    for number in range(1, 5):
        entry = head[_ENTRIES_OFFSET + 16 * (number - 1) :][:16]
        kind = entry[4]
        start, sectors = struct.unpack_from("<II", entry, 8)
        if kind == _GPT_TYPE or head[SECTOR : SECTOR + 8] == b"EFI PART":
            raise ImageError(
                f"{name} has a GUID partition table",
                expected="a master boot record, as images of Raspberry Pi OS have",
                hint="That is an image for another kind of board. On a Jetson use a kit.",
            )
        if kind and sectors:
            partitions.append(Partition(number, kind, start * SECTOR, sectors * SECTOR))
    _check_partitions(partitions, size)
    boot = next((p for p in partitions if p.kind in FAT_TYPES), None)
    if boot is None:
        kinds = ", ".join(f"{p.kind:#04x}" for p in partitions) or "none"
        raise ImageError(
            "the image has no boot partition", expected="a FAT partition", got=f"partitions of type {kinds}"
        )
    return Partitions(boot, tuple(p for p in partitions if p.kind == LINUX_TYPE))


def _check_partitions(partitions: list[Partition], size: int) -> None:
    end = SECTOR
    for partition in sorted(partitions, key=lambda p: p.start):
        if partition.start < end:
            raise ImageError(f"partition {partition.number} overlaps another one or the table")
        end = partition.start + partition.size
        if end > size:
            raise ImageError(
                f"partition {partition.number} ends beyond the image: it is cut short",
                expected=f"{end} bytes",
                got=size,
                hint="Fetch the image again.",
            )
