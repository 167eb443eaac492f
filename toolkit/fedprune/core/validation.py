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

from fedprune.core.errors import ConfigError, FedpruneError, Subject, meant, shown

# What databases, arrays and clocks take; Python's own integers have no end.
MAX_INT = 2**63 - 1

# No control characters other than line ends and tabs, which could steer a terminal; no halves of surrogate pairs, which
# no UTF-8 file or message can hold.
_PRINTABLE = re.compile(r"[^\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]*")

# A regular expression for a sha256 in hex; Ed25519 keys have the same length.
DIGEST = "[0-9a-f]{64}"

# As many digits as `MAX_INT` has.
_DECIMAL = re.compile(r"-?[0-9]{1,19}")

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
    return isinstance(value, str) and re.fullmatch(DIGEST, value) is not None


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
        upper_end = "" if math.isinf(high) else f" and below {high:g}" if below else f" and at most {high:g}"
        expected = f"a number above {low:g}{upper_end}"
    else:
        upper_end = "up" if math.isinf(high) else f"to below {high:g}" if below else f"to {high:g}"
        expected = f"a number from {low:g} {upper_end}"
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
    """A list or tuple of texts. A single text is refused: its letters would be taken for the entries."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise error(what, expected="a list of texts", got=f"{type(value).__name__} {shown(value)}")
    entries = tuple(value)
    for entry in entries:
        instance(f"{what}: an entry", entry, str, "a text", error=error)
    return entries


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


def items(
    what: Subject, value: object, most: int, noun: str, *, least: int = 0, error: Error = ConfigError
) -> Sequence[Any]:
    """A list of `least` to `most` items, which are not checked themselves; `noun` is their plural."""
    if isinstance(value, (list, tuple)) and least <= len(value) <= most:
        return value
    expected = f"a list of {f'{least} to' if least else 'at most'} {most} {noun}"
    raise error(what, expected=expected, got=shown(value))


def only(
    allowed: Iterable[str],
    body: Mapping[str, Any],
    where: Subject,
    noun: str = "key",
    *,
    error: Error = ConfigError,
) -> None:
    """Refuse a table with a key that isn't allowed; the error names the first one."""
    names = tuple(allowed)
    for key in body:
        if key not in names:
            expected = f"one of {', '.join(names)}"
            if isinstance(where, str):
                raise error(f"{where}: unknown {noun} {shown(key)}{meant(key, names)}", expected=expected)
            raise error(f"unknown {noun}{meant(key, names)}", path=(*where, key), expected=expected)


def known(kind: type[Any], body: object, where: Subject) -> dict[str, Any]:
    """A copy of a table, if all its keys are fields of a dataclass. Raises `ConfigError`, which names the first other
    key."""
    if not isinstance(body, Mapping):
        raise ConfigError(where, expected="a table of settings", got=shown(body))
    only((f.name for f in fields(kind)), body, where)
    return dict(body)
