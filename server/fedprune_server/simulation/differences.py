"""Where the settings of two runs differ, in words: what was stored, and what is given now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedprune.core.errors import shown
from fedprune.core.text import some

_MOST = 5
"""Settings that a message names; with more of them another one is meant anyway."""

_NOTHING = object()


def differences(stored: Mapping[str, Any], given: Mapping[str, Any], ignored: Sequence[str] = ()) -> str:
    """The settings that differ, as `job.recipe.lr (stored 0.05, given 0.1)`; empty where none does."""
    old, new = ({k: v for k, v in body.items() if k not in ignored} for body in (stored, given))
    found = [f"{name} (stored {_word(a)}, given {_word(b)})" for name, a, b in _pairs("", old, new)]
    return some(found, most=_MOST)


def _pairs(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Every place at which two values differ, as deep as both are tables."""
    old, new = _table(old), _table(new)
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in (*old, *(k for k in new if k not in old)):
            yield from _pairs(f"{name}.{key}" if name else key, old.get(key, _NOTHING), new.get(key, _NOTHING))
    elif old != new:
        yield name, old, new


def _table(value: Any) -> Any:
    """A list of tables that have names, by those."""
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, Mapping) and "name" in v for v in value):
        return {str(v["name"]): v for v in value}
    return list(value) if isinstance(value, tuple) else value


def _word(value: Any) -> str:
    return "nothing" if value is _NOTHING else shown(value)
