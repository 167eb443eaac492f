"""Writing an image to a card, and reading it back."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from contextlib import suppress
from pathlib import Path

from fedprune.core.disk import write_all
from fedprune.core.errors import CardError
from fedprune.output.tables import Advance

_PIECE = 4 * 2**20
_HEAD = 4096  # bytes with the partition table, which are written last, so that a half-written card doesn't boot


def write_card(image: Path, card: Path, advance: Advance) -> str:
    """Write an image to a card's device, which no other program may use, and read it back; returns its sha256.

    `advance` takes how many more bytes were written or read back: twice the image's in all.
    """
    size = image.stat().st_size
    try:
        wanted = _write(image, card, advance)
        found = _digest(card, size, advance)
    except OSError as error:
        hint = {
            errno.EACCES: "Run it as a user who may write to drives, with sudo for example.",
            errno.EPERM: "Run it as a user who may write to drives, with sudo for example.",
            errno.EBUSY: "Another program uses it: unmount it first.",
        }.get(error.errno or 0, "Look whether the card is still there, or take another one.")
        raise CardError(f"can't write to {card}: {error.strerror}", hint=hint) from error
    if found != wanted:
        raise CardError(
            f"{card} gives back something else than was written",
            expected=f"sha256 {wanted[:12]}",
            got=found[:12],
            hint="Take another card: this one is broken, or smaller than it reports.",
        )
    return wanted


def _write(image: Path, card: Path, advance: Advance) -> str:
    found = hashlib.sha256()
    with image.open("rb") as source:
        # Linux refuses to open a block device that is in use.
        exclusive = os.O_EXCL if stat.S_ISBLK(card.stat().st_mode) else 0
        descriptor = os.open(card, os.O_WRONLY | exclusive)
        try:
            head = source.read(_HEAD)
            found.update(head)
            write_all(descriptor, bytes(len(head)))
            at = len(head)
            advance(at)
            while piece := source.read(_PIECE):
                found.update(piece)
                write_all(descriptor, piece, at)
                at += len(piece)
                advance(len(piece))
            os.fsync(descriptor)
            write_all(descriptor, head)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return found.hexdigest()


def _digest(card: Path, size: int, advance: Advance) -> str:
    found = hashlib.sha256()
    with card.open("rb", buffering=0) as file:
        # Otherwise the page cache would be read instead of the card.
        with suppress(AttributeError, OSError):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        left = size
        while left:
            piece = file.read(min(_PIECE, left))
            if not piece:
                break
            found.update(piece)
            left -= len(piece)
            advance(len(piece))
    return found.hexdigest()
