"""Which processes hold the locks on files, with their command lines as a log may show them."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.text import one_line

# All locks on files, where the kernel is Linux.
LOCK_LIST = Path("/proc/locks")

# Characters of a command line in a log line, so that the sentence around it stays readable.
_MAX_COMMAND_LENGTH = 120


@dataclass(frozen=True)
class LockHolder:
    """A process that holds an exclusive lock.

    Attributes:
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
    """The same as `lock_holders`, in words for a message."""
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


def command_text(arguments: Sequence[str]) -> str:
    """A command line for a log line, without secrets.

    Program and script are shown without their folders, and a long line is cut in the middle: its ends distinguish it.
    Addresses are hidden, because they may hold a password or be a secret, and so are values after words like
    `password=`.
    """
    words = [_SECRET.sub(r"\1***", _ADDRESS.sub(r"\1***", one_line(a, len(a)))) for a in arguments if a]
    words[:2] = [word.rpartition("/")[2] if word.startswith("/") else word for word in words[:2]]
    text, half = " ".join(words), _MAX_COMMAND_LENGTH // 2
    return text if len(text) <= _MAX_COMMAND_LENGTH else f"{text[:half]} ... {text[-half:]}"
