"""A board's *time floor*: the latest time that is certainly over, since a board's clock may show 1970 or 2090.

The floor is the latest of this software's build time and of the times in verified messages of the server. The true time
is never before it. The price: an expired certificate is accepted until the board's next message from the server. The
floor never decreases, so that a server whose clock is far ahead could lock its boards out. A time is therefore limited
to the end of the board's own certificate, two years at most: a broker's certificate that is renewed with a right clock
lasts longer. The floor is written at most once a day.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from fedprune.core.atomic_file import write_atomically
from fedprune.core.errors import StorageError, path_remedy
from fedprune.core.validation import is_whole

# Build time in seconds since 1970: 1 November 2026, raised with every release. The true time can't be earlier.
BUILD_TIME = 1_793_491_200

# The floor is written once a day at most: boards' cards wear out, and a certificate's end has no finer meaning.
_DAY = 24 * 3600


class TrustedTime:
    """A board's time floor, stored in a file. A damaged file is ignored, because the server sends the time again.

    `latest` returns the limit of accepted times, the end of the board's certificate, in seconds since 1970.
    """

    def __init__(self, path: Path, latest: Callable[[], int]) -> None:
        self._path = path
        self._time_limit = latest
        self._written = _read_floor(path, latest())
        self._floor = max(BUILD_TIME, self._written)
        self._lock = threading.Lock()

    @property
    def floor(self) -> int:
        """Seconds since 1970; the true time is not before it."""
        return self._floor

    def note_time(self, seconds: int) -> None:
        """Raise the floor to the time in a verified message of the server. On a full disk it counts until the next
        restart."""
        with self._lock:  # the board's loop and its renewal both learn
            self._floor = max(self._floor, min(seconds, self._time_limit()))
            if self._floor >= max(self._written, BUILD_TIME) + _DAY:
                write_atomically(self._path, json.dumps({"v": 1, "floor": self._floor}).encode())
                self._written = self._floor


def _read_floor(path: Path, latest: int) -> int:
    try:
        floor = json.loads(path.read_bytes())["floor"]
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=path_remedy(error)) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return min(floor, latest) if is_whole(floor, 1) else 0
