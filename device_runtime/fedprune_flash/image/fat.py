"""The FAT file system of an image's boot partition, by mtools: it needs neither root nor a mount."""

from __future__ import annotations

import os
import re
import shutil
import subprocess  # nosec B404  # lists of words, never a shell
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedprune.core.errors import ImageError, MissingExtraError
from fedprune_flash.image.partitions import Partition

# A user's settings may name drives. Cards have no geometry, which mtools would check.
_ENVIRONMENT = {"MTOOLSRC": os.devnull, "MTOOLS_SKIP_CHECK": "1", "LC_ALL": "C.UTF-8"}
_FREE = re.compile(r"([0-9][0-9 ]*) bytes free")
_HEAD = 64  # bytes of a boot sector that tell the clusters' size


def check_mtools() -> None:
    """Raise `MissingExtraError` where mtools is not installed."""
    for program in ("mdir", "mcopy", "mtype", "mmd"):
        if shutil.which(program) is None:
            raise MissingExtraError(f"{program} is missing", hint="Install mtools: sudo apt-get install mtools.")


class Fat:
    """The file system of a partition in an image. Every method raises `ImageError` where it is damaged or full.

    Paths are separated by `/` and begin at the root.
    """

    def __init__(self, image: Path, partition: Partition) -> None:
        self._drive = f"{image.absolute()}@@{partition.start}"
        self._name = f"the boot partition of {image.name}"
        with image.open("rb") as file:
            file.seek(partition.start)
            head = file.read(_HEAD)
        self.cluster = int.from_bytes(head[11:13], "little") * head[13]
        listing = self._call("mdir", "::/")
        free = _FREE.search(listing.stdout.decode("utf-8", "replace"))
        if listing.returncode or free is None or not self.cluster:
            raise ImageError(f"{self._name} holds no FAT file system that mtools can read")
        self.free = int(free[1].replace(" ", ""))

    def exists(self, path: str) -> bool:
        return self._call("mdir", "-b", f"::/{path}").returncode == 0

    def read(self, path: str) -> bytes:
        return self._run("mtype", f"::/{path}")

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

    def size_of(self, count: int) -> int:
        """Bytes that a file of so many bytes takes."""
        return -(-count // self.cluster) * self.cluster

    def _run(self, program: str, *words: str) -> bytes:
        done = self._call(program, *words)
        if done.returncode:
            lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
            raise ImageError(f"{self._name}: {program}: {(lines or ['no message'])[0][:200]}")
        return done.stdout

    def _call(self, program: str, *words: str) -> subprocess.CompletedProcess[bytes]:
        command = [program, "-i", self._drive, *words]
        return subprocess.run(  # noqa: S603  # nosec B603  # a program of mtools, with an image's path
            command, stdin=subprocess.DEVNULL, capture_output=True, check=False, env={**os.environ, **_ENVIRONMENT}
        )
