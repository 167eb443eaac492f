"""A backup's first file, its manifest: of which job it is, and which files belong to it, each by its digest.

A state folder notes its last backup, and the backup that it was restored from; backups contain neither note.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import StorageError, shown
from fedprune.core.validation import is_digest, is_number, is_whole

FORMAT = "fedprune.backup/1"
NAME = "manifest.json"
DATABASE = "server.db"
CONSOLE = "console.db"
"""The console's accounts and audit log."""

BACKED_UP, RESTORED = "backed-up.json", "restored.json"
_MAX_BYTES = 64 * 2**20
_PATH = re.compile(
    r"server\.db|console\.db|model\.onnx|identity/[a-z]+(\.[a-z]+)?|releases/rollouts\.db|(?:blobs|releases)/[0-9a-f]{2}/[0-9a-f]{64}"
)


@dataclass(frozen=True)
class Entry:
    """A file of a state folder: its path there, its digest and its bytes."""

    path: str
    sha256: str
    size: int

    def __post_init__(self) -> None:
        named = self.path.rpartition("/")[2] if isinstance(self.path, str) else ""
        good = (
            named != ""
            and _PATH.fullmatch(self.path) is not None
            and is_digest(self.sha256)
            and is_whole(self.size)
            and (named == self.sha256 or not is_digest(named))
        )
        if not good:
            raise StorageError("a backup's manifest: entry", expected="path, sha256 and size", got=shown(self.path))

    @property
    def blob(self) -> bool:
        return self.path.startswith("blobs/")

    @property
    def place(self) -> str:
        """Where it is in the backup: named by its digest."""
        return self.path if self.blob else f"files/{self.sha256}"

    @property
    def private(self) -> bool:
        return not self.blob and self.path != "model.onnx"


@dataclass(frozen=True)
class Manifest:
    """A backup.

    Attributes:
        model: Digest of the model's file with which the job began.
        at: When the backup was made, in seconds since 1970.
        version: Of the program.
        origin: Machine and state folder that it was made of.
    """

    job: str
    model: str
    round: int
    at: int
    version: str
    entries: tuple[Entry, ...]
    origin: str

    @property
    def size(self) -> int:
        return sum(e.size for e in self.entries)

    @property
    def has_identity(self) -> bool:
        return any(e.path.startswith("identity/") for e in self.entries)

    @property
    def has_operators(self) -> bool:
        return any(e.path == CONSOLE for e in self.entries)

    @property
    def database(self) -> Entry:
        return next(e for e in self.entries if e.path == DATABASE)

    def digest(self) -> str:
        return hashlib.sha256(_text(self._body())).hexdigest()

    def to_bytes(self) -> bytes:
        return _text({**self._body(), "digest": self.digest()})

    def _body(self) -> dict[str, Any]:
        return {"format": FORMAT, **vars(self), "entries": [vars(e) for e in self.entries]}

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Manifest:
        """Read what `to_bytes` wrote; raises `StorageError` if it is damaged, or of another version."""
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


def record_backup(folder: Path, now: float | None = None) -> None:
    """Note that a backup was made; where the folder can't be written to, nothing is noted."""
    with suppress(OSError):
        write_whole(folder / BACKED_UP, json.dumps({"at": time.time() if now is None else now}).encode())


def last_backup(folder: Path) -> float | None:
    """When that was, in seconds since 1970; None if unknown."""
    try:
        at = json.loads((folder / BACKED_UP).read_bytes())["at"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(at) if is_number(at) else None


def record_restore(folder: Path, manifest: Manifest) -> None:
    """Note of which backup a folder was restored."""
    body = {"at": int(time.time()), "backup_at": manifest.at, "origin": manifest.origin}
    write_whole(folder / RESTORED, json.dumps(body).encode())


def restored_from(folder: Path) -> str:
    """Of which backup a folder was restored and when, in words; empty where it wasn't."""
    with suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        body = json.loads((folder / RESTORED).read_bytes())
        at, backup_at = _day(body["at"]), _day(body["backup_at"])
        origin = body["origin"]
        source = "" if not origin else f" of {origin if str(origin).isprintable() else shown(origin)}"
        return f"restored on {at} from a backup{source} made on {backup_at}"
    return ""


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
