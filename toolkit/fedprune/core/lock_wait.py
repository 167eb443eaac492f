"""Patience with locks that other processes hold: it logs who is waited for, and lets the waiting thread show life.

A lock is waited for without end, because its holder may be stopped (Ctrl-Z), slow, or wait for a slow disk, and ending
here would cost more than waiting. Whoever must not wait without end sets a hook that raises.
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

# A lock that is free again sooner is no news.
SAID_AFTER_S = 1.0

# Who has a lock is looked up, and the hook called, no more often: there may be many attempts in a second.
ASKED_EVERY_S = 1.0

_REASON: ContextVar[str] = ContextVar("fedprune_wait_reason", default="")

# All locks on files, where the kernel is Linux.
LOCKS = Path("/proc/locks")

_SAID_AGAIN_S = 60.0
# Characters of a command in a sentence.
_MAX_COMMAND = 120


@contextmanager
def wait_hook(hook: Callable[[], object]) -> Iterator[None]:
    """Call `hook` again and again while this thread waits for a lock or its database; it ends the wait by raising."""
    token = _HOOK.set(hook)
    try:
        yield
    finally:
        _HOOK.reset(token)


def call_wait_hook(reason: str) -> None:
    """Call this thread's hook, if it has one; at least once in two seconds of a wait, whose reason `wait_reason` says
    meanwhile. What the hook itself waits for calls no hook.
    """
    if (hook := _HOOK.get()) is not None:
        reason_token, hook_token = _REASON.set(reason), _HOOK.set(None)
        try:
            hook()
        finally:
            _HOOK.reset(hook_token)
            _REASON.reset(reason_token)


def wait_reason() -> str:
    """What this thread waits for, for a hook; empty outside of one."""
    return _REASON.get()


class LockWait:
    """One wait for a lock. Its owner calls `note` after each attempt that failed, and `done` after the one that
    succeeded.

    Args:
        what: What is locked.
        holders: Names who has the lock now.
    """

    def __init__(self, what: str, holders: Callable[[], Sequence[str]]) -> None:
        self._what, self._holders = what, holders
        self._since: float | None = None
        self._asked_at = 0.0
        self._said_at: float | None = None

    def note(self) -> None:
        """Log whom this waits for, first after a second and then once a minute; raises what the hook raises."""
        now = time.monotonic()
        if self._since is not None and now - self._asked_at < ASKED_EVERY_S:
            return
        self._asked_at = now
        holders = " and ".join(self._holders()) or "another process"
        if self._since is None:
            self._since = now
        elif now - self._since >= SAID_AFTER_S and (self._said_at is None or now - self._said_at >= _SAID_AGAIN_S):
            self._said_at = now
            _LOG.warning(
                "waiting for %s, which is locked by %s; waited %.0f s so far, nothing is lost",
                self._what, holders, now - self._since,
            )  # fmt: skip
        call_wait_hook(f"{self._what} is locked by {holders}")

    def done(self) -> None:
        if self._said_at is not None and self._since is not None:
            _LOG.info("%s is free again after %.0f s", self._what, time.monotonic() - self._since)


@dataclass(frozen=True)
class LockHolder:
    """A process that holds an exclusive lock.

    Attributes:
        command: Its command line; empty if unknown.
        is_stopped: Whether it was suspended, as by Ctrl-Z or SIGSTOP.
        is_certain: Whether the lock is on the file itself, and not perhaps on another one of the same number.
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
        stopped = f", which is stopped: continue it with `kill -CONT {self.pid}`, or end it" if self.is_stopped else ""
        return f"{self.name}{stopped}"


def file_lock_holders(*paths: Path) -> list[str]:
    """`lock_holders` in words."""
    return [str(holder) for holder in lock_holders(*paths)]


def lock_holders(*paths: Path) -> list[LockHolder]:
    """The other processes that hold exclusive locks on files; empty where the kernel doesn't tell.

    Some file systems (Btrfs, overlays) show the kernel's locks another device than programs. Where no device fits,
    those of the same number of a file are named with "perhaps", since another file may have it as well.

    The files are not opened: closing a file gives up all POSIX locks on it that this process has.
    """
    files = set()
    for path in paths:
        try:
            found = path.stat()
        except OSError:  # a file that is gone has no lock
            continue
        files.add(f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}")
    inodes = {file.rpartition(":")[2] for file in files}
    try:
        lines = LOCKS.read_text().splitlines()
    except OSError:
        return []
    holders, namesakes = set[int](), set[int]()
    for line in lines:
        # "3: POSIX  ADVISORY  WRITE 4711 fe:00:123456 120 120"; one that only waits has "->" after its number.
        words = line.split()
        if len(words) >= 6 and "->" not in words and words[3] == "WRITE" and words[5].rpartition(":")[2] in inodes:
            (holders if words[5] in files else namesakes).add(int(words[4]))
    pids = sorted((holders or namesakes) - {os.getpid()})
    return [_lock_holder(pid, is_certain=bool(holders)) for pid in pids if pid > 0]


def _lock_holder(pid: int, *, is_certain: bool) -> LockHolder:
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        state = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return LockHolder(pid, is_certain=is_certain)
    return LockHolder(pid, command_text(arguments), is_stopped=state in ("T", "t"), is_certain=is_certain)


_ADDRESS = re.compile(r"(\w://)\S+")
_SECRET = re.compile(r"((?:password|secret|token)\w*=)\S+", re.IGNORECASE)


def _without_secrets(word: str) -> str:
    return _SECRET.sub(r"\1***", _ADDRESS.sub(r"\1***", word))


def command_text(arguments: Sequence[str]) -> str:
    """A command line in a sentence. Of a long one, what tells it from others: the names of program and script without
    their folders, the subcommand, and the last arguments, such as paths. What may be secret isn't shown: addresses,
    which may hold a password or be one, and what a word like `password=` is followed by."""
    words = [_without_secrets(word) for argument in arguments if (word := one_line(argument, len(argument)))]
    if len(text := " ".join(words)) <= _MAX_COMMAND:
        return text
    for i in range(min(2, len(words) - 1)):
        words[i] = words[i].rpartition("/")[2] if words[i].startswith("/") else words[i]
    first = [one_line(words.pop(0), _MAX_COMMAND // 2)]
    while words and len(" ".join([*first, words[0]])) <= _MAX_COMMAND // 3:
        first.append(words.pop(0))
    room, last = _MAX_COMMAND - len(" ".join(first)), list[str]()
    while words and len(words[-1]) < room:
        last.insert(0, words.pop())
        room -= len(last[0]) + 1
    if words and not last:
        last = [words[-1][-room:]]
    return " ".join([*first, *(["..."] if words else []), *last])
