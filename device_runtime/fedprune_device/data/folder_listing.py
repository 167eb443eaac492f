"""Lists folders and files of samples, without hidden ones and those that operating systems make."""

from __future__ import annotations

import re
from pathlib import Path

from fedprune.core.disk import storage_errors

# File systems (lost+found, FOUND.000), Windows, macOS, Android, and network storage by Synology and QNAP.
_SYSTEM_NAMES = re.compile(
    r"\..*|lost\+found|found\.\d{3}|lost\.dir|\$recycle\.bin|recycler|system volume information|__macosx|"
    r"network trash folder|temporary items|@.*|#recycle|#snapshot|__pycache__",
    re.IGNORECASE,
)

_MAX_LEVELS = 4  # of nested folders; links may lead round in circles


def is_system_name(name: str) -> bool:
    """Whether a file or folder of this name is hidden, or made by an operating system."""
    return _SYSTEM_NAMES.fullmatch(name) is not None


def folders_in(root: Path, names: tuple[str, ...] = ()) -> list[Path]:
    """The folders in a folder, sorted, without those of operating systems unless `names` has them; raises
    `StorageError`."""
    with storage_errors(f"can't read {root}"):
        return sorted(p for p in root.iterdir() if (p.name in names or not is_system_name(p.name)) and p.is_dir())


def folders_below(root: Path, levels: int = _MAX_LEVELS) -> list[Path]:
    """A folder and those in it, on several levels; raises `StorageError`."""
    inner = folders_in(root) if levels else []
    return [root, *(below for folder in inner for below in folders_below(folder, levels - 1))]


def files_in(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files of a folder by their endings, sorted, without hidden ones; raises `StorageError`."""
    with storage_errors(f"can't read {folder}"):
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in endings and not p.name.startswith("."))
