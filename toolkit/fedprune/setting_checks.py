"""Checks of settings that people write: each says what was expected, and what was found instead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from fedprune.errors import ConfigError, shown


def within(value: object, low: float, high: float) -> bool:
    """Whether it is a number, which a truth value is not, from `low` to `high`."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def number(what: str, value: object, low: float, high: float) -> None:
    """Check a number.

    Args:
        what: The setting's name, for the message.
        value: What was found.
        low: The least that it may be.
        high: The most.

    Raises:
        ConfigError: It is out of range, or no number at all.
    """
    if not within(value, low, high):
        raise ConfigError(what, expected=f"a number from {low:g} to {high:g}", got=shown(value))


def whole(what: str, value: object, low: int, high: int) -> None:
    """Check a whole number; arguments are those of `number`.

    Raises:
        ConfigError: It is out of range, or no whole number.
    """
    if not isinstance(value, int) or not within(value, low, high):
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


def known(kind: type[Any], body: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A table's settings, if a dataclass has all of them.

    Args:
        kind: The dataclass.
        body: The table.
        where: Its name, for the message.

    Raises:
        ConfigError: There is another one; the message names it.
    """
    names = {f.name for f in fields(kind)}
    for key in body:
        if key not in names:
            raise ConfigError(f"{where}: unknown key {shown(key)}", expected=", ".join(sorted(names)))
    return dict(body)
