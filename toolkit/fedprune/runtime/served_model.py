"""The model that a board serves, read from its state folder for use elsewhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fedprune.core.disk import file_digest
from fedprune.core.errors import StorageError
from fedprune.runtime.bundle import INFERENCE, WEIGHTS

_FOLDER = "serving"
_POINTER = "serving.json"
_SLOTS = ("a", "b")


@dataclass(frozen=True)
class ServedModel:
    """A board's active model: the folder of its inference graph and weights, and the job and round of its origin."""

    folder: Path
    job: str
    round: int


def is_board_state(folder: Path) -> bool:
    """Whether a folder is the state folder of a board that serves, or has served, a model."""
    return (folder / _FOLDER / _POINTER).is_file()


def load_served_model(state: Path) -> ServedModel:
    """The newest model of a board's state folder whose files are intact. The board may be running. Raises
    `StorageError` if the folder has no such model."""
    pointer = state / _FOLDER / _POINTER
    try:
        rows = json.loads(json.loads(pointer.read_bytes())["body"])["models"]
        for row in rows:
            folder = state / _FOLDER / str(row["slot"])
            model = ServedModel(folder, str(row["job"]), int(row["round"]))
            # Only the board's own two slots: the file is input, and must not lead elsewhere on the disk.
            if row["slot"] in _SLOTS and _is_intact(folder, row["files"]):
                return model
    except OSError as error:
        raise StorageError(f"can't read {pointer}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StorageError(f"{pointer} is damaged ({type(error).__name__}: {error})") from error
    raise StorageError(f"{state} has no model that is intact", hint="Let the board finish another round first.")


def _is_intact(folder: Path, files: dict[str, str]) -> bool:
    try:
        return all(file_digest(folder / name) == files[name] for name in (INFERENCE, WEIGHTS))
    except OSError:
        return False
