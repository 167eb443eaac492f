"""A dictionary that forgets its oldest entry when it has too many, for results that are dear to compute again."""

from __future__ import annotations

from typing import TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")

# Boards of one kind share most results; a fleet whose boards have all measured themselves would fill the memory.
MAX_CACHED = 4096


class BoundedCache(dict[_Key, _Value]):
    """A dictionary of at most `MAX_CACHED` entries; the oldest is the one that was set first.

    Only `cache[key] = value` keeps the bound, not `update` and `setdefault`.
    """

    def __setitem__(self, key: _Key, value: _Value) -> None:
        super().__setitem__(key, value)
        if len(self) > MAX_CACHED:
            del self[next(iter(self))]
