"""A trusted lower bound of the time for boards, whose clocks may show 1970 or 2090.

The *time floor* is the later of this software's build and of the times in verified messages of the server. The true
time is never before it. A certificate that ended before the floor has expired; the board's own clock is ignored. The
price: an expired certificate is accepted until the board's next message from the server.

The floor never decreases, so that a server whose clock is far ahead could lock its boards out. A time is therefore
limited to the end of the board's own certificate, two years at most: a broker's certificate that is renewed with a
right clock lasts longer. The floor is written at most once a day.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import StorageError, remedy
from fedprune.core.validation import is_whole

BUILT = 1_793_491_200
"""Build time in seconds since 1970: 1 November 2026, raised with every release."""

_DAY = 24 * 3600


class TrustedTime:
    """A board's time floor, stored in a file; a damaged one is ignored: the server sends the time again.

    Args:
        latest: Returns the limit of accepted times, the end of the board's certificate, in seconds since 1970.
    """

    def __init__(self, path: Path, latest: Callable[[], int]) -> None:
        self._path = path
        self._latest = latest
        self._written = _read(path, latest())
        self._floor = max(BUILT, self._written)
        self._lock = threading.Lock()

    @property
    def floor(self) -> int:
        """Seconds since 1970; the true time is not before it."""
        return self._floor

    def learn(self, seconds: int) -> None:
        """Take note of the time in a message of the server whose signature was right; without room it counts until the
        next restart."""
        with self._lock:  # the board's loop and its renewal both learn
            self._floor = max(self._floor, min(seconds, self._latest()))
            if self._floor >= max(self._written, BUILT) + _DAY:
                write_whole(self._path, json.dumps({"v": 1, "floor": self._floor}).encode())
                self._written = self._floor


def _read(path: Path, latest: int) -> int:
    try:
        floor = json.loads(path.read_bytes())["floor"]
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return min(floor, latest) if is_whole(floor, 1) else 0
