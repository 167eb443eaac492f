"""What checks of fields take, in the words of JSON Schema (draft 2020-12): the protocol is published from its own code.

A check carries its description with it, so that both are written, and changed, in one place. A description may take
more than its check does where JSON Schema has no word for the difference, never less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Schema = dict[str, Any]
Described = TypeVar("Described", bound=Callable[..., Any])

_SCHEMA = "schema"


def described(schema: Schema | Callable[[], Schema]) -> Callable[[Described], Described]:
    """Say of a check what it takes.

    Args:
        schema: JSON Schema, or what makes it when it is asked for; references into `#/$defs/` are to
            `fedprune.wire.validation.DEFINITIONS`.
    """

    def mark(check: Described) -> Described:
        vars(check)[_SCHEMA] = schema
        return check

    return mark


def schema_of(check: Callable[..., Any]) -> Schema:
    """What a check takes.

    Raises:
        TypeError: Nobody has said it: the check needs `described`.
    """
    found = vars(check).get(_SCHEMA)
    if found is None:
        raise TypeError(f"the check {check!r} has no description: decorate it with fedprune.wire.schema.described")
    return dict(found() if callable(found) else found)


def defined(name: str) -> Schema:
    """A reference to one of the definitions that all messages share."""
    return {"$ref": f"#/$defs/{name}"}
