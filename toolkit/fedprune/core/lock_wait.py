"""Waits for locks that other processes hold: they log the holder and call a hook of the waiting thread.

The wait has no end of its own: the holder may be stopped (Ctrl-Z), slow, or at work on a slow disk, and giving up would
cost more than waiting. A thread that must not wait forever sets a hook that raises.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.text import one_line

_LOG = logging.getLogger("fedprune")

_HOOK: ContextVar[Callable[[], object] | None] = ContextVar("fedprune_wait_hook", default=None)

# Shorter waits are normal and not logged: each of two processes holds the lock for one transaction.
FIRST_LOG_AFTER_S = 1.0

# Interval of looking up the holder and calling the hook: there may be many attempts in a second.
LOOKUP_INTERVAL_S = 1.0

_REASON: ContextVar[str] = ContextVar("fedprune_wait_reason", default="")

# All locks on files, where the kernel is Linux.
LOCK_LIST = Path("/proc/locks")

# A wait that lasts is logged once a minute: often enough to be seen, too seldom to fill a log overnight.
_LOG_INTERVAL_S = 60.0
# Characters of a command line in a log line, so that the sentence around it stays readable.
_MAX_COMMAND_LENGTH = 120


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

    During the call `wait_reason` returns `reason`, and waits of the hook itself call no hook.
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

    Args:
        what: What is locked.
        holders: Names who has the lock now.
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


@dataclass(frozen=True)
class LockHolder:
    """A process that holds an exclusive lock.

    Attributes:
        command: Its command line; empty if unknown.
        is_stopped: Whether it was suspended, as by Ctrl-Z or SIGSTOP.
        is_certain: Whether the lock is on the file itself, rather than on any file with its inode number.
    """

    pid: int
    command: str = ""
    is_stopped: bool = False
    is_certain: bool = True

    @property
    def name(self) -> str:
        """Its id and command, for people."""
        command = f" ({self.command})" if self.command else ""
        return f"{'' if self.is_certain else 'perhaps '}process {self.pid}{command}"

    def __str__(self) -> str:
        advice = f", which is stopped: continue it with `kill -CONT {self.pid}`, or end it" if self.is_stopped else ""
        return f"{self.name}{advice}"


def file_lock_holders(*paths: Path) -> list[str]:
    """`lock_holders` in words."""
    return [str(holder) for holder in lock_holders(*paths)]


def lock_holders(*paths: Path) -> list[LockHolder]:
    """The other processes that hold exclusive locks on files; empty if the kernel doesn't list locks.

    On some file systems (Btrfs, overlays) the kernel lists another device than `stat` does. If no device matches,
    holders of locks with the same inode number are returned as uncertain: another file may have that number.

    The files are not opened: closing a file gives up all POSIX locks on it that this process has.
    """
    file_keys = set()
    for path in paths:
        try:
            status = path.stat()
        except OSError:  # a file that is gone has no lock
            continue
        file_keys.add(f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}")
    inodes = {file_key.rpartition(":")[2] for file_key in file_keys}
    try:
        lines = LOCK_LIST.read_text().splitlines()
    except OSError:
        return []
    holder_pids, same_inode_pids = set[int](), set[int]()
    for line in lines:
        # "3: POSIX  ADVISORY  WRITE 4711 fe:00:123456 120 120"; a process that only waits has "->" after the number.
        words = line.split()
        if len(words) >= 6 and "->" not in words and words[3] == "WRITE" and words[5].rpartition(":")[2] in inodes:
            (holder_pids if words[5] in file_keys else same_inode_pids).add(int(words[4]))
    pids = sorted((holder_pids or same_inode_pids) - {os.getpid()})
    return [_lock_holder(pid, is_certain=bool(holder_pids)) for pid in pids if pid > 0]


def _lock_holder(pid: int, *, is_certain: bool) -> LockHolder:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return LockHolder(pid, is_certain=is_certain)
    return LockHolder(pid, command_text(arguments), is_stopped=state in ("T", "t"), is_certain=is_certain)


# Web hooks and broker URLs: the secret can be in the user part, the path or the query, so all of it goes.
_ADDRESS = re.compile(r"(\w://)\S+")
_SECRET = re.compile(r"((?:password|secret|token)\w*=)\S+", re.IGNORECASE)


def _without_secrets(word: str) -> str:
    return _SECRET.sub(r"\1***", _ADDRESS.sub(r"\1***", word))


def command_text(arguments: Sequence[str]) -> str:
    """A command line for a log line, without secrets.

    A long one is cut in the middle. It keeps what distinguishes it: program and script without their folders, the
    subcommand, and the last arguments, such as paths. Addresses are hidden, because they may hold a password or be a
    secret, and so are values after words like `password=`.
    """
    words = [_without_secrets(word) for argument in arguments if (word := one_line(argument, len(argument)))]
    if len(text := " ".join(words)) <= _MAX_COMMAND_LENGTH:
        return text
    for i in range(min(2, len(words) - 1)):
        words[i] = words[i].rpartition("/")[2] if words[i].startswith("/") else words[i]
    first_words = [one_line(words.pop(0), _MAX_COMMAND_LENGTH // 2)]
    while words and len(" ".join([*first_words, words[0]])) <= _MAX_COMMAND_LENGTH // 3:
        first_words.append(words.pop(0))
    room, last_words = _MAX_COMMAND_LENGTH - len(" ".join(first_words)), list[str]()
    while words and len(words[-1]) < room:
        last_words.insert(0, words.pop())
        room -= len(last_words[0]) + 1
    if words and not last_words:
        last_words = [words[-1][-room:]]
    return " ".join([*first_words, *(["..."] if words else []), *last_words])
