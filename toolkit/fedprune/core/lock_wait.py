"""Waiting for a lock that another process holds: logs who holds it, and calls a hook of the waiting thread.

A wait has no time-out: the holder may be stopped (Ctrl-Z), slow, or at work on a slow disk, and giving up would cost
more than waiting. A thread that must not wait forever sets a hook that raises.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

_LOG = logging.getLogger("fedprune")

_HOOK: ContextVar[Callable[[], object] | None] = ContextVar("fedprune_wait_hook", default=None)

# Shorter waits are normal and not logged: each of two processes holds the lock for one transaction.
FIRST_LOG_AFTER_S = 1.0

# Interval of looking up the holder and calling the hook: there may be many attempts in a second.
LOOKUP_INTERVAL_S = 1.0

_REASON: ContextVar[str] = ContextVar("fedprune_wait_reason", default="")

# A wait that lasts is logged once a minute: often enough to be seen, too seldom to fill a log overnight.
_LOG_INTERVAL_S = 60.0


@contextmanager
def wait_hook(hook: Callable[[], object]) -> Iterator[None]:
    """Call `hook` repeatedly while this thread waits for a lock or its database. By raising it ends the wait."""
    token = _HOOK.set(hook)
    try:
        yield
    finally:
        _HOOK.reset(token)


def call_wait_hook(reason: str) -> None:
    """Call this thread's hook, if it has one. Waits call it at least every two seconds.

    During the call `wait_reason` returns `reason`, and the hook isn't called again by waits of its own.
    """
    if (hook := _HOOK.get()) is not None:
        reason_token, hook_token = _REASON.set(reason), _HOOK.set(None)
        try:
            hook()
        finally:
            _HOOK.reset(hook_token)
            _REASON.reset(reason_token)


def wait_reason() -> str:
    """What this thread waits for, as its hook may ask; empty outside of a hook."""
    return _REASON.get()


class LockWait:
    """One wait for a lock. Its owner calls `note_failure` after each attempt that failed, and `note_success` after the
    one that succeeded.
    """

    def __init__(self, what: str, holders: Callable[[], Sequence[str]]) -> None:
        self._what, self._holders = what, holders
        self._waiting_since: float | None = None
        self._looked_up_at = 0.0
        self._logged_at: float | None = None

    def note_failure(self) -> None:
        """Log whom this waits for, first after a second and then once a minute; raises what the hook raises."""
        now = time.monotonic()
        if self._waiting_since is not None and now - self._looked_up_at < LOOKUP_INTERVAL_S:
            return
        self._looked_up_at = now
        holders = " and ".join(self._holders()) or "another process"
        if self._waiting_since is None:
            self._waiting_since = now
        elif now - self._waiting_since >= FIRST_LOG_AFTER_S and (
            self._logged_at is None or now - self._logged_at >= _LOG_INTERVAL_S
        ):
            self._logged_at = now
            _LOG.warning(
                "waiting for %s, which is locked by %s; waited %.0f s so far, nothing is lost",
                self._what, holders, now - self._waiting_since,
            )  # fmt: skip
        call_wait_hook(f"{self._what} is locked by {holders}")

    def note_success(self) -> None:
        if self._logged_at is not None and self._waiting_since is not None:
            _LOG.info("%s is free again after %.0f s", self._what, time.monotonic() - self._waiting_since)
