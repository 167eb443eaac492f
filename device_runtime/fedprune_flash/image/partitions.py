"""The partitions of an image, from the four entries of its master boot record, and its FAT file system, by mtools.

Layout: https://wiki.osdev.org/MBR_(x86). A Raspberry Pi boots from the first FAT partition; its root file system is an
ext4 one.
"""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from fedprune.core.errors import ImageError
from fedprune_flash.image.programs import ProgramOutput, run_program

SECTOR = 512  # the unit of the table's numbers
FAT_TYPES = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E})
LINUX_TYPE = 0x83
# A disk with a GUID partition table has one entry of this type in its master boot record, which protects the rest.
_GPT_TYPE = 0xEE
_ENTRIES_OFFSET = 446  # where the entries begin in the first sector


# A user's settings may name drives. Cards have no geometry, which mtools would check.
_ENVIRONMENT = {"MTOOLSRC": os.devnull, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
_FREE_SPACE = re.compile(r"([0-9][0-9 ]*) bytes free")
_BOOT_SECTOR_BYTES = 64  # bytes of a boot sector, up to the fields of the clusters' size
_MAX_LISTING = 2**24  # bytes of a listing: a FAT's root folder of 65,536 names takes a third of that


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


class Fat:
    """The file system of a partition in an image. Every method raises `ImageError` where it is damaged or full.

    Paths are separated by `/` and begin at the root.
    """

    def __init__(self, image: Path, partition: Partition) -> None:
        self._drive = f"{image.absolute()}@@{partition.start}"
        self._name = f"the boot partition of {image.name}"
        with image.open("rb") as file:
            file.seek(partition.start)
            head = file.read(_BOOT_SECTOR_BYTES)
        # Bytes per sector (offset 11) times sectors per cluster (offset 13).
        self.cluster = int.from_bytes(head[11:13], "little") * head[13]
        listing = self._call("mdir", "::/")
        free = _FREE_SPACE.search(listing.output.decode("utf-8", "replace"))
        if listing.status or free is None or not self.cluster:
            raise ImageError(f"{self._name} holds no FAT file system that mtools can read")
        self.free = int(free[1].replace(" ", ""))

    def exists(self, path: str) -> bool:
        return self._call("mdir", "-b", f"::/{path}").status == 0

    def read(self, path: str, limit: int = 2**20) -> bytes:
        """A file's content, of at most `limit` bytes."""
        return self._run("mtype", f"::/{path}", limit=limit)

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write or replace files in the root folder."""
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, name) for name in files]
            for path, content in zip(paths, files.values(), strict=True):
                path.write_bytes(content)
            self.copy(paths, "")

    def copy(self, files: Sequence[Path], folder: str) -> None:
        """Copy files into a folder that exists."""
        self._run("mcopy", "-o", *(str(path.absolute()) for path in files), f"::/{folder}")

    def make_folder(self, path: str) -> None:
        self._run("mmd", f"::/{path}")

    def disk_size(self, count: int) -> int:
        """The bytes that a file of `count` bytes takes on the disk: whole clusters."""
        return -(-count // self.cluster) * self.cluster

    def _run(self, program: str, *words: str, limit: int = _MAX_LISTING) -> bytes:
        result = self._call(program, *words, limit=limit)
        if result.is_cut:
            raise ImageError(f"{self._name}: {words[-1]}", expected=f"at most {limit} bytes", got="more")
        if result.status:
            raise ImageError(f"{self._name}: {program}: {(result.error.strip() or 'no message').splitlines()[0][:200]}")
        return result.output

    def _call(self, program: str, *words: str, limit: int = _MAX_LISTING) -> ProgramOutput:
        return run_program(program, ["-i", self._drive, *words], limit, environment=_ENVIRONMENT)
