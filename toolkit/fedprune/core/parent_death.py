"""The kernel's parent-death signal, which ends a child process with its parent."""

from __future__ import annotations

import ctypes
import signal

_PR_SET_PDEATHSIG = 1

_prctl = getattr(ctypes.CDLL(None, use_errno=True), "prctl", None)


def set_parent_death_signal(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when its parent ends, even after kill -9 (Linux only).

    The kernel watches the thread that started this process (prctl(2)), so that thread must outlive it. The function may
    run between fork and exec, so it only calls the kernel.
    """
    if _prctl is not None:
        _prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
