"""Parquet files and their columns by name, for code that must not import pyarrow, which is an extra."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PARQUET_SUFFIX = ".parquet"


@dataclass(frozen=True)
class ParquetColumns:
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


def parquet_files_of(folder: Path) -> list[Path]:
    """Parquet files of a folder, or else of its folder `data`, sorted by name."""
    for candidate in (folder, folder / "data"):
        if files := sorted(f for f in candidate.glob(f"*{PARQUET_SUFFIX}") if f.is_file()):
            return files
    return []
