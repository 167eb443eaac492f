"""Unpacks an image of a card (.img, .img.xz, .img.gz) into a file, and refuses what only looks like an image."""

from __future__ import annotations

import gzip
import lzma
import os
import zlib
from pathlib import Path
from typing import IO, cast

from fedprune.core.disk import open_file, storage_errors
from fedprune.core.errors import ImageError, error_reason, path_remedy
from fedprune.output.tables import AdvanceBar, ignore_progress

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
