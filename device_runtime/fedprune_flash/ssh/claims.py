"""Claims for boards that have not joined yet: from a file with one a line, or made by the server on this machine."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess  # nosec B404  # lists of words, never a shell
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.disk import storage_errors
from fedprune.core.errors import JoinError, StorageError, reason, remedy
from fedprune.security.join_token import Claim
from fedprune_flash.ssh.journal import Journal, mark

_SERVER_S = 120.0


class Claims:
    """Where claims come from; none is ever given to two boards.

    Args:
        journal: Where it is written down whose they are.
        texts: Claims; the first that is still free is taken.
        server: The server's state folder, in which a claim for each board's name is made.
        hours: How long those last.
        used: A file of all that was given of `texts`, by whichever journal; None where nobody else has them.
    """

    def __init__(
        self,
        journal: Journal,
        texts: Iterable[str] = (),
        server: Path | None = None,
        hours: int = 72,
        used: Path | None = None,
    ) -> None:
        self._journal, self._texts = journal, tuple(texts)
        self._server, self._hours = server, hours
        self._used = None if used is None else UsedClaims(used)

    @property
    def there(self) -> bool:
        """Whether claims come from anywhere."""
        return bool(self._texts) or self._server is not None

    def claim(self, device: str) -> str:
        """A board's claim: the one that it was to get before, else a new one, which is written down first.

        Raises:
            JoinError: There is none left, or the server makes none.
            StorageError: The disk fails or is full.
        """
        kept = self._journal.entry(device).claim
        if kept:
            return kept
        if self._server is not None:
            made = self._made(device)
            if self._journal.give(device, made):
                return made
        owner = f"{self._journal.path.resolve()}: {device}"
        for text in self._texts:
            # In this order: after a cut in between it is still this board's, and nobody else's.
            if (self._used is None or self._used.take(text, owner)) and self._journal.give(device, text):
                return text
        raise JoinError(
            f"there is no claim left for {device}", hint="Make some: fedprune-server claim --count N --out FILE"
        )

    def _made(self, device: str) -> str:
        command = [sys.executable, "-m", "fedprune_server.cli.main", "claim", "--state", str(self._server)]
        command += ["--device", device, "--hours", str(self._hours)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SERVER_S)  # noqa: S603  # nosec B603  # our own server's command, in this Python
        except (OSError, subprocess.TimeoutExpired) as error:
            raise JoinError(f"can't run fedprune-server: {reason(error)}") from error
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            raise JoinError(f"the server makes no claim for {device}: {said.removeprefix('error: ')[:300]}")
        return Claim.parse(done.stdout).text


class UsedClaims:
    """Which claims of a file were given, and to which board of which journal. Any number of runs may use it at once.

    Args:
        path: A file of digests and boards, beside that of the claims; made where there is none.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def take(self, claim: str, owner: str) -> bool:
        """Write down that a claim is somebody's; False if it is somebody else's.

        Raises:
            StorageError: The file is damaged, or the disk fails or is full.
        """
        digest = mark(claim)
        with self._held():
            rows = self._rows()
            if digest not in rows:
                write_whole(self._path, _text({**rows, digest: owner}), private=True)
            return rows.get(digest, owner) == owner

    @contextmanager
    def _held(self) -> Iterator[None]:
        lock = self._path.with_name(f"{self._path.name}.lock")
        with storage_errors(f"can't open {lock}"):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                yield
            finally:
                os.close(descriptor)

    def _rows(self) -> dict[str, str]:
        try:
            if not self._path.exists():
                return {}
            body = json.loads(self._path.read_bytes())
            rows = {str(digest): str(owner) for digest, owner in body["used"].items()}
        except OSError as error:
            raise StorageError(f"can't read {self._path}: {error.strerror}", hint=remedy(error)) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(
                f"{self._path} is damaged",
                hint="It knows which claims were given: with new claims, in another file, none is given twice.",
            ) from error
        return rows


def _text(rows: Mapping[str, str]) -> bytes:
    return (json.dumps({"used": dict(sorted(rows.items()))}, indent=1) + "\n").encode()


def read_claims(path: Path) -> tuple[str, ...]:
    """The claims of a file, one a line.

    Raises:
        JoinError: A line is none, or there twice.
        StorageError: It can't be read.
    """
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
