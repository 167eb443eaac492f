"""How the C library keeps freed memory, in this process; glibc alone can be told."""

from __future__ import annotations

import ctypes
import logging
from contextlib import suppress

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt (its malloc.h)."""

_INITIAL_THRESHOLD = 128 * 1024
"""glibc's own at the start of a process."""

_LOG = logging.getLogger("fedprune.device")


def return_freed_blocks() -> None:
    """Let freed blocks of 128 KiB and more go back to the system at once, from here on.

    With every large block that is freed glibc raises the size from which it maps a block on its own, up to 32 MiB.
    Smaller ones are cut from heaps that rarely shrink: weights that come and go with the rounds leave them full of
    holes. A size that was set stays.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter in (_MMAP_THRESHOLD, _TRIM_THRESHOLD):
            if not mallopt(parameter, _INITIAL_THRESHOLD):
                _LOG.debug("mallopt refused parameter %d: freed memory is kept as usual", parameter)


def trim_heap() -> None:
    """Return free pages in the middle of the heap to the system. Takes a few milliseconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
