"""Notes in a state folder of its last backup, and of the backup that it was restored from; backups contain neither."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import shown
from fedprune.core.validation import is_number
from fedprune_server.maintenance.backup_manifest import Manifest

FILE, RESTORED = "backed-up.json", "restored.json"


def record_backup(folder: Path, now: float | None = None) -> None:
    """Note that a backup was made; where the folder can't be written to, nothing is noted."""
    with suppress(OSError):
        write_whole(folder / FILE, json.dumps({"at": time.time() if now is None else now}).encode())


def last_backup(folder: Path) -> float | None:
    """When that was, in seconds since 1970; None if unknown."""
    try:
        at = json.loads((folder / FILE).read_bytes())["at"]
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
