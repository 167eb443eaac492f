"""Reads a table's column of times: ISO 8601 and other dates, seconds or milliseconds since 1970, times of a day."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError
from fedprune.core.median import median
from fedprune_device.data.table_cells import RowPlaces
from fedprune_device.data.table_columns import DATE, MOMENT, TIME, is_missing, is_number

Times = npt.NDArray[np.float64]  # seconds; NaN where a row has none

_CLOCK = r"(?P<h>\d{1,2}):(?P<m>\d{2})(?::(?P<s>\d{2})(?:[.,](?P<f>\d{1,9}))?)?(?:\s*(?P<half>[AaPp])\.?[Mm]\.?)?"
_ZONE = r"\s*(?P<zone>Z|z|[A-Z]{3,5}|[+-]\d{2}(?::?\d{2})?)?(?:\[[\w/+-]+\])?"
_MOMENT = rf"(?:(?:[Tt,]?\s*|\s+){_CLOCK})?{_ZONE}"
_YEAR, _MONTH, _DAY = r"(?P<y>\d{4})", r"(?P<mo>\d{1,2})", r"(?P<d>\d{1,2})"
_SHORT_YEAR, _NAMED_MONTH = r"(?P<y>\d{2})", r"(?P<mo>[A-Za-z]{3})[a-z]*\.?"
_WEEKDAY = r"(?:[A-Z][a-z]{2,8},?\s+)?"
_DATED = {
    "dates with the year first": rf"{_YEAR}(?P<mark>[-/.]){_MONTH}(?P=mark){_DAY}",
    "dates with the day first": rf"{_DAY}(?P<mark>[-/.]){_MONTH}(?P=mark){_YEAR}",
    "dates with the month first": rf"{_MONTH}(?P<mark>[-/.]){_DAY}(?P=mark){_YEAR}",
    "dates with the day first and a short year": rf"{_DAY}(?P<mark>[-/.]){_MONTH}(?P=mark){_SHORT_YEAR}",
    "dates with the month first and a short year": rf"{_MONTH}(?P<mark>[-/.]){_DAY}(?P=mark){_SHORT_YEAR}",
    "dates with a short year first": rf"{_SHORT_YEAR}(?P<mark>[-/.]){_MONTH}(?P=mark){_DAY}",
    "dates with the name of the month": rf"{_WEEKDAY}{_DAY}[-/ ]{_NAMED_MONTH}[-/ ]{_YEAR}",
    "dates with the name of the month first": rf"{_WEEKDAY}{_NAMED_MONTH} {_DAY},? {_YEAR}",
}
_FORMATS = {name: re.compile(text + _MOMENT) for name, text in _DATED.items()} | {
    "dates without separators": re.compile(r"(?P<y>(?:19|20)\d{2})(?P<mo>\d{2})(?P<d>\d{2})"
        r"(?:[Tt]?(?P<h>\d{2})(?P<m>\d{2})(?P<s>\d{2})(?:[.,](?P<f>\d{1,9}))?)?" + _ZONE),
    "times of a day, or durations": re.compile(
        r"(?:(?P<days>\d{1,6}) days? )?(?P<h>\d{1,6}):(?P<m>\d{2}):(?P<s>\d{2})(?:[.,](?P<f>\d{1,9}))?"),
    "times of a day": re.compile(_CLOCK),
    "minutes and seconds": re.compile(r"(?P<m>\d{1,2}):(?P<s>\d{2})[.,](?P<f>\d{1,9})"),
}  # fmt: skip
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_UNITS = (
    (1e17, 1e-9, "nanoseconds"),
    (1e14, 1e-6, "microseconds"),
    (1e11, 1e-3, "milliseconds"),
    (0.0, 1.0, "seconds"),
)
_FORMAT_HINT = "Write all times alike, such as 2024-01-31T13:45:00Z, or as seconds since 1970."
_ROWS_FOR_FORMAT = 2**12  # rows by which the format is chosen


class TimeReader:
    """Reads the times of a table. The first rows choose the column and the format, which all others must have.

    `candidates` are columns in the order of preference; two together are a date and a time of its day.
    """

    def __init__(self, candidates: Sequence[tuple[int, ...]], index: int | None) -> None:
        self._candidates, self._index = candidates, index
        self._chosen: tuple[int, ...] | None = None
        self._parse: Callable[[list[Any]], Times | None] = lambda cells: None
        self._is_undecided = True
        self.note = ""

    def __call__(self, cells: Mapping[int, Any], places: RowPlaces) -> Times | None:
        """The times of some rows, from the cells of each column; None if no column can be read as times.

        Raises `DataError` for a cell that hasn't the format of those before; `places` are those of the rows.
        """
        if self._is_undecided:
            self._is_undecided = False
            self._choose(cells)
        if self._chosen is None:
            return None
        column = _combine_columns([cells[index] for index in self._chosen])
        times = self._parse(column)
        if times is None:
            bad = next(i for i in range(len(column)) if self._parse(column[i : i + 1]) is None)
            where = places.text(bad, self._chosen[0])
            raise DataError(where, expected="a time as in the rows before", got="another format", hint=_FORMAT_HINT)
        return times

    def _choose(self, cells: Mapping[int, Any]) -> None:
        for columns in self._candidates:
            column = _combine_columns([cells[index][:_ROWS_FOR_FORMAT] for index in columns])
            chosen = _format_of(column, dates_alone=columns == (self._index,))
            if chosen is not None:
                self._chosen, (self._parse, text) = columns, chosen
                where = " and ".join(str(index + 1) for index in columns)
                self.note = f"the times are in column {where}: {text}"
                return
        if [columns for columns in self._candidates if columns != (self._index,)]:
            self.note = "no column of times could be read: rows count as evenly spaced, in the order of the file"


def _combine_columns(columns: list[Any]) -> list[Any]:
    """One column of cells; a date and a time of the day become one text, or one number of seconds."""
    if len(columns) == 1:
        return list(columns[0])
    return [
        a + b if isinstance(a, float) and isinstance(b, float) else "" if is_missing(a) or is_missing(b) else f"{a} {b}"
        for a, b in zip(*columns, strict=True)
    ]


def _format_of(cells: list[Any], *, dates_alone: bool) -> tuple[Callable[[list[Any]], Times | None], str] | None:
    """How these cells are read as times, and in words; None if they aren't times. `dates_alone`: numbers aren't.

    If no format fits all cells, it is the first one's, so that another one later is an error.
    """
    filled_cells = [cell for cell in cells if not is_missing(cell)]
    if not filled_cells:
        return None
    fitting_formats: dict[str, Times] = {}
    for name, pattern in _FORMATS.items():
        if name in _DATED or not dates_alone:
            times = _parse_texts(pattern, filled_cells)
            if times is not None:
                fitting_formats[name] = times
    if fitting_formats:
        return _closest(fitting_formats)
    if dates_alone:
        return None
    filled_cells = [_with_point(cell) for cell in filled_cells]
    if not all(map(is_number, filled_cells)):
        return _format_of(filled_cells[:1], dates_alone=False) if len(filled_cells) > 1 else None
    typical = median([abs(float(cell)) for cell in filled_cells])
    _, factor, unit = next(row for row in _UNITS if typical >= row[0])
    return (lambda some: _parse_numbers(some, factor)), f"numbers, read as {unit}"


def _closest(fitting_formats: dict[str, Times]) -> tuple[Callable[[list[Any]], Times | None], str]:
    """Of formats that fit, as day and month may be either way round, the one by which rows follow each other closer."""

    def jumps(times: Times) -> tuple[int, float]:
        steps = np.diff(times)
        return min(int((steps < 0).sum()), int((steps > 0).sum())), float(np.abs(steps).sum())

    ranked_names = sorted(fitting_formats, key=lambda name: jumps(fitting_formats[name]))
    best = ranked_names[0]
    is_tied = len(ranked_names) > 1 and jumps(fitting_formats[best]) == jumps(fitting_formats[ranked_names[1]])
    pattern = _FORMATS[best]
    return (lambda cells: _parse_texts(pattern, cells)), best + ", which the first rows don't prove" * (
        is_tied and best in _DATED
    )


def time_kind(cell: object) -> str:
    """Whether a cell is a text with a `MOMENT`, a `DATE` alone or a `TIME` of the day; empty if it is none."""
    if not isinstance(cell, str) or is_missing(cell):
        return ""
    if any(_parse_texts(_FORMATS[name], [cell]) is not None for name in _DATED):
        return MOMENT if ":" in cell else DATE
    return TIME if _parse_texts(_FORMATS["times of a day"], [cell]) is not None else ""


def _parse_numbers(cells: list[Any], factor: float) -> Times | None:
    out = np.full(len(cells), np.nan)
    for i, cell in enumerate(map(_with_point, cells)):
        if is_number(cell):
            out[i] = float(cell) * factor
        elif not is_missing(cell):
            return None
    return out


def _with_point(cell: Any) -> Any:
    return cell.replace(",", ".") if isinstance(cell, str) else cell


def _parse_texts(pattern: re.Pattern[str], cells: list[Any]) -> Times | None:
    out = np.full(len(cells), np.nan)
    for i, cell in enumerate(cells):
        if is_missing(cell):
            continue
        match = pattern.fullmatch(str(cell).strip())
        seconds = None if match is None else _seconds(match.groupdict())
        if seconds is None:
            return None
        out[i] = seconds
    return out


def _seconds(parts: dict[str, str | None]) -> float | None:
    hour, minute, second = int(parts.get("h") or 0), int(parts.get("m") or 0), int(parts.get("s") or 0)
    if half := parts.get("half"):
        if not 1 <= hour <= 12:
            return None
        hour = hour % 12 + 12 * (half in "Pp")
    if (hour > 24 and "days" not in parts) or minute > 59 or second > 60:
        return None
    fraction = parts.get("f")
    out = 3600 * hour + 60 * minute + second + (float(f"0.{fraction}") if fraction else 0.0)
    out += 86_400 * int(parts.get("days") or 0)
    if "y" in parts:
        day = _day_number(parts["y"], parts["mo"], parts["d"])
        if day is None:
            return None
        out += 86_400 * day
    zone = parts.get("zone") or ""
    if zone[:1] in ("+", "-"):
        offset = 3600 * int(zone[1:3]) + 60 * int(zone[3:].lstrip(":") or 0)
        out -= offset if zone[0] == "+" else -offset
    return out


@lru_cache(maxsize=64)
def _day_number(year: str | None, month: str | None, day: str | None) -> int | None:
    """Days since 1970-01-01; None if there is no such day."""
    number = str(month)
    if number[:1].isalpha():
        number = str(_MONTHS.index(number.lower()) + 1 if number.lower() in _MONTHS else 0)
    full_year = int(year or 0) + (2000 if len(year or "") == 2 else 0)
    try:
        return dt.date(full_year, int(number), int(day or 0)).toordinal() - dt.date(1970, 1, 1).toordinal()
    except ValueError:
        return None
