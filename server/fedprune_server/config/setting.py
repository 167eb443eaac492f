"""The declaration of a setting, from which checks, options of the command line and documentation derive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from typing import Any

from fedprune.core import validation

SWITCH = "-"
"""Metavar of a setting whose option takes no value."""


def setting(
    default: Any, text: str, metavar: str = "", *, within: tuple[int, int] | None = None, choices: Sequence[str] = ()
) -> Any:
    """A field of a class of settings.

    Args:
        default: Its default.
        text: Its description, in the documentation and in `--help`.
        metavar: The value's name in `--help`, if the setting is also an option of `run`; `SWITCH` if it takes no
            value.
        within: The least and the greatest value of a whole number.
        choices: The values of a text that has few.
    """
    return field(default=default, metadata={"text": text, "metavar": metavar, "within": within, "choices": choices})


def check_settings(settings: Any, table: str) -> None:
    """Check the settings that are declared as whole numbers, choices or switches.

    Raises:
        ConfigError: A value is wrong; the message begins with the table and the key.
    """
    for f in fields(settings):
        value, what = getattr(settings, f.name), f"{table}: {f.name}"
        if within := f.metadata.get("within"):
            validation.whole(what, value, *within)
        elif choices := f.metadata.get("choices"):
            validation.word(what, value, choices)
        elif f.type == "bool":
            validation.truth(what, value)
