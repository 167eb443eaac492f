"""Rules on settings that depend on the values of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from fedprune.core.errors import ConfigError, KeyPath, value_text


class SettingRule(NamedTuple):
    """A setting that, unless it has its default, requires certain values of another one: `holds` tells whether settings
    keep the rule."""

    setting: str
    depends_on: str
    holds: Callable[[Any], bool]
    expected: str
    hint: str = ""


def check_rules(settings: Any, rules: Iterable[SettingRule], path: KeyPath) -> None:
    """Raise `ConfigError` for the first rule that settings break; `path` is their table's."""
    for rule in rules:
        value, other_value = getattr(settings, rule.setting), getattr(settings, rule.depends_on)
        if value != getattr(type(settings), rule.setting) and not rule.holds(settings):
            raise ConfigError(
                f"with {rule.depends_on} {value_text(other_value)}",
                path=(*path, rule.setting),
                expected=rule.expected,
                got=value_text(value),
                hint=rule.hint,
            )
