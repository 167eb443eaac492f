"""Limits for zip archives, checked before anything is unpacked: a small file can hold gigabytes of zeros."""

from __future__ import annotations

import zipfile
import zlib
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import FedpruneError

# Limits of an unpacked member: its bytes, and its ratio to the packed bytes once it is larger than that.
MAX_INFLATED_BYTES, MAX_INFLATION = 2**30, 100

# Without bzip2 and LZMA: `zipfile` unpacks a whole block of them at once, however large it becomes.
SUPPORTED_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

ErrorClass = type[FedpruneError]


def check_members(file: BinaryIO, what: str, refuse: ErrorClass) -> None:
    """Check the members of a file if it is a zip archive, without moving its position.

    Raises `refuse` if it would fill the memory, or is packed in a way that is read nowhere here, and any error of
    `zipfile` if it is damaged.
    """
    file.seek(0)
    if file.read(4)[:2] == b"PK":
        with zipfile.ZipFile(file) as archive:
            check_sizes(archive.infolist(), what, refuse)
    file.seek(0)


def check_sizes(members: list[zipfile.ZipInfo], what: str, refuse: ErrorClass) -> None:
    """Make sure that members of an archive can be unpacked together; errors are those of `check_members`."""
    packed_bytes = sum(member.compress_size for member in members)
    unpacked_bytes = sum(member.file_size for member in members)
    if unpacked_bytes > max(MAX_INFLATED_BYTES, MAX_INFLATION * packed_bytes):
        raise refuse(
            f"{what}: size when it is unpacked",
            expected=f"at most {MAX_INFLATED_BYTES} bytes, or {MAX_INFLATION} times what it takes in the file",
            got=unpacked_bytes,
            hint="Write arrays with numpy.savez: then they take no less room in the file.",
        )
    if any(member.compress_type not in SUPPORTED_METHODS for member in members):
        raise refuse(f"{what}: how it is packed", expected="deflate, or not at all")


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, max_bytes: int, refuse: ErrorClass) -> bytes:
    """Read a small member, whatever size its header claims. Raises as `check_members`, and `refuse` if it has more than
    `max_bytes` bytes."""
    if member.compress_type not in SUPPORTED_METHODS:
        raise refuse(f"{member.filename[:200]!r}: how it is packed", expected="deflate, or not at all")
    with archive.open(member) as source:
        # One byte more than allowed: without a limit `zipfile` would unpack all of it, whatever size the header claims.
        content = source.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise refuse(f"{member.filename[:200]!r}", expected=f"at most {max_bytes} bytes", got="more")
    return content


def plain_array(name: str, content: object) -> npt.NDArray[Any]:
    """A member of an archive of arrays; numpy returns the bytes of one that is no array. Raises `ValueError` then."""
    if not isinstance(content, np.ndarray):
        raise ValueError(f"{name[:80]!r} in it is no array")
    return content


def unreadable_reason(error: Exception) -> str:
    """numpy's or zipfile's error about a file of arrays in brackets, without advice to allow pickles; may be empty."""
    text = str(error)
    if "Object arrays" in text:
        return " (it holds objects, which are never unpickled)"
    if "No data left" in text:  # numpy's error, only for a file of no bytes
        return " (it is empty)"
    if isinstance(error, (zipfile.BadZipFile, zlib.error, EOFError)) and "not a zip file" not in text:
        return " (it is damaged: what it holds contradicts its checksums or headers; copy it again)"
    # numpy takes a file that is neither a zip archive nor an array for a pickle, and advises to allow those.
    if "pickle" in text or isinstance(error, zipfile.BadZipFile):
        return " (it is cut short, or no zip archive)"
    if "magic string" in text:
        return " (what is in it is no arrays)"
    return text and f" ({text})"
