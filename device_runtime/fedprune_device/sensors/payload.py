"""Reads what sensors publish: JSON objects, plain numbers, states, and the words for a value that isn't there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from typing import Any, TypeVar

from fedprune.core.validation import is_number
from fedprune_device.data.table_columns import is_missing
from fedprune_device.data.table_columns import is_number as is_number_text

_MAX_BYTES = 2**16  # of a message: readings have some hundred bytes, pictures of cameras megabytes
_MAX_LABEL = 200  # characters of a class's name
_STATES = {"on": 1.0, "off": 0.0, "true": 1.0, "false": 0.0}
_ONLINE, _OFFLINE = ("online", "on", "true", "1"), ("offline", "off", "false", "0")
_MILLISECONDS_FROM = 1e11  # larger numbers of a clock are milliseconds: in seconds this is the year 5138

Path = tuple[str, ...]  # names from the outermost object of a message; none for a message that is the value itself

T = TypeVar("T")


class ReadingError(Exception):
    """A message without a usable value; its text is the reason, in a few words for a count."""


class NoReadingError(ReadingError):
    """The sensor itself says that it has no value."""


@dataclass(frozen=True)
class Payload:
    """A message's bytes. What they mean is worked out once, however many channels read them."""

    body: bytes = field(repr=False)

    def value(self, path: Path) -> Any:
        """The value at a path: a text, a number, a truth value, an object or a list; raises `ReadingError`."""
        text = self._text
        if _is_no_value(text):
            raise NoReadingError("unavailable")
        value = self._document if path or text[:1] in ('"', "{", "[") else text
        if path and not isinstance(value, (dict, list)) and not _is_no_value(value):
            raise ReadingError("no JSON object")
        for name in path if isinstance(value, (dict, list)) else ():
            if isinstance(value, dict) and name in value:
                value = value[name]
            elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
                value = value[int(name)]
            else:
                raise ReadingError("messages without this value")
        if value is None or _is_no_value(value):
            raise NoReadingError("unavailable")
        return value

    def time(self, path: Path) -> float:
        """The time at a path, in seconds; raises `ReadingError`. A time without a zone counts as one of UTC."""
        value = self.value(path)
        if isinstance(value, str) and is_number_text(value):
            value = float(value)
        if is_number(value):
            return value / 1000 if abs(value) >= _MILLISECONDS_FROM else float(value)
        try:
            moment = datetime.fromisoformat(value.replace("Z", "+00:00"))  # Python 3.10 doesn't know Z
            return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()
        except (AttributeError, ValueError, OverflowError) as error:
            raise ReadingError("no time that can be read") from error

    def is_online(self) -> bool:
        """Whether a device's message of availability says that it is there; raises `ReadingError` for another one."""
        if not self.body:  # a retained message that was deleted
            raise ReadingError("no availability")
        value = self._document if self._text[:1] == "{" else self._text
        value = value.get("state") if isinstance(value, dict) else value
        word = str(value).strip().lower()
        if word not in _ONLINE + _OFFLINE:
            raise ReadingError("no availability")
        return word in _ONLINE

    @cached_property
    def _text(self) -> str:
        if len(self.body) > _MAX_BYTES:
            raise ReadingError(f"more than {_MAX_BYTES} bytes")
        try:
            return self.body.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ReadingError("no text") from error

    @cached_property
    def _document(self) -> Any:
        try:
            return json.loads(self._text)
        except (ValueError, RecursionError) as error:
            raise ReadingError("no JSON object") from error


def number_of(value: Any, numbers: Mapping[str, float]) -> float:
    """The number of a value: `numbers` has those of texts; raises `ReadingError`."""
    word = _word(value)
    number = _meaning(word, numbers)
    if number is None:
        number = float(word) if is_number_text(word) else _STATES.get(word.lower())
    if number is None:
        raise ReadingError("no number")
    return number


def label_of(value: Any, labels: Mapping[str, str | int]) -> str | int:
    """The class of a value, by number or name: `labels` has those of texts; raises `ReadingError`."""
    word = _word(value)
    if not word or len(word) > _MAX_LABEL:
        raise ReadingError("no class")
    label = _meaning(word, labels)
    if label is not None:
        return label
    if isinstance(value, (str, bool)):
        return word
    if not word.lstrip("-").isdecimal():
        raise ReadingError("no class")
    return int(word)


def _word(value: Any) -> str:
    """A text, number or truth value as `values` of the settings name it; empty for objects and lists."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, (str, int, float)) else ""


def _meaning(word: str, values: Mapping[str, T]) -> T | None:
    """What a word stands for; in another case, too, as devices write ON and on alike."""
    if word in values:
        return values[word]
    return next((value for name, value in values.items() if name.lower() == word.lower()), None)


def _is_no_value(value: Any) -> bool:
    if isinstance(value, str):
        return is_missing(value) or value.strip().lower() in _OFFLINE[:1]
    return isinstance(value, float) and math.isnan(value)
