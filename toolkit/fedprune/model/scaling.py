"""The scale of a board's numbers, as a recipe has it: `board`, or a column's mean and deviation, `heat:21.5:4`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedprune.core import validation
from fedprune.core.errors import ConfigError, value_text

BOARD = "board"  # each board takes mean and deviation of its own training samples

_SETTING = ("recipe", "scaling")
_MAX_COLUMNS = 4096


@dataclass(frozen=True)
class ColumnScale:
    """The mean and deviation of a column: a model takes (number - mean) / deviation. `name` is in lower case."""

    name: str
    mean: float
    deviation: float

    @classmethod
    def parse(cls, text: object) -> ColumnScale:
        """Read an entry; raises `ConfigError` unless it has a name, a number, and a number above 0."""
        name, *numbers = str(text).rsplit(":", 2)
        try:
            mean, deviation = map(float, numbers)
        except ValueError:
            mean, deviation = math.nan, math.nan
        if not name.strip() or not math.isfinite(mean) or not 0 < deviation < math.inf:
            expected = f"'{BOARD}' alone, or COLUMN:MEAN:DEVIATION for each column, with deviations above 0"
            raise ConfigError(_SETTING, expected=expected, got=value_text(text))
        return cls(name.strip().lower(), mean, deviation)

    def __str__(self) -> str:
        return f"{self.name}:{self.mean:.9g}:{self.deviation:.9g}"


def check_scaling(value: object) -> tuple[str, ...]:
    """A recipe's scaling as texts. Raises `ConfigError` if it is none, or a column has two scales."""
    entries = tuple(
        validation.check_items(_SETTING, value, _MAX_COLUMNS, "scales, such as ['heat:21.5:4'], or ['board']")
    )
    if entries == (BOARD,):
        return entries
    names = [ColumnScale.parse(entry).name for entry in entries]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(_SETTING, expected="one scale for each column", got=f"two for {value_text(name)}")
    return entries
