"""The FAT file system of an image's boot partition, by mtools: it needs neither root nor a mount."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprune.core.errors import ImageError
from fedprune_flash.image.partitions import Partition
from fedprune_flash.image.programs import ProgramOutput, run_program

# A user's settings may name drives. Cards have no geometry, which mtools would check.
_ENVIRONMENT = {"MTOOLSRC": os.devnull, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
_FREE_SPACE = re.compile(r"([0-9][0-9 ]*) bytes free")
_BOOT_SECTOR_BYTES = 64  # bytes of a boot sector, up to the fields of the clusters' size
_MAX_LISTING = 2**24  # bytes of a listing: a FAT's root folder of 65,536 names takes a third of that


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
