"""The note in a restored state folder that names its backup; backups don't contain it."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import shown
from fedprune_server.maintenance.backup_manifest import Manifest

FILE = "restored.json"


def record_restore(folder: Path, manifest: Manifest) -> None:
    """Note of which backup a folder was restored.

    Raises:
        StorageError: The disk fails or is full.
    """
    body = {"at": int(time.time()), "backup_at": manifest.at, "origin": manifest.origin}
    write_whole(folder / FILE, json.dumps(body).encode())


def restored_from(folder: Path) -> str:
    """Of which backup a folder was restored and when, in words; empty where it wasn't."""
    with suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        body = json.loads((folder / FILE).read_bytes())
        at, backup_at = _day(body["at"]), _day(body["backup_at"])
        origin = body["origin"]
        source = "" if not origin else f" of {origin if str(origin).isprintable() else shown(origin)}"
        return f"restored on {at} from a backup{source} made on {backup_at}"
    return ""


def _day(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(at))
