"""Reading images, plain or packed with xz or gzip, piece by piece."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, cast

from fedprune.core.disk import storage_errors
from fedprune.core.errors import ImageError, reason, remedy

MAX_IMAGE = 2**40
_PIECE = 4 * 2**20
_ISO = 32_769
_SUFFIXES = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip"}
_OTHERS = {
    b"PK\x03\x04": ("a ZIP file", "Unpack it first."),
    b"\x28\xb5\x2f\xfd": ("a file packed with zstd", "Unpack it first, with `unzstd`."),
    b"BZh": ("a file packed with bzip2", "Unpack it first, with `bunzip2`."),
    b"7z\xbc\xaf\x27\x1c": ("a 7-Zip file", "Unpack it first."),
    b"QFI\xfb": ("an image for QEMU", "Convert it with `qemu-img convert -O raw`."),
}

Progress = Callable[[int, int], None]
"""Takes bytes of the source read, and bytes in all."""


def packing(source: Path) -> str:
    """How an image is packed: `xz`, `gzip`, or empty. Raises `ImageError` if it isn't an image."""
    try:
        with source.open("rb") as file:
            head = file.read(_ISO + 5)
    except OSError as error:
        raise ImageError(f"can't read {source}: {error.strerror}", hint=remedy(error)) from error
    for magic, (what, hint) in _OTHERS.items():
        if head.startswith(magic):
            raise ImageError(f"{source}", expected="an image (.img, .img.xz, .img.gz)", got=what, hint=hint)
    if head[_ISO:] == b"CD001" and head[510:512] != b"\x55\xaa":
        raise ImageError(f"{source}", expected="an image of a card", got="an ISO image of a CD")
    if head[_ISO:] == b"CD001":
        raise ImageError(f"{source}", expected="an image of a card", got="an ISO image that also boots from USB")
    return next((name for magic, name in _SUFFIXES.items() if head.startswith(magic)), "")


def unpack(source: Path, out: BinaryIO, progress: Progress | None = None) -> int:
    """Copy an image, unpacked, into an empty file; runs of zeros take no space. Returns its size in bytes.

    Raises `ImageError` if it isn't an image, or is damaged or cut short.
    """
    kind = packing(source)
    total = source.stat().st_size
    size = 0
    with source.open("rb") as raw:
        opened = _opened(raw, kind)
        while piece := _next(opened, source):
            size += len(piece)
            if size > MAX_IMAGE:
                raise ImageError(f"{source}", expected=f"at most {MAX_IMAGE} bytes", got="more")
            with storage_errors(f"can't write {out.name}"):
                if piece.count(0) == len(piece):
                    out.seek(len(piece), os.SEEK_CUR)
                else:
                    out.write(piece)
            if progress is not None:
                progress(raw.tell(), total)
    with storage_errors(f"can't write {out.name}"):
        out.truncate(size)
        out.flush()
    return size


def _opened(raw: BinaryIO, kind: str) -> BinaryIO:
    if kind == "xz":
        return cast("BinaryIO", lzma.LZMAFile(raw))
    return cast("BinaryIO", gzip.GzipFile(fileobj=raw)) if kind == "gzip" else raw


def _next(opened: BinaryIO, source: Path) -> bytes:
    try:
        return opened.read(_PIECE)
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ImageError(
            f"{source} is damaged or cut short ({reason(error)})", hint="Fetch the image again."
        ) from error
    except OSError as error:
        raise ImageError(f"can't read {source}: {error.strerror}", hint=remedy(error)) from error
