"""Sets up the C library's allocator in this process, so that freed memory goes back to the system; only for glibc."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Mapping
from contextlib import suppress

# Parameters of glibc's mallopt (its malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
# glibc's own value at the start of a process.
_INITIAL_THRESHOLD = 128 * 1024

_LOG = logging.getLogger("fedprune.device")


def return_freed_blocks() -> None:
    """Return freed blocks of 128 KiB and more to the system at once, from now on. With every large block that is freed
    glibc raises the size from which it maps a block on its own, up to 32 MiB. Smaller ones are cut from heaps that
    rarely shrink: weights that come and go with the rounds leave them full of holes. A size that was set stays."""
    _set_parameters({_MMAP_THRESHOLD: _INITIAL_THRESHOLD, _TRIM_THRESHOLD: _INITIAL_THRESHOLD})


def share_heaps() -> None:
    """Let the threads of this process share two heaps, from now on.

    By default glibc gives each thread a heap of its own, up to eight per core, whose free memory only that thread uses.
    If the environment sets `MALLOC_ARENA_MAX`, that stays.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        _set_parameters({_ARENA_MAX: 2})


def trim_heap() -> None:
    """Return free pages in the middle of the heap to the system. Takes a few milliseconds."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _set_parameters(values: Mapping[int, int]) -> None:
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in values.items():
            if not mallopt(parameter, value):
                _LOG.debug("mallopt refused parameter %d", parameter)
