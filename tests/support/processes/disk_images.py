"""Disk images that other people's tools make and read, as a plain user: sfdisk, mtools, mke2fs, fsck.fat, e2fsck."""

import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

SECTOR = 512
_SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def tool(name: str) -> str:
    """Where a program is, /usr/sbin included; skips the test where it isn't installed."""
    program = shutil.which(name, path=_SBIN)
    if program is None:
        pytest.skip(f"{name} is not installed")
    return program


def run(name: str, *arguments: str | Path, text: bytes | None = None, unless: bytes = b"\0") -> bytes:
    """What a program prints; it must succeed, unless it complains of this."""
    command = [tool(name), *(str(a) for a in arguments)]
    env = {**os.environ, "MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": os.devnull, "TZ": "UTC", "LC_ALL": "C.UTF-8"}
    done = subprocess.run(command, input=text, capture_output=True, check=False, env=env)
    assert done.returncode == 0 or unless in done.stderr, f"{command}: {done.stdout!r} {done.stderr!r}"
    return done.stdout


def fsck_fat(path: Path, start: int = 0, size: int | None = None) -> str:
    """Let fsck.fat look at a FAT file system; it must find nothing to mend."""
    partition = path
    if start or size:
        partition = path.with_suffix(".part")
        with path.open("rb") as source, partition.open("wb") as out:
            source.seek(start)
            left = size or 0
            while left > 0:
                piece = source.read(min(2**20, left))
                out.write(piece)
                left -= len(piece)
    return run("fsck.fat", "-n", "-v", partition).decode()


def mtype(path: Path, name: str, start: int = 0) -> bytes:
    """A file's content as mtools reads it."""
    return run("mtype", "-i", f"{path}@@{start}", f"::/{name}")


def mlist(path: Path, start: int = 0) -> set[str]:
    """All files and folders as mtools names them; folders end with a slash."""
    out = run("mdir", "-i", f"{path}@@{start}", "-b", "-/", "::", unless=b'File "::" not found').decode()
    return {line.removeprefix("::/") for line in out.splitlines() if line.startswith("::/")}


def mcopy(path: Path, files: Iterable[Path], start: int = 0, folder: str = "") -> None:
    """Let mtools write files."""
    run("mcopy", "-o", "-s", "-i", f"{path}@@{start}", *files, f"::/{folder}")


def make_image(
    path: Path,
    boot: Path,
    root: Path,
    *,
    boot_mb: int = 40,
    root_mb: int = 8,
    start: int = 2048,
    extra_partitions: str = "",
) -> tuple[int, int]:
    """An image as Raspberry Pi OS has it: a table, a FAT32 partition with a folder's files, an ext4 one with another's.

    Returns where the two partitions begin, in bytes.
    """
    sectors = boot_mb * 2048
    second = start + sectors
    total = second + root_mb * 2048
    with path.open("wb") as file:
        file.truncate((total + (8192 if extra_partitions else 0)) * SECTOR)
    table = f"label: dos\nlabel-id: 0x5eedf00d\nstart={start},size={sectors},type=c,bootable\n"
    table += f"start={second},size={root_mb * 2048},type=83\n{extra_partitions.format(start=total)}"
    run("sfdisk", "-q", path, text=table.encode())
    at = start * SECTOR
    run("mformat", "-i", f"{path}@@{at}", "-F", "-T", str(sectors), "-h", "64", "-s", "32", "-v", "BOOTFS", "::")
    if files := sorted(boot.iterdir()):
        mcopy(path, files, at)
    where = f"offset={second * SECTOR},root_owner=0:0"
    run("mke2fs", "-q", "-t", "ext4", "-L", "rootfs", "-d", root, "-E", where, path, f"{root_mb * 1024}k")
    return at, second * SECTOR
