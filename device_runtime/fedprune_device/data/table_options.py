"""How a board reads a table; parsing these options loads no numpy."""

from __future__ import annotations

from dataclasses import dataclass

from fedprune.core.errors import ConfigError

MISSING = ("error", "hold", "mean", "drop")  # what is done about a missing number


@dataclass(frozen=True)
class TableOptions:
    """How a table is read.

    Attributes:
        missing: What is done about a missing number, one of `MISSING`: `error`, `hold` the number before it, take the
            `mean` of the training rows, or `drop` the windows that have one. Classes are never filled.
        step: Seconds between two rows; None for the median of the table's own steps.
        columns: The names of the columns that are inputs, in the model's order and in any case; empty for all.
    """

    missing: str = "error"
    step: float | None = None
    columns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.missing not in MISSING:
            raise ConfigError("missing numbers of a table", expected=", ".join(MISSING), got=self.missing)
        if self.step is not None and not 0 < self.step < 1e10:
            raise ConfigError("step of a table", expected="seconds above 0", got=self.step)
        names = [name.strip().lower() for name in self.columns]
        if len(set(names)) < len(names):
            raise ConfigError("columns of a table", expected="different names", got=", ".join(self.columns))

    @property
    def allows_missing(self) -> bool:
        """Whether numbers may be missing."""
        return self.missing != MISSING[0]
