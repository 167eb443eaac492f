"""When a state folder was backed up last, as far as it knows: a note in the folder, which no backup has itself."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

from fedprune.core.atomic_file import write_whole
from fedprune.core.validation import is_number

FILE = "backed-up.json"


def record_backup(folder: Path, now: float | None = None) -> None:
    """Note that a backup was made; where the folder can't be written to, nothing is noted."""
    with suppress(OSError):
        write_whole(folder / FILE, json.dumps({"at": time.time() if now is None else now}).encode())


def last_backup(folder: Path) -> float | None:
    """When that was, in seconds since 1970; None where nothing is known."""
    try:
        at = json.loads((folder / FILE).read_bytes())["at"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return float(at) if is_number(at) else None
