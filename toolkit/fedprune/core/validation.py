"""Checks of settings that people write: each says what was expected, and what was found instead."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedprune.core.errors import ConfigError, meant, shown


def within(value: object, low: float, high: float) -> bool:
    """Whether it is a number, which a truth value is not, from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def number(what: str, value: object, low: float, high: float, *, above: bool = False, below: bool = False) -> float:
    """Check a number.

    Args:
        what: The setting's name, for the message.
        value: What was found.
        low: The least that it may be.
        high: The most; infinity where any finite number will do.
        above: Whether it must be more than `low`.
        below: Whether it must be less than `high`.

    Returns:
        The number.

    Raises:
        ConfigError: It is out of range, or no number at all.
    """
    free = math.isinf(high)
    inside = within(value, low, sys.float_info.max if free else high)
    if inside and not (above and value == low) and not (below and value == high):
        return float(value)  # type: ignore[arg-type]
    if above:
        most = "" if free else f" and below {high:g}" if below else f" and at most {high:g}"
        raise ConfigError(what, expected=f"a number above {low:g}{most}", got=shown(value))
    most = "up" if free else f"to below {high:g}" if below else f"to {high:g}"
    raise ConfigError(what, expected=f"a number from {low:g} {most}", got=shown(value))


def whole(what: str, value: object, low: int, high: int) -> int:
    """Check a whole number, from `low` to `high`; arguments are those of `number`.

    Returns:
        The number.

    Raises:
        ConfigError: It is out of range, or no whole number.
    """
    if isinstance(value, int) and within(value, low, high):
        return value
    raise ConfigError(what, expected=f"a whole number from {low} to {high}", got=shown(value))


def word(what: str, value: object, allowed: Sequence[str]) -> None:
    """Check a setting that is one of a few words.

    Raises:
        ConfigError: It is something else.
    """
    if value not in allowed:
        raise ConfigError(what, expected=" or ".join(allowed), got=shown(value))


def truth(what: str, value: object) -> None:
    """Check a setting that is true or false.

    Raises:
        ConfigError: It is something else.
    """
    if not isinstance(value, bool):
        raise ConfigError(what, expected="true or false", got=shown(value))


def only(allowed: Iterable[str], body: Mapping[str, Any], where: str, noun: str = "key") -> None:
    """Make sure that a table has no other keys.

    Args:
        allowed: The keys that it may have.
        body: The table.
        where: Its name, for the message.
        noun: What its keys are.

    Raises:
        ConfigError: There is another one; the message names it.
    """
    names = tuple(allowed)
    for key in body:
        if key not in names:
            raise ConfigError(
                f"{where}: unknown {noun} {shown(key)}{meant(key, names)}", expected=f"one of {', '.join(names)}"
            )


def known(kind: type[Any], body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table's settings, if a dataclass has all of them.

    Args:
        kind: The dataclass.
        body: The table.
        where: Its name, for the message.

    Raises:
        ConfigError: There is another one; the message names it.
    """
    only((f.name for f in fields(kind)), body, where)
    return dict(body)
