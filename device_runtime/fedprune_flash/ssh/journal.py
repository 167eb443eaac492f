"""How far each board is, and whose each claim is: the journal of a roll-out, and the claims that it gives out.

A claim is recorded before it is sent, so that a run that was killed gives the same claim to the same board when it is
started again. Once the board has its claim, only the claim's digest is kept.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess  # nosec B404  # lists of words, never a shell
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import locked, storage_errors
from fedprune.core.errors import JoinError, StorageError, reason, remedy, shown
from fedprune.core.imports import module_code
from fedprune.core.validation import restored
from fedprune.security.joining import Claim

DONE, BEGUN, REMOVED = "done", "begun", "removed"
_VERSION = 1
_MAX_BYTES = 2**24
_SERVER_S = 120.0
_Row = TypeVar("_Row")


@dataclass(frozen=True)
class JournalEntry:
    """The record of a board: `DONE`, `BEGUN` or `REMOVED`, and the digest of what was done there.

    `claim` was recorded for it and not yet delivered, empty without one; `used` are digests of earlier ones.
    """

    state: str = BEGUN
    work: str = ""
    claim: str = ""
    used: tuple[str, ...] = ()


class Journal:
    """Entries by board, on the disk at every change. Threads may share it; one process at a time uses it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._guard = threading.Lock()
        self._entries = _entries(path)

    @contextmanager
    def alone(self) -> Iterator[None]:
        lock = self.path.with_name(f"{self.path.name}.lock")
        with locked(lock, f"another run uses {self.path}", "Wait until it is done."):
            with self._guard:
                self._entries = _entries(self.path)
            yield

    def entry(self, device: str) -> JournalEntry:
        with self._guard:
            return self._entries.get(device, JournalEntry())

    def note(self, device: str, *, state: str, work: str) -> None:
        with self._guard:
            self._write(device, replace(self._entries.get(device, JournalEntry()), state=state, work=work))

    def give(self, device: str, claim: str) -> bool:
        """Record that a claim is a board's; False if it is another board's, or was used."""
        digest = _digest(claim)
        with self._guard:
            if any(claim == e.claim or digest in e.used for e in self._entries.values()):
                return False
            self._write(device, replace(self._entries.get(device, JournalEntry()), claim=claim))
            return True

    def handed(self, device: str) -> None:
        """Record that a board has its claim, and keep only the claim's digest."""
        with self._guard:
            entry = self._entries.get(device, JournalEntry())
            if entry.claim:
                self._write(device, replace(entry, claim="", used=(*entry.used, _digest(entry.claim))))

    def _write(self, device: str, entry: JournalEntry) -> None:
        entries = {**self._entries, device: entry}
        _save(self.path, {"version": _VERSION, "boards": {name: asdict(e) for name, e in sorted(entries.items())}})
        self._entries = entries


class Claims:
    """Gives claims to boards that have not joined; no claim is given to two boards.

    The first free one of `texts` is given, or a server on this machine, by its state folder, makes one for each board's
    name, valid for `hours`. The file `used` records which claims of `texts` were given to which board of which journal,
    if other runs use them, too.
    """

    def __init__(
        self,
        journal: Journal,
        texts: Iterable[str] = (),
        server: Path | None = None,
        hours: int = 72,
        used: Path | None = None,
    ) -> None:
        self._journal, self._texts, self._used = journal, tuple(texts), used
        self._server, self._hours = server, hours

    @property
    def there(self) -> bool:
        """Whether there is a source of claims."""
        return bool(self._texts) or self._server is not None

    def claim(self, device: str) -> str:
        """A board's recorded claim, else a new one, recorded first. Raises `JoinError` if none is left."""
        kept = self._journal.entry(device).claim
        if kept:
            return kept
        if self._server is not None:
            made = self._made(device, self._server)
            if self._journal.give(device, made):
                return made
        owner = f"{self._journal.path.resolve()}: {device}"
        for text in self._texts:
            # In this order: after a power cut in between it is still this board's alone.
            if (self._used is None or _take(self._used, text, owner)) and self._journal.give(device, text):
                return text
        raise JoinError(
            f"there is no claim left for {device}", hint="Make some: fedprune-server claim --count N --out FILE"
        )

    def _made(self, device: str, server: Path) -> str:
        command = [sys.executable, "-c", module_code("fedprune_server.cli.main"), "claim", "--state", str(server)]
        command += ["--device", device, "--hours", str(self._hours)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SERVER_S)  # noqa: S603  # nosec B603  # our own server's command, in this Python
        except (OSError, subprocess.TimeoutExpired) as error:
            raise JoinError(f"can't run fedprune-server: {reason(error)}") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise JoinError(f"the server doesn't make a claim for {device}: {said.removeprefix('error: ')[:300]}")
        return Claim.parse(done.stdout).text


def read_claims(path: Path) -> tuple[str, ...]:
    """The claims of a file, one per line; raises `JoinError` if a line is not a claim, or is there twice."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = Claim.parse(line).text
        except JoinError as error:
            raise JoinError(f"{path}, line {number}: {error.what}", expected=error.expected, got=error.got) from error
        if text in found:
            raise JoinError(f"{path}, line {number}: this claim is there twice")
        found.append(text)
    return tuple(found)


def _take(path: Path, claim: str, owner: str) -> bool:
    """Record a claim's owner in a file that several runs share; False if it has another owner."""
    digest, lock = _digest(claim), path.with_name(f"{path.name}.lock")
    with storage_errors(f"can't open {lock}"):
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        rows = _read(path, _used_rows, "It shows which claims were given: use new claims, in another file.")
        if digest not in rows:
            _save(path, {"used": dict(sorted({**rows, digest: owner}.items()))})
        return rows.get(digest, owner) == owner
    finally:
        os.close(descriptor)


def _digest(claim: str) -> str:
    return hashlib.sha256(claim.encode()).hexdigest()


def _save(path: Path, body: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(body, indent=1) + "\n").encode(), private=True)


def _entries(path: Path) -> dict[str, JournalEntry]:
    return _read(path, _journal_rows, "It shows whose the claims are: look into it first.")


def _read(path: Path, rows: Callable[[Any], dict[str, _Row]], hint: str) -> dict[str, _Row]:
    """The rows of a file; none if it doesn't exist."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageError(f"can't read {path}: {error.strerror}", hint=remedy(error)) from error
    try:
        return rows(json.loads(raw[:_MAX_BYTES]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StorageError(f"{path} is damaged or of another version ({error})", hint=hint) from error


def _used_rows(body: Any) -> dict[str, str]:
    return {str(digest): str(owner) for digest, owner in body["used"].items()}


def _journal_rows(body: Any) -> dict[str, JournalEntry]:
    if body["version"] != _VERSION:
        raise ValueError(f"version {shown(body['version'])}")
    return {str(name): restored(JournalEntry, row) for name, row in body["boards"].items()}
