"""A backup's manifest: the job that was backed up, and the backup's files, each by its digest.

A state folder also notes its last backup, and the backup that it was restored from; backups contain neither note.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from fedprune.core.atomic_file import write_atomically
from fedprune.core.disk import read_file
from fedprune.core.errors import StorageError, value_text
from fedprune.core.records import Digest, decode_record, encode_record, number_range, pattern_text
from fedprune.core.validation import MAX_INT, is_digest, is_number

FORMAT = "fedprune.backup/1"
NAME = "manifest.json"
DATABASE = "server.db"
# The console's accounts and audit log. Its database is one of its own: the console's process may not open the server's.
CONSOLE = "console.db"

BACKED_UP, RESTORED = "backed-up.json", "restored.json"
# A manifest comes from a disk that anyone may have written to, and its paths are joined to the new folder's: only these
# are accepted.
_PATH = pattern_text(
    r"server\.db|console\.db|model\.onnx|identity/[a-z]+(\.[a-z]+)?|(blobs|releases)/[0-9a-f]{2}/[0-9a-f]{64}",
    "a file of a state folder",
)


@dataclass(frozen=True)
class BackupEntry:
    """A file of a state folder: its path there, its digest and its bytes."""

    path: Annotated[str, _PATH]
    sha256: Digest
    size: Annotated[int, number_range(0, MAX_INT)]

    def __post_init__(self) -> None:
        digest_in_name = self.path.rpartition("/")[2]
        if is_digest(digest_in_name) and digest_in_name != self.sha256:
            raise StorageError("a backup's manifest: digest of a file", expected=digest_in_name, got=self.sha256)

    @property
    def is_blob(self) -> bool:
        return self.path.startswith("blobs/")

    @property
    def backup_path(self) -> str:
        """The file's path in the backup, which is named by the digest."""
        return self.path if self.is_blob else f"files/{self.sha256}"

    @property
    def is_private(self) -> bool:
        return not self.is_blob and self.path != "model.onnx"


@dataclass(frozen=True)
class BackupManifest:
    """A backup.

    Attributes:
        model: Digest of the model's file with which the job began.
        at: When the backup was made, in seconds since 1970.
        origin: The machine and the state folder.
    """

    job: str
    model: str
    round: int
    at: int
    version: str
    entries: tuple[BackupEntry, ...]
    origin: str
    format: Annotated[str, pattern_text(re.escape(FORMAT), FORMAT)] = FORMAT

    @property
    def size(self) -> int:
        return sum(e.size for e in self.entries)

    @property
    def has_identity(self) -> bool:
        return any(e.path.startswith("identity/") for e in self.entries)

    @property
    def database(self) -> BackupEntry:
        return next(e for e in self.entries if e.path == DATABASE)

    def digest(self) -> str:
        return hashlib.sha256(encode_record(self)).hexdigest()

    def to_bytes(self) -> bytes:
        return encode_record(_File(self.digest(), self))

    @classmethod
    def parse(cls, raw: bytes, where: str) -> BackupManifest:
        """Read what `to_bytes` wrote; raises `StorageError` if it is damaged, or of another version."""
        file = decode_record(_File, raw, where, StorageError)
        paths = [e.path for e in file.manifest.entries]
        if file.manifest.digest() != file.digest or len(set(paths)) != len(paths) or DATABASE not in paths:
            raise StorageError(f"{where} is damaged", hint="Take another backup.")
        return file.manifest


@dataclass(frozen=True)
class _File:
    digest: Digest
    manifest: BackupManifest


def record_backup(folder: Path, now: float | None = None) -> None:
    """Note that a backup was made. If the folder can't be written to, nothing is noted: the backup is good."""
    with suppress(OSError):
        write_atomically(folder / BACKED_UP, json.dumps({"at": time.time() if now is None else now}).encode())


def last_backup(folder: Path) -> float | None:
    """When the last backup was made, in seconds since 1970; None if unknown."""
    try:
        at = json.loads(read_file(folder / BACKED_UP))["at"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(at) if is_number(at) else None


def record_restore(folder: Path, manifest: BackupManifest) -> None:
    """Note of which backup a folder was restored."""
    body = {"at": int(time.time()), "backup_at": manifest.at, "origin": manifest.origin}
    write_atomically(folder / RESTORED, json.dumps(body).encode())


def restore_text(folder: Path) -> str:
    """A sentence on the backup from which a folder was restored, and when; empty if it wasn't."""
    with suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        body = json.loads(read_file(folder / RESTORED))
        at, backup_at = _local_minute(body["at"]), _local_minute(body["backup_at"])
        origin = body["origin"]
        source = "" if not origin else f" of {origin if str(origin).isprintable() else value_text(origin)}"
        return f"restored on {at} from a backup{source} made on {backup_at}"
    return ""


def _local_minute(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
