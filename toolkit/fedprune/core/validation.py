"""Checks of values from people, files and networks: each returns the value, or raises an error of the caller's class.

Every check takes a name for the error's message first, then the value. By default it raises a `ConfigError`, which is
for settings; what reads messages, bundles or profiles passes another class as `error`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, TypeGuard, Union, cast, get_args, get_origin, get_type_hints

from fedprune.core.errors import ConfigError, FedpruneError, Subject, meant, shown

MAX_INT = 2**63 - 1

_PRINTABLE = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]*")
"""No control characters other than line ends and tabs, no halves of surrogate pairs."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_DECIMAL = re.compile(r"-?[0-9]{1,19}")
_HEX = re.compile(r"(?:[0-9a-f]{2})*")

Error = type[FedpruneError]


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> TypeGuard[float]:
    """Whether it is a finite number, which a truth value is not, from `low` to `high`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value) and low <= value <= high
    except OverflowError:  # an int beyond float64
        return False


def is_whole(value: object, low: int = 0, high: int = MAX_INT) -> TypeGuard[int]:
    """Whether it is an int, which a truth value is not, from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_digest(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def number(
    what: Subject,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    error: Error = ConfigError,
) -> float:
    """A finite number from `low` to `high`; `above` and `below` exclude these ends."""
    if is_number(value, low, high) and not (above and value == low) and not (below and value == high):
        return float(value)
    if math.isinf(low):
        expected = "a finite number" if math.isinf(high) else f"a number up to {high:g}"
    elif above:
        most = "" if math.isinf(high) else f" and below {high:g}" if below else f" and at most {high:g}"
        expected = f"a number above {low:g}{most}"
    else:
        most = "up" if math.isinf(high) else f"to below {high:g}" if below else f"to {high:g}"
        expected = f"a number from {low:g} {most}"
    raise error(what, expected=expected, got=shown(value))


def whole(what: Subject, value: object, low: int = 0, high: int = MAX_INT, *, error: Error = ConfigError) -> int:
    if is_whole(value, low, high):
        return value
    raise error(what, expected=f"a whole number from {low} to {high}", got=shown(value))


def whole_text(what: str, value: str, low: int = 0, high: int = MAX_INT, *, error: Error = ConfigError) -> int:
    """A whole number in a text, such as a part of a web address."""
    # The length first: parsing millions of digits takes seconds.
    if _DECIMAL.fullmatch(value) and is_whole(number := int(value), low, high):
        return number
    raise error(what, expected=f"a whole number from {low} to {high}", got=shown(value))


def word(what: Subject, value: Any, allowed: Sequence[str], *, error: Error = ConfigError) -> str:
    if value in allowed:
        return str(value)
    raise error(what, expected=" or ".join(allowed), got=shown(value))


def instance(
    what: Subject, value: object, kinds: type[Any] | tuple[type[Any], ...], expected: str, *, error: Error = ConfigError
) -> None:
    """Refuse a value of another type, as callers from Python may pass; `expected` describes the right ones."""
    if not isinstance(value, kinds):
        raise error(what, expected=expected, got=f"{type(value).__name__} {shown(value)}")


def texts(what: Subject, value: object, *, error: Error = ConfigError) -> tuple[str, ...]:
    """A list or tuple of texts; one text alone, whose letters would be taken for them, is refused."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise error(what, expected="a list of texts", got=f"{type(value).__name__} {shown(value)}")
    found = tuple(value)
    for entry in found:
        instance(f"{what}: an entry", entry, str, "a text", error=error)
    return found


def truth(what: Subject, value: object, *, error: Error = ConfigError) -> bool:
    if isinstance(value, bool):
        return value
    raise error(what, expected="true or false", got=shown(value))


def text(what: Subject, value: object, most: int, *, error: Error = ConfigError) -> str:
    """Printable text of at most `most` characters; it may have line ends and tabs."""
    if isinstance(value, str) and len(value) <= most and _PRINTABLE.fullmatch(value):
        return value
    raise error(what, expected=f"text of at most {most} printable characters", got=shown(value))


def matching(
    what: Subject, value: object, pattern: re.Pattern[str], expected: str, *, error: Error = ConfigError
) -> str:
    """Text that a pattern matches as a whole."""
    if isinstance(value, str) and pattern.fullmatch(value):
        return value
    raise error(what, expected=expected, got=shown(value))


def digest(what: str, value: object, *, error: Error = ConfigError) -> str:
    return matching(what, value, _DIGEST, "64 hex digits", error=error)


def hexadecimal(what: str, value: object, low: int, high: int, *, error: Error = ConfigError) -> str:
    """From `low` to `high` lower-case hex digits, two for each byte."""
    if isinstance(value, str) and low <= len(value) <= high and _HEX.fullmatch(value):
        return value
    raise error(what, expected=f"{low if low == high else f'{low} to {high}'} hex digits", got=shown(value))


def items(
    what: Subject, value: object, most: int, noun: str, *, least: int = 0, error: Error = ConfigError
) -> Sequence[Any]:
    """A list of `least` to `most` items, which are not looked at; `noun` is their plural."""
    if isinstance(value, (list, tuple)) and least <= len(value) <= most:
        return value
    expected = f"a list of {f'{least} to' if least else 'at most'} {most} {noun}"
    raise error(what, expected=expected, got=shown(value))


def table(what: str, value: object, *, error: Error = ConfigError) -> Mapping[Any, Any]:
    """An object, whose keys and values are not looked at."""
    if isinstance(value, Mapping):
        return value
    raise error(what, expected="an object", got=shown(value))


def record(what: str, value: object, keys: Iterable[str], *, error: Error = ConfigError) -> Mapping[str, Any]:
    """An object that has all of these keys; it may have others."""
    body = table(what, value, error=error)
    for key in keys:
        if key not in body:
            raise error(f"{what}.{key}", expected="a value", got="nothing")
    return body


def only(
    allowed: Iterable[str],
    body: Mapping[str, Any],
    where: Subject,
    noun: str = "key",
    *,
    error: Error = ConfigError,
) -> None:
    """Raise an error that names the first key of `body` that isn't allowed."""
    names = tuple(allowed)
    for key in body:
        if key not in names:
            expected = f"one of {', '.join(names)}"
            if isinstance(where, str):
                raise error(f"{where}: unknown {noun} {shown(key)}{meant(key, names)}", expected=expected)
            raise error(f"unknown {noun}{meant(key, names)}", path=(*where, key), expected=expected)


def known(kind: type[Any], body: object, where: Subject) -> dict[str, Any]:
    """A copy of a table whose keys are all fields of a dataclass. Raises `ConfigError`, which names another key."""
    if not isinstance(body, Mapping):
        raise ConfigError(where, expected="a table of settings", got=shown(body))
    only((f.name for f in fields(kind)), body, where)
    return dict(body)


def restored(kind: Any, value: Any) -> Any:
    """A value of a type, such as a dataclass, from what `dataclasses.asdict` and JSON made of it; keys that the
    dataclass doesn't know are ignored. Raises `ValueError`, or `KeyError` for a missing key."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (one,) = (arg for arg in inner if arg is not type(None))
        return None if value is None else restored(one, value)
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(restored(inner[0], item) for item in value)
    if is_dataclass(kind) and isinstance(value, Mapping):
        make = cast("Callable[..., Any]", kind)
        return make(**{name: restored(hint, value[name]) for name, hint in _field_types(make)})
    plain = {float: is_number(value), int: is_whole(value, -MAX_INT)}
    if plain.get(kind, kind in (str, bool) and isinstance(value, kind)):
        return value
    raise ValueError(f"{shown(value)} is no {getattr(kind, '__name__', kind)}")


@cache
def _field_types(kind: Any) -> list[tuple[str, Any]]:
    hints = get_type_hints(kind)
    return [(f.name, hints[f.name]) for f in fields(kind)]
