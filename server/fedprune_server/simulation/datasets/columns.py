"""What is known of Arrow and Parquet files before pyarrow, which an extra brings, reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

ENDINGS = (".arrow", ".parquet")

SPLITS, STATE = "dataset_dict.json", "state.json"
"""Written by `DatasetDict.save_to_disk` and `Dataset.save_to_disk` (datasets/arrow_dataset.py)."""


@dataclass(frozen=True)
class Columns:
    """Which columns of a table are read.

    Attributes:
        x: The inputs: one column of images or of lists of numbers, or several of numbers.
        y: The labels.
        owner: Whose sample it is; empty without owners.
    """

    x: tuple[str, ...] = ("image",)
    y: str = "label"
    owner: str = ""

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys([*self.x, self.y, *([self.owner] if self.owner else [])]))


def has_arrow(folder: Path) -> bool:
    """Whether a folder was saved by `datasets`, or holds Arrow or Parquet files."""
    return any((folder / name).is_file() for name in (SPLITS, STATE)) or bool(files_of(folder))


def files_of(folder: Path) -> list[Path]:
    """Arrow and Parquet files of a folder, or else of its folder `data`, sorted by name."""
    for place in (folder, folder / "data"):
        if files := sorted(f for f in place.glob("*") if f.suffix in ENDINGS and f.is_file()):
            return files
    return []
