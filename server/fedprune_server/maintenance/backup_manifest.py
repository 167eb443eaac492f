"""What a backup's first file says: of which job it is, and what belongs to it, each file by its digest."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any

from fedprune.core.errors import StorageError, shown
from fedprune.core.validation import is_digest

FORMAT = "fedprune.backup/1"
NAME = "manifest.json"
DATABASE = "server.db"
CONSOLE = "console.db"
"""The console's accounts and audit log."""

_MAX_BYTES = 64 * 2**20
_PATH = re.compile(
    r"server\.db|console\.db|model\.onnx|identity/[a-z]+(\.[a-z]+)?|releases/rollouts\.db|(?:blobs|releases)/[0-9a-f]{2}/[0-9a-f]{64}"
)


@dataclass(frozen=True)
class Entry:
    """A file of a state folder.

    Attributes:
        path: Where it lies in the state folder.
        sha256: What it holds.
        size: Its bytes.
    """

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        named = self.path.rpartition("/")[2]
        good = (
            isinstance(self.path, str)
            and _PATH.fullmatch(self.path) is not None
            and is_digest(self.sha256)
            and isinstance(self.size, int)
            and not isinstance(self.size, bool)
            and self.size >= 0
            and (named == self.sha256 or not is_digest(named))
        )
        if not good:
            raise StorageError("a backup's manifest: entry", expected="path, sha256 and size", got=shown(self.path))

    @property
    def blob(self) -> bool:
        """Whether it is one of the job's blobs."""
        return self.path.startswith("blobs/")

    @property
    def place(self) -> str:
        """Where it lies in the backup: named by what it holds."""
        return self.path if self.blob else f"files/{self.sha256}"

    @property
    def private(self) -> bool:
        """Whether only its owner may read it."""
        return not self.blob and self.path != "model.onnx"


@dataclass(frozen=True)
class Manifest:
    """A backup.

    Attributes:
        job: The job's name.
        model: Digest of the model's file with which the job began.
        round: The round in which the job was.
        at: When the backup was made, in seconds since 1970.
        version: Of which version of the program.
        entries: Its files.
        origin: Machine and state folder that it was made of; empty where an earlier version made it.
    """

    job: str
    model: str
    round: int
    at: int
    version: str
    entries: tuple[Entry, ...]
    origin: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(e.size for e in self.entries)

    @property
    def has_identity(self) -> bool:
        """Whether the server's private keys are among them."""
        return any(e.path.startswith("identity/") for e in self.entries)

    @property
    def has_operators(self) -> bool:
        """Whether the console's accounts are among them."""
        return any(e.path == CONSOLE for e in self.entries)

    @property
    def database(self) -> Entry:
        """The database's copy."""
        return next(e for e in self.entries if e.path == DATABASE)

    def digest(self) -> str:
        """A digest of all that it says."""
        return hashlib.sha256(_text(self._body())).hexdigest()

    def to_bytes(self) -> bytes:
        """As a file."""
        return _text({**self._body(), "digest": self.digest()})

    def _body(self) -> dict[str, Any]:
        body = {"format": FORMAT, **vars(self), "entries": [vars(e) for e in self.entries]}
        if not self.origin:
            del body["origin"]
        return body

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Manifest:
        """Read what `to_bytes` wrote.

        Args:
            raw: The file's bytes.
            where: Its name, for errors.

        Raises:
            StorageError: It is damaged, or of another version.
        """
        try:
            if len(raw) > _MAX_BYTES:
                raise ValueError("too long")
            body = json.loads(raw)
            digest, format_ = body.pop("digest"), body.pop("format")
            if format_ != FORMAT:
                raise StorageError(f"{where} is of another version", expected=FORMAT, got=shown(format_))
            found = cls(**{**body, "entries": tuple(Entry(**e) for e in body["entries"])})
            paths = [e.path for e in found.entries]
            if found.digest() != digest or len(set(paths)) != len(paths) or DATABASE not in paths:
                raise ValueError("its digest is another")
        except StorageError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise StorageError(f"{where} is damaged ({error})", hint="Take another backup.") from error
        return found


def _text(body: dict[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
