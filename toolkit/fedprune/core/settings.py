"""Settings as dataclasses whose fields say what they may be.

`lr: float = bounded(0.05, 0, 1_000)` is a number in a range, whole where the annotation is `int`; `mask: str =
one_of("none", MASKS)` and any field that is annotated with a `Literal` are one of a few words; `bool` is true or false.
`check_fields` refuses every other value. Fields of other types are for the class itself to check.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from types import MappingProxyType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from fedprune.core import validation
from fedprune.core.errors import ConfigError, FedpruneError, KeyPath, Subject

_RANGE_KEY, _CHOICES_KEY = "limits", "choices"


@dataclass(frozen=True)
class NumberRange:
    """A range of numbers; `above` and `below` exclude its ends, `or_zero` allows 0 as well."""

    low: float
    high: float
    above: bool = False
    below: bool = False
    or_zero: bool = False

    def check(self, what: Subject, value: object, *, is_whole: bool, error: type[FedpruneError]) -> None:
        """Raise `error` for another value."""
        if self.or_zero and validation.is_number(value, 0, 0):
            return
        try:
            if is_whole:
                validation.check_whole(what, value, int(self.low), int(self.high), error=error)
            else:
                validation.check_number(
                    what, value, self.low, self.high, above=self.above, below=self.below, error=error
                )
        except error as refused:
            if not self.or_zero:
                raise
            raise error(what, expected=f"0, or {refused.expected}", got=refused.got) from None


def bounded(
    default: Any,
    low: float,
    high: float,
    *,
    above: bool = False,
    below: bool = False,
    or_zero: bool = False,
    metadata: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """A number from `low` to `high`, or a tuple of such; a field may be None where its type allows it.

    `dataclasses.MISSING` for a field without a default; `metadata` is the field's further metadata.
    """
    return field(default=default, metadata={**metadata, _RANGE_KEY: NumberRange(low, high, above, below, or_zero)})


def choice_of(default: str, choices: Iterable[str], *, metadata: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """One of a few words; `metadata` is the field's further metadata."""
    return field(default=default, metadata={**metadata, _CHOICES_KEY: tuple(choices)})


def check_fields(settings: Any, path: KeyPath, error: type[FedpruneError] = ConfigError) -> None:
    """Check all fields of a dataclass that declare their values; `path` is the table's. Raises `error`, which names the
    field."""
    for name, rule in _field_rules(settings.__class__).items():
        value, what = getattr(settings, name), (*path, name)
        if value is None and rule.is_optional:
            continue
        if rule.choices:
            validation.check_word(what, value, rule.choices, error=error)
        elif rule.kind is bool:
            validation.check_bool(what, value, error=error)
        elif rule.limits is not None:
            is_tuple = get_origin(rule.kind) is tuple and isinstance(value, tuple)
            for entry in value if is_tuple else (value,):
                rule.limits.check(what, entry, is_whole=rule.is_whole, error=error)


class _FieldRule(NamedTuple):
    """The values that a field accepts, by its annotation and metadata."""

    kind: Any
    is_whole: bool
    is_optional: bool
    limits: NumberRange | None
    choices: tuple[str, ...]


# Cached, because resolving annotations is slow, and a class doesn't change.
@cache
def _field_rules(cls: Any) -> Mapping[str, _FieldRule]:
    hints, rules = get_type_hints(cls), {}
    for f in fields(cls):
        kind, optional = hints[f.name], False
        # `int | None` is checked as `int`, with None allowed. The two spellings of a union have different origins.
        if get_origin(kind) in (Union, UnionType) and type(None) in get_args(kind):
            kind, optional = get_args(kind)[0], True
        words = get_args(kind) if get_origin(kind) is Literal else f.metadata.get(_CHOICES_KEY, ())
        rules[f.name] = _FieldRule(kind, int in (kind, *get_args(kind)), optional, f.metadata.get(_RANGE_KEY), words)
    return rules
