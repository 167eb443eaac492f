"""Checks of values from people, files and networks: each returns the value, or raises an error of the caller's class.

Every check takes a name for the error's message first, then the value. By default it raises a `ConfigError`, which is
for settings; what reads messages, bundles or profiles passes another class as `error`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeGuard

from fedprune.core.errors import ConfigError, FedpruneError, Subject, did_you_mean, dotted_path, value_text

# What databases, arrays and clocks take; Python's own integers have no end.
MAX_INT = 2**63 - 1

# No control characters other than line ends and tabs, which could steer a terminal; no halves of surrogate pairs, which
# no UTF-8 file or message can hold.
_PRINTABLE = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]*")

# A regular expression for a sha256 in hex; Ed25519 keys have the same length.
DIGEST_PATTERN = "[0-9a-f]{64}"

# As many digits as `MAX_INT` has.
_DECIMAL = re.compile(r"-?[0-9]{1,19}")

ErrorClass = type[FedpruneError]


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
    return isinstance(value, str) and re.fullmatch(DIGEST_PATTERN, value) is not None


def check_number(
    what: Subject,
    value: object,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    error: ErrorClass = ConfigError,
) -> float:
    """A finite number from `low` to `high`; `above` and `below` exclude these ends."""
    if is_number(value, low, high) and not (above and value == low) and not (below and value == high):
        return float(value)
    if math.isinf(low):
        expected = "a finite number" if math.isinf(high) else f"a number up to {high:g}"
    elif above:
        upper_end = "" if math.isinf(high) else f" and below {high:g}" if below else f" and at most {high:g}"
        expected = f"a number above {low:g}{upper_end}"
    else:
        upper_end = "up" if math.isinf(high) else f"to below {high:g}" if below else f"to {high:g}"
        expected = f"a number from {low:g} {upper_end}"
    raise error(what, expected=expected, got=value_text(value))


def check_whole(
    what: Subject, value: object, low: int = 0, high: int = MAX_INT, *, error: ErrorClass = ConfigError
) -> int:
    if is_whole(value, low, high):
        return value
    raise error(what, expected=f"a whole number from {low} to {high}", got=value_text(value))


def parse_whole(what: str, value: str, low: int = 0, high: int = MAX_INT, *, error: ErrorClass = ConfigError) -> int:
    """A whole number in a text, such as a part of a web address."""
    # The length first: parsing millions of digits takes seconds.
    if _DECIMAL.fullmatch(value) and is_whole(number := int(value), low, high):
        return number
    raise error(what, expected=f"a whole number from {low} to {high}", got=value_text(value))


def check_word(what: Subject, value: Any, allowed: Sequence[str], *, error: ErrorClass = ConfigError) -> str:
    if value in allowed:
        return str(value)
    raise error(what, expected=" or ".join(allowed), got=value_text(value))


def check_instance(
    what: Subject,
    value: object,
    kinds: type[Any] | tuple[type[Any], ...],
    expected: str,
    *,
    error: ErrorClass = ConfigError,
) -> None:
    """Refuse a value of another type, as callers from Python may pass; `expected` describes the right ones."""
    if not isinstance(value, kinds):
        raise error(what, expected=expected, got=f"{type(value).__name__} {value_text(value)}")


def check_texts(what: Subject, value: object, *, error: ErrorClass = ConfigError) -> tuple[str, ...]:
    """A list or tuple of texts. A single text is refused: its letters would be taken for the entries."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise error(what, expected="a list of texts", got=f"{type(value).__name__} {value_text(value)}")
    entries = tuple(value)
    for index, entry in enumerate(entries):
        entry_what = f"{what}: an entry" if isinstance(what, str) else (*what, index)
        check_instance(entry_what, entry, str, "a text", error=error)
    return entries


def check_bool(what: Subject, value: object, *, error: ErrorClass = ConfigError) -> bool:
    if isinstance(value, bool):
        return value
    raise error(what, expected="true or false", got=value_text(value))


def check_text(what: Subject, value: object, max_length: int, *, error: ErrorClass = ConfigError) -> str:
    """Printable text of at most `max_length` characters; it may have line ends and tabs."""
    if isinstance(value, str) and len(value) <= max_length and _PRINTABLE.fullmatch(value):
        return value
    raise error(what, expected=f"text of at most {max_length} printable characters", got=value_text(value))


def check_pattern(
    what: Subject, value: object, pattern: re.Pattern[str], expected: str, *, error: ErrorClass = ConfigError
) -> str:
    """Text that a pattern matches as a whole."""
    if isinstance(value, str) and pattern.fullmatch(value):
        return value
    raise error(what, expected=expected, got=value_text(value))


def check_items(
    what: Subject, value: object, max_items: int, noun: str, *, min_items: int = 0, error: ErrorClass = ConfigError
) -> Sequence[Any]:
    """A list of `min_items` to `max_items` items, which are not checked themselves; `noun` is their plural."""
    if isinstance(value, (list, tuple)) and min_items <= len(value) <= max_items:
        return value
    expected = f"a list of {f'{min_items} to' if min_items else 'at most'} {max_items} {noun}"
    raise error(what, expected=expected, got=value_text(value))


def check_keys(
    allowed: Iterable[str],
    body: Mapping[str, Any],
    where: Subject,
    context: str = "",
    *,
    error: ErrorClass = ConfigError,
) -> None:
    """Refuse a table with a key or table that isn't allowed; the error names the first one. `context` is added to
    "key"."""
    names = tuple(allowed)
    for key in body:
        if key not in names:
            expected = f"one of {', '.join(names)}"
            noun = ("table" if isinstance(body[key], Mapping) else "key") + context
            if isinstance(where, str):
                raise error(f"{where}: unknown {noun} {value_text(key)}{did_you_mean(key, names)}", expected=expected)
            raise error(f"unknown {noun}{did_you_mean(key, names)}", path=(*where, key), expected=expected)


def check_table(kind: type[Any], body: object, where: Subject) -> dict[str, Any]:
    """A copy of a table, if all its keys are fields of a dataclass. Raises `ConfigError`, which names the first other
    key."""
    table = check_mapping(where, body)
    check_keys((f.name for f in fields(kind)), table, where)
    return dict(table)


def check_mapping(where: Subject, body: object) -> Mapping[Any, Any]:
    """Refuse a text, a number or a list in the place of a table. Raises `ConfigError`."""
    if isinstance(body, Mapping):
        return body
    if isinstance(where, str):
        raise ConfigError(where, expected="a table of settings", got=value_text(body))
    name = dotted_path(tuple(part for part in where if isinstance(part, str)))
    header = f"[[{name}]]" if isinstance(where[-1], int) else f"[{name}]"
    hint = "Its settings follow that line, each on one of its own."
    raise ConfigError(where, expected=f"a table {header}", got=value_text(body), hint=hint)
