"""Where the jobs lie that a server runs beside its first one: `jobs/NAME` in its state folder."""

from __future__ import annotations

from pathlib import Path

from fedprune.core.disk import storage_errors

FOLDER = "jobs"


def folders(state: Path) -> list[Path]:
    """Folders of the further jobs of a state folder, by name.

    Raises:
        StorageError: They can't be read.
    """
    root = state / FOLDER
    with storage_errors(f"can't read {root}"):
        found = [p for p in root.iterdir() if not p.name.startswith(".")] if root.is_dir() else []
    return sorted(p for p in found if p.is_dir())
