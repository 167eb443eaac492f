"""Epochs of a sender: increasing numbers that are on the disk before the first message with them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import StorageError, remedy
from fedprune.core.validation import is_whole
from fedprune.security.envelope import MAX_NUMBER

_LAST_TIME = 2**53
"""Limit of milliseconds from the clock: a wrong one must not use up the numbers."""

_BLOCK = 256
"""Epochs that are written at once, so that a connecting fleet doesn't make its server wait for the disk each time."""

_AHEAD = 2**16
"""Epochs by which a sender is never ahead of its clock: no sender begins that many within a minute."""


class EpochFile:
    """The file of a sender's epochs, next to its signing key.

    They are written in blocks before the first of a block is used; a restart skips the rest of a block. A block begins
    at the time in milliseconds where that is larger than the last one's end, so that a sender whose disk was reset to
    an old copy is accepted again; a clock at 1970 does no harm. Raises `StorageError` if the file is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._written = self._latest = _read(path)

    @staticmethod
    def make(path: Path) -> None:
        """Write a file without used epochs, so that a file that is missing later is known to be lost."""
        write_whole(path, json.dumps({"v": 1, "epoch": 0}).encode())

    def next(self) -> int:
        """A new epoch; none is used up if the disk is full."""
        if self._latest == self._written:
            begin = max(self._written + 1, int(min(1000 * self._clock(), _LAST_TIME)))
            end = begin + _BLOCK - 1
            write_whole(self._path, json.dumps({"v": 1, "epoch": end}).encode())
            self._latest, self._written = begin - 1, end
        self._latest += 1
        return self._latest

    def leap(self) -> None:
        """Begin a new block: the receiver knows a later epoch, perhaps of a copy of this disk."""
        self._latest = self._written

    @property
    def written(self) -> int:
        """The last written epoch; no later one was used."""
        return self._written

    def pass_over(self, used: int = 0) -> None:
        """Skip all epochs that another holder of the key may have used: `used`, and some ahead of the clock."""
        end = max(self._written, used, int(min(1000 * self._clock(), _LAST_TIME))) + _AHEAD
        write_whole(self._path, json.dumps({"v": 1, "epoch": end}).encode())
        self._latest = self._written = end


def _read(path: Path) -> int:
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error
    try:
        epoch = json.loads(raw)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        epoch = None
    if not is_whole(epoch, 0, MAX_NUMBER - 1):
        raise StorageError(
            f"{path} is damaged",
            hint="Delete it if the clock of this machine is right; the next epoch is then the time.",
        )
    return epoch
