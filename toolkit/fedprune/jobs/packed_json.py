"""A JSON object that takes little memory, for what a state keeps of each of many devices and seldom reads."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

# Objects that are kept as they were read. Boards of one kind share them, so that a fleet needs few.
_MAX_PARSED = 512


class PackedJson(Mapping[str, Any]):
    """A JSON object as compressed text, which is read when an entry is asked for.

    What it returns must not be changed: others get the same objects. Two are equal if their texts are: 0 isn't 0.0.
    """

    __slots__ = ("raw",)

    def __init__(self, body: Mapping[str, Any]) -> None:
        # The fastest level: every device's plan is packed when it is admitted.
        self.raw = zlib.compress(json.dumps(body, sort_keys=True, separators=(",", ":")).encode(), 1)

    @property
    def text(self) -> str:
        """The object as JSON, with sorted keys."""
        return zlib.decompress(self.raw).decode()

    def __getitem__(self, key: str) -> Any:
        return _parse(self.raw)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(_parse(self.raw))

    def __len__(self) -> int:
        return len(_parse(self.raw))

    def __eq__(self, other: object) -> bool:
        return self.raw == other.raw if isinstance(other, PackedJson) else super().__eq__(other)

    def __hash__(self) -> int:
        return hash(self.raw)


@lru_cache(maxsize=_MAX_PARSED)
def _parse(raw: bytes) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(zlib.decompress(raw))
    return body
