"""Examine an image of Raspberry Pi OS, and write a kit into it, without root or a mount."""

from __future__ import annotations

import gzip
import lzma
import os
import re
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, cast

from fedprune.core.atomic_file import atomic_write
from fedprune.core.disk import open_file, storage_errors
from fedprune.core.errors import ImageError, KitError, UsageError, error_reason, path_remedy
from fedprune.output.tables import AdvanceBar, ignore_progress
from fedprune_flash.image.board_setup import FirstBoot
from fedprune_flash.image.first_boot import CMDLINE_FILE, KIT_FOLDER, Scheme, first_boot_files, recognise_scheme
from fedprune_flash.image.partitions import Fat, Partition, Partitions, read_partitions
from fedprune_flash.image.programs import run_program
from fedprune_flash.kit.kit import Kit

_MOUNTS = ("/boot/firmware", "/boot")
_MACHINES = {0xB7: "aarch64", 0x28: "armhf", 0x3E: "x86_64"}  # e_machine of ELF
# For systems whose /usr/bin/python3 can't be read.
_PYTHONS = {"debian 12": "3.11", "debian 13": "3.13", "ubuntu 22.04": "3.10", "ubuntu 24.04": "3.12"}
# Keys in no template of cloud-init (https://github.com/RPi-Distro/pi-gen, stage2/04-cloud-init/files): a file that has
# one was changed by the user.
_USER_KEYS = {
    "user-data": ("hostname", "users", "runcmd", "bootcmd", "write_files", "packages", "chpasswd", "rpi_userconf"),
    "network-config": ("wifis", "bridges", "bonds", "vlans", "addresses"),
    "meta-data": (),
}

_SPARE_CLUSTERS = 64  # clusters for folders, in addition to those of files


# Short targets are stored in the inode itself, and printed so.
_LINK = re.compile(r'^Fast link dest: "([^"\n]*)"$', re.MULTILINE)
_MAX_STATUS = 2**16


MAX_IMAGE_BYTES = 2**40  # no card is larger: a stream that unpacks for ever must end
# Bytes that are unpacked at a time; a block of zeros becomes a hole in the file, and larger ones are rarely all zeros.
_READ_BYTES = 4 * 2**20
_ISO_MAGIC_OFFSET = 32_769  # where an ISO 9660 file system has its identifier, CD001
# Magic numbers of packed images, and of files that users take for images.
_PACKINGS = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip"}
_UNSUPPORTED_FILES = {
    b"PK\x03\x04": ("a ZIP file", "Unpack it first."),
    b"\x28\xb5\x2f\xfd": ("a file packed with zstd", "Unpack it first, with `unzstd`."),
    b"BZh": ("a file packed with bzip2", "Unpack it first, with `bunzip2`."),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip file", "Unpack it first."),
    b"QFI\xfb": ("an image for QEMU", "Convert it with `qemu-img convert -O raw`."),
}


@dataclass(frozen=True)
class ImageSystem:
    """The system in an image's root file system; empty where it can't be read. `mount` is its boot partition's."""

    title: str = ""
    python: str = ""
    architecture: str = ""
    mount: str = _MOUNTS[0]


@dataclass(frozen=True)
class ImageContents:
    """The contents of an image."""

    partitions: Partitions
    system: ImageSystem
    scheme: Scheme
    cmdline: str
    size: int


@contextmanager
def open_image(
    source: Path, out: Path | None, advance: AdvanceBar = ignore_progress, *, private: bool = False
) -> Iterator[Path]:
    """Unpack an image: into a new file that gets its name `out` at the end, or without `out` into one for reading.

    A `private` file is readable only to this user, from its first byte on.
    """
    if out is not None and out.exists():
        raise UsageError(f"{out} is there already", hint="Name another file, or remove it.")
    if out is None and not packing_of(source):
        yield source
        return
    packing_of(source)
    with ExitStack() as stack:
        if out is None:
            file: IO[bytes] = stack.enter_context(tempfile.NamedTemporaryFile())
        else:
            file = stack.enter_context(atomic_write(out, private=private))
        unpack_image(source, file, advance)
        file.flush()
        yield Path(file.name)


def examine_image(image: Path, scheme: Scheme | None = None, name: str = "the image") -> ImageContents:
    with image.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        partitions = read_partitions(file, size, name)
        fat = Fat(image, partitions.boot)
        roots = (Ext4(image, partition) for partition in partitions.roots)
        root = next((root for root in roots if root.exists("/")), None)
        chosen_scheme = scheme or recognise_scheme(fat, lambda path: root is not None and root.exists(path))
        if not fat.exists(CMDLINE_FILE):
            raise ImageError("the boot partition has no cmdline.txt", expected="that of a Raspberry Pi")
        cmdline = fat.read(CMDLINE_FILE).decode("utf-8", "replace").strip()
        return ImageContents(partitions, _read_system(root), chosen_scheme, cmdline, size)


def check_image(contents: ImageContents, kit: Kit) -> None:
    """Make sure that image and kit fit each other.

    Raises `KitError` for another Python or architecture, `ImageError` if the image has two root partitions for updates,
    and its scheme would make it reboot for ever.
    """
    system, target = contents.system, kit.target
    if target.jetson:
        raise KitError(
            f"a kit for a Jetson in an image of {system.title or 'a Raspberry Pi'}",
            hint="Make the kit without --jetson; on a Jetson install from a stick or with Ansible.",
        )
    for subject, actual, expected, option in (
        ("Python", system.python, target.python, "python"),
        ("architecture", system.architecture, target.architecture, "architecture"),
    ):
        if actual and actual != expected:
            hint = f"Make the kit with --{option} {actual}."
            if actual == "armhf":
                hint = "There is no onnxruntime for a 32-bit system: take the 64-bit image."
            raise KitError(
                f"{subject} of {system.title or 'the image'}",
                expected=f"{expected}, as the kit's",
                got=actual,
                hint=hint,
            )
    if len(contents.partitions.roots) > 1 and contents.scheme is Scheme.FIRSTRUN:
        # https://docs.mender.io: firstrun.sh with run_success_action=reboot lets such an image reboot for ever.
        raise ImageError(
            "an image with two root partitions, for updates, can't take settings by a script at its first boot",
            hint="Take an unchanged image of Raspberry Pi OS.",
        )


def customise_image(
    image: Path, contents: ImageContents, kit: Kit, setup: FirstBoot, *, write: bool = True
) -> list[str]:
    """Write a kit and the files that start it to an image's boot partition, or only plan that; returns the steps.

    Raises `ImageError` if there is no room on the boot partition, or it has settings already.
    """
    fat = Fat(image, contents.partitions.boot)
    files = first_boot_files(
        contents.scheme, setup, contents.system.mount, contents.cmdline, unsigned=not kit.signed_by
    )
    if fat.exists(KIT_FOLDER):
        raise ImageError(f"there is a folder {KIT_FOLDER} on the boot partition", hint="Take an unchanged image.")
    for name in files:
        if name != CMDLINE_FILE and fat.exists(name):
            _check_template(name, fat.read(name))
    paths = kit.paths
    needed = sum(fat.disk_size((kit.folder / path).stat().st_size) for path in paths)
    needed += sum(fat.disk_size(len(content)) for content in files.values()) + _SPARE_CLUSTERS * fat.cluster
    if needed > fat.free:
        raise ImageError(
            "the kit doesn't fit the boot partition",
            expected=f"{needed / 1e6:.1f} MB free",
            got=f"{fat.free / 1e6:.1f} MB",
            hint="Images of Raspberry Pi OS 12 and newer have room; else bring the kit on a USB stick.",
        )
    if write:
        for folder in sorted({str(Path(path).parent) for path in paths}):  # a folder before those in it
            target = f"{KIT_FOLDER}/{folder}".removesuffix("/.")
            fat.make_folder(target)
            fat.copy([kit.folder / path for path in paths if str(Path(path).parent) == folder], target)
        fat.write(files)
        _verify_written(image, fat, kit, paths, files)
    return [
        f"write the kit to {KIT_FOLDER}/ ({len(paths)} files, {kit.bytes / 1e6:.1f} MB)",
        *(f"write {name} ({len(content)} bytes)" for name, content in files.items()),
    ]


def _verify_written(image: Path, fat: Fat, kit: Kit, paths: Sequence[str], files: Mapping[str, bytes]) -> None:
    """Read the written files back, from the disk."""
    with image.open("rb") as file:
        os.fsync(file.fileno())
        # The pages in memory are dropped, so that the reads below come from the disk.
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    contents = chain(files.items(), ((f"{KIT_FOLDER}/{path}", (kit.folder / path).read_bytes()) for path in paths))
    for name, content in contents:
        if fat.read(name, len(content)) != content:
            raise ImageError(f"{name} reads back as something else than was written")


def _check_template(name: str, content: bytes) -> None:
    """Raspberry Pi OS brings templates that are mostly comments; anything else is the user's own settings."""
    lines = [line.strip() for line in content.decode("utf-8", "replace").splitlines()]
    settings_lines = [line for line in lines if line and not line.startswith("#")]
    user_keys = _USER_KEYS.get(name)
    if user_keys is not None:
        settings_lines = [line for line in settings_lines if line.partition(":")[0] in user_keys]
    if settings_lines:
        raise ImageError(
            f"{name} on the boot partition has settings already",
            got=repr(settings_lines[0][:60]),
            hint="Take an unchanged image.",
        )


def _read_system(root: Ext4 | None) -> ImageSystem:
    if root is None:
        return ImageSystem()
    release = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', _read_text(root, "/usr/lib/os-release"), re.MULTILINE))
    title = "".join(c for c in release.get("PRETTY_NAME", "") if c.isprintable())[:80]
    python = _PYTHONS.get(f"{release.get('ID', '')} {release.get('VERSION_ID', '')}", "")
    architecture = ""
    if version := re.fullmatch(r"(?:/usr/bin/)?python(3\.\d{1,2})", root.link_target("/usr/bin/python3")):
        python = version[1]
        head = root.read(f"/usr/bin/python{python}", 20)
        if head[:4] == b"\x7fELF" and len(head) == 20:
            architecture = _MACHINES.get(struct.unpack_from("<H", head, 18)[0], "")
    table = [line.split() for line in _read_text(root, "/etc/fstab").splitlines() if not line.startswith("#")]
    mount_points = {row[1] for row in table if len(row) > 2 and row[2] in ("vfat", "msdos", "auto")}
    mount = next((m for m in _MOUNTS if m in mount_points), _MOUNTS[0])
    return ImageSystem(title, python, architecture, mount)


def _read_text(root: Ext4, path: str) -> str:
    return root.read(path, 64 * 1024).decode("utf-8", "replace")


class Ext4:
    """The file system of a partition in an image, read by debugfs of e2fsprogs; nothing is ever written.

    Paths must be constants of the code, since debugfs has a quoting of its own.
    """

    def __init__(self, image: Path, partition: Partition) -> None:
        self._image, self._start = image, partition.start

    def exists(self, path: str) -> bool:
        return self._status(path).startswith("Inode:")

    def read(self, path: str, limit: int) -> bytes:
        """The beginning of a file; empty if there is no file, or it can't be read."""
        return self._run_debugfs(f"cat {path}", limit)

    def link_target(self, path: str) -> str:
        """The target of a symbolic link; empty if the path is no link."""
        target = _LINK.search(self._status(path))
        return "" if target is None else target[1]

    def _status(self, path: str) -> str:
        return self._run_debugfs(f"stat {path}", _MAX_STATUS).decode("utf-8", "replace")

    def _run_debugfs(self, request: str, limit: int) -> bytes:
        # By the number of an open file, because debugfs takes a question mark in a path for the beginning of options.
        with self._image.open("rb") as file:
            words = ["-R", request, f"/dev/fd/{file.fileno()}?offset={self._start}"]
            return run_program("debugfs", words, limit, environment={"DEBUGFS_PAGER": "cat"}, file=file.fileno()).output


def packing_of(source: Path) -> str:
    """The packing of an image: `xz`, `gzip`, or empty. Raises `ImageError` if it isn't an image."""
    try:
        with open_file(source) as file:
            head = file.read(_ISO_MAGIC_OFFSET + 5)
    except OSError as error:
        raise ImageError(f"can't read {source}: {error.strerror}", hint=path_remedy(error)) from error
    for magic, (kind_text, hint) in _UNSUPPORTED_FILES.items():
        if head.startswith(magic):
            raise ImageError(f"{source}", expected="an image (.img, .img.xz, .img.gz)", got=kind_text, hint=hint)
    # Hybrid ISO images have a master boot record, too.
    if head[_ISO_MAGIC_OFFSET:] == b"CD001" and head[510:512] != b"\x55\xaa":
        raise ImageError(f"{source}", expected="an image of a card", got="an ISO image of a CD")
    if head[_ISO_MAGIC_OFFSET:] == b"CD001":
        raise ImageError(f"{source}", expected="an image of a card", got="an ISO image that also boots from USB")
    return next((name for magic, name in _PACKINGS.items() if head.startswith(magic)), "")


def unpack_image(source: Path, out: IO[bytes], advance: AdvanceBar = ignore_progress) -> int:
    """Copy an image, unpacked, into an empty file; runs of zeros take no space. Returns its size in bytes.

    `advance` is called with the bytes of the source that were read since the last call. Raises `ImageError` if it isn't
    an image, or is damaged or cut short.
    """
    kind = packing_of(source)
    size = read_bytes = 0
    with open_file(source) as raw:
        stream = _unpacked_stream(raw, kind)
        while piece := _read_block(stream, source):
            size += len(piece)
            if size > MAX_IMAGE_BYTES:
                raise ImageError(f"{source}", expected=f"at most {MAX_IMAGE_BYTES} bytes", got="more")
            with storage_errors(f"can't write {out.name}"):
                if piece.count(0) == len(piece):
                    out.seek(len(piece), os.SEEK_CUR)
                else:
                    out.write(piece)
            advance(raw.tell() - read_bytes)
            read_bytes = raw.tell()
    with storage_errors(f"can't write {out.name}"):
        out.truncate(size)
        out.flush()
    return size


def _unpacked_stream(raw: IO[bytes], kind: str) -> IO[bytes]:
    if kind == "xz":
        return cast("IO[bytes]", lzma.LZMAFile(raw))
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if kind == "gzip" else raw


def _read_block(stream: IO[bytes], source: Path) -> bytes:
    try:
        return stream.read(_READ_BYTES)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ImageError(
            f"{source} is damaged or cut short ({error_reason(error)})", hint="Fetch the image again."
        ) from error
    except OSError as error:
        raise ImageError(f"can't read {source}: {error.strerror}", hint=path_remedy(error)) from error
