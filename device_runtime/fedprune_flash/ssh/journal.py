"""The journal of an installation over SSH: which board is how far, and which claim is whose. It outlives a kill.

A claim is written down before it is sent, so that a run that is killed and started again gives the same one to the same
board. Once the board has it, only its digest stays.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked
from fedprune.core.errors import StorageError, remedy, shown

DONE, BEGUN, REMOVED = "done", "begun", "removed"
_VERSION = 1
_MAX_BYTES = 2**24


@dataclass(frozen=True)
class JournalEntry:
    """What is known of a board.

    Attributes:
        state: `DONE`, `BEGUN` or `REMOVED`.
        work: Digest of what was done there.
        claim: The claim that is its own and on its way; empty where there is none.
        used: Digests of claims that it has had.
    """

    state: str = BEGUN
    work: str = ""
    claim: str = ""
    used: tuple[str, ...] = ()


class Journal:
    """Entries by board, on the disk at every change. Threads may use it together, processes one at a time.

    Args:
        path: The file, which only this user may read; made where there is none.

    Raises:
        StorageError: It is damaged or can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._entries = _entries(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other runs away. What one before has written down counts, whenever this was made.

        Raises:
            StorageError: There is one, or what it has written is damaged.
        """
        lock = self.path.with_name(f"{self.path.name}.lock")
        with locked(lock, f"another run uses {self.path}", "Wait until it is done."):
            with self._guard:
                self._entries = _entries(self.path)
            yield

    def entry(self, device: str) -> JournalEntry:
        """What is known of a board."""
        with self._guard:
            return self._entries.get(device, JournalEntry())

    def note(self, device: str, *, state: str | None = None, work: str | None = None) -> None:
        """Write down how far a board is.

        Raises:
            StorageError: The disk fails or is full.
        """
        with self._guard:
            entry = self._entries.get(device, JournalEntry())
            self._write(device, replace(entry, state=state or entry.state, work=entry.work if work is None else work))

    def give(self, device: str, claim: str) -> bool:
        """Write down that a claim is a board's; False if it is another's, or was used.

        Raises:
            StorageError: The disk fails or is full.
        """
        digest = mark(claim)
        with self._guard:
            if any(claim == e.claim or digest in e.used for e in self._entries.values()):
                return False
            self._write(device, replace(self._entries.get(device, JournalEntry()), claim=claim))
            return True

    def handed(self, device: str) -> None:
        """Write down that a board has its claim, which is forgotten here.

        Raises:
            StorageError: The disk fails or is full.
        """
        with self._guard:
            entry = self._entries.get(device, JournalEntry())
            if entry.claim:
                self._write(device, replace(entry, claim="", used=(*entry.used, mark(entry.claim))))

    def _write(self, device: str, entry: JournalEntry) -> None:
        entries = {**self._entries, device: entry}
        body = {"version": _VERSION, "boards": {name: asdict(e) for name, e in sorted(entries.items())}}
        write_whole(self.path, (json.dumps(body, indent=1) + "\n").encode(), private=True)
        self._entries = entries


def mark(claim: str) -> str:
    """What may be kept of a claim when it has been handed over: its digest."""
    return hashlib.sha256(claim.encode()).hexdigest()


def _entries(path: Path) -> dict[str, JournalEntry]:
    try:
        return _read(path) if path.exists() else {}
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error


def _read(path: Path) -> dict[str, JournalEntry]:
    raw = path.read_bytes()
    try:
        body = json.loads(raw[:_MAX_BYTES])
        if body["version"] != _VERSION:
            raise ValueError(f"version {shown(body['version'])}")
        entries = {}
        for name, row in body["boards"].items():
            entry = JournalEntry(**{**row, "used": tuple(row["used"])})
            if not all(isinstance(v, str) for v in (entry.state, entry.work, entry.claim, *entry.used)):
                raise ValueError(f"the entry of {shown(name)}")
            entries[str(name)] = entry
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(
            f"{path} is no journal of this version ({error})",
            hint="It knows whose the claims are: look first.",
        ) from error
    return entries
