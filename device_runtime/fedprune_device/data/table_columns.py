"""Tells by their names which columns of a table are inputs, numbers to predict (targets), and classes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError

CLASS = "class"  # the column of classes
CLASSES = (CLASS, "label")  # its names, in any case
TARGET = "target"  # what names of columns to predict begin with, in any case
SKIPPED = ("", "time", "timestamp", "date", "datetime")  # names of columns with times, or with the rows' numbers
_INDEX = re.compile(r"unnamed: 0|__index_level_\d+__")  # an index without a name, as pandas writes it
_MAX_COLUMNS = 4096


@dataclass(frozen=True)
class TableColumns:
    """The columns of a table by their role, each as its index in the file. Rows are read in the order of `all`."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    classes: tuple[int, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> TableColumns:
        """Raises `DataError` if names are missing, twice there, or there are too many."""
        lower_names = [name.lower() for name in names]
        used_columns = [i for i, name in enumerate(lower_names) if name not in SKIPPED and not _INDEX.fullmatch(name)]
        if len(names) > _MAX_COLUMNS:
            raise DataError("columns", expected=f"at most {_MAX_COLUMNS}", got=len(names))
        for column in used_columns:
            if (first := names.index(names[column])) != column:
                raise DataError(
                    "names of columns",
                    expected="different ones",
                    got=f"that of column {first + 1} for {column + 1}, too",
                )
        if used_columns and all(is_number(names[column].replace(",", ".")) for column in used_columns):
            raise DataError("the first row", expected="names of columns", got="numbers")
        classes = tuple(column for column in used_columns if lower_names[column] in CLASSES)
        if len(classes) > 1:
            column_texts = " and ".join(str(column + 1) for column in classes)
            hint = f"The others are inputs under another name, or left out: the one is called {CLASS}."
            raise DataError("columns of classes", expected="one", got=f"columns {column_texts}", hint=hint)
        targets = tuple(column for column in used_columns if lower_names[column].startswith(TARGET))
        inputs = tuple(column for column in used_columns if column not in targets + classes)
        if not inputs:
            raise DataError("columns", expected="some of numbers to read", got="none")
        return cls(inputs, targets, classes)

    @property
    def all(self) -> tuple[int, ...]:
        return self.inputs + self.targets + self.classes


OpenTable = tuple[TableColumns, Iterator[npt.NDArray[np.float32]]]  # a table's columns, and its rows in blocks


def is_number(cell: Any) -> bool:
    try:
        return bool(np.isfinite(float(cell))) and not (isinstance(cell, str) and "_" in cell)
    except (ValueError, TypeError, OverflowError):
        return False
