"""The file of a signer's epochs: an *epoch* is the number of a start of the signer, so that old messages are refused.

`security.signed_channel` says how epochs and counters keep messages from being replayed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import read_file
from fedprune.core.errors import StorageError, path_remedy
from fedprune.core.validation import is_whole
from fedprune.security.signed_envelope import MAX_EPOCH

# Limit of milliseconds from the clock, some 285,000 years: a wrong clock must not use up the numbers.
_MAX_CLOCK_MS = 2**53

# Epochs that are reserved with one write: a server begins one per connecting board, and must not wait for the disk each
# time.
_BLOCK_LENGTH = 256

# More epochs than any sender gets ahead of its clock: epochs are milliseconds, and no sender begins so many in a
# minute.
_MAX_EPOCHS_AHEAD = 2**16


class EpochFile:
    """The file of a sender's epochs, next to its signing key.

    A block of epochs is reserved with one write before its first epoch is used; a restart skips the rest of the block.
    A block begins at the time in milliseconds if that is after the last block's end, so that a sender whose disk was
    reset to an old copy is accepted again; a clock at 1970 does no harm. Raises `StorageError` if the file is damaged.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._clock = clock
        self._block_end = self._latest = _read_epoch(path)

    @staticmethod
    def make(path: Path) -> None:
        """Write a file without used epochs. If it is missing later, it is known to be lost."""
        write_atomically(path, json.dumps({"v": 1, "epoch": 0}).encode())

    def next(self) -> int:
        """A new epoch; none is used up if the disk is full."""
        if self._latest == self._block_end:
            begin = max(self._block_end + 1, int(min(1000 * self._clock(), _MAX_CLOCK_MS)))
            end = begin + _BLOCK_LENGTH - 1
            write_atomically(self._path, json.dumps({"v": 1, "epoch": end}).encode())
            self._latest, self._block_end = begin - 1, end
        self._latest += 1
        return self._latest

    def skip_block(self) -> None:
        """Skip the rest of the block: the receiver knows a later epoch, perhaps from a copy of this disk."""
        self._latest = self._block_end

    def skip_foreign_epochs(self) -> None:
        """Skip all epochs that another holder of the key may have used, some of which are ahead of the clock."""
        end = max(self._block_end, int(min(1000 * self._clock(), _MAX_CLOCK_MS))) + _MAX_EPOCHS_AHEAD
        write_atomically(self._path, json.dumps({"v": 1, "epoch": end}).encode())
        self._latest = self._block_end = end


def _read_epoch(path: Path) -> int:
    try:
        raw = read_file(path, own=True)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    try:
        epoch = json.loads(raw)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        epoch = None
    if not is_whole(epoch, 0, MAX_EPOCH - 1):
        hint = "Delete it if the clock of this machine is right; the next epoch is then the time."
        raise StorageError(f"{path} is damaged", hint=hint)
    return epoch
