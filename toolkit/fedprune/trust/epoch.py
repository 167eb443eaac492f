"""A sender's epoch: a number that only grows, and is on the disk before the first message that carries it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from fedprune.disk import write_whole
from fedprune.errors import StorageError, remedy
from fedprune.trust.envelope import MAX_NUMBER

_LAST_TIME = 2**53
"""Milliseconds that no right clock shows; a wrong one must not use up the numbers."""


class EpochFile:
    """Where a sender keeps its latest epoch, beside the key that it signs with.

    An epoch is the time in milliseconds where that is larger than the last one, so that a sender whose disk was set
    back to an old copy is heard again; a clock that says 1970 does no harm.

    Args:
        path: The file.
        clock: Seconds since 1970.

    Raises:
        StorageError: It is damaged or can't be read.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._latest = _read(path)

    def next(self) -> int:
        """A new epoch.

        Raises:
            StorageFullError: No room; no epoch is used up.
            StorageError: The disk fails.
        """
        epoch = max(self._latest + 1, int(min(1000 * self._clock(), _LAST_TIME)))
        write_whole(self._path, json.dumps({"v": 1, "epoch": epoch}).encode())
        self._latest = epoch
        return epoch


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
    if not isinstance(epoch, int) or isinstance(epoch, bool) or not 0 <= epoch < MAX_NUMBER:
        raise StorageError(
            f"{path} is damaged",
            hint="Delete it if the clock of this machine is right; the next epoch is then the time.",
        )
    return epoch
