"""The declaration of a setting, from which checks, options of the command line and documentation derive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

from fedprune.core import validation
from fedprune.core.errors import ConfigError, KeyPath, dotted_path, value_text
from fedprune.core.settings import bounded, check_fields, choice_of

_Settings = TypeVar("_Settings")

# The metavar of a setting whose option takes no value; an empty one means that there is no option.
SWITCH = "-"


def setting(
    default: Any,
    text: str,
    metavar: str = "",
    *,
    within: tuple[float, float] | None = None,
    above: bool = False,
    below: bool = False,
    choices: Sequence[str] = (),
) -> Any:
    """A field of a class of settings, with its description in the documentation and in `--help`.

    Args:
        metavar: The value's name in `--help`, if the setting is also an option of `run`; `SWITCH` if it takes no value.
        within: The least and the greatest value of a number; `above` and `below` exclude these ends.
        choices: The values of a text that has few.
    """
    metadata = {"text": text, "metavar": metavar}
    if within is not None:
        return bounded(default, *within, above=above, below=below, metadata=metadata)
    if choices:
        return choice_of(default, choices, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_settings(settings: Any, path: KeyPath) -> None:
    """Check the settings that are declared as numbers within limits, choices, switches, texts or paths.

    A path may be given as a text, and is made a `Path`. Raises `ConfigError`, which names the key in the table `path`,
    if a value is wrong."""
    check_fields(settings, path)
    for f in fields(settings):
        value, kind = getattr(settings, f.name), str(f.type)
        if kind.startswith(("str", "Path")) and not (value is None and kind.endswith("None")):
            if not isinstance(value, Path):
                check_setting_text(value, (*path, f.name), f.metadata.get("text", ""))
            if kind.startswith("Path"):  # the settings are frozen, and this is still their construction
                object.__setattr__(settings, f.name, Path(value))


def check_setting_text(value: object, path: KeyPath, description: str = "") -> str:
    """The value of a setting that is a text; `description` says what it is for."""
    # A zero byte ends every name of a file and host: what opens one fails with an error that names no setting.
    if isinstance(value, str) and value.strip() and "\0" not in value:
        return value
    hint = "Leave it out for its default."
    if not isinstance(value, str):
        hint = f'Write {path[-1]} = "..." below [{dotted_path(path[:-1])}], or leave it out.'
    raise ConfigError(
        path, expected="a text that isn't empty and has no zero byte", got=value_text(value),
        hint=f"{hint} {description}".strip(),
    )  # fmt: skip


def read_table(kind: type[_Settings], body: object, path: KeyPath) -> _Settings:
    """Settings from their table. Raises `ConfigError` if it is no table, or a key is unknown or has a wrong value."""
    return kind(**validation.check_table(kind, body, path))
