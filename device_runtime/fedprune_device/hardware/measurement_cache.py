"""What a board has measured of itself, kept for its next start."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from fedprune.core.atomic_file import write_whole
from fedprune.core.errors import ProfileError, StorageError


class Measured(Protocol):
    """A measurement that can be written down."""

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types."""


_Measured = TypeVar("_Measured", bound=Measured)


def remembered(
    path: Path,
    about: str,
    asset: bytes,
    key: str,
    read: Callable[[Any], _Measured],
    make: Callable[[], _Measured],
) -> _Measured:
    """The measurement of an earlier start, as long as nothing has changed that it depends on.

    Args:
        path: Where it is kept; nothing is kept where the folder isn't there yet.
        about: What it depends on: board, versions, threads.
        asset: The graphs that are measured; it depends on these, too.
        key: What it is called in the file.
        read: Reads it from plain JSON types, and raises a `ProfileError` where they are damaged.
        make: Measures.
    """
    depends = f"{about} {hashlib.sha256(asset).hexdigest()}"
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if body["about"] == depends:
            return read(body[key])
    except (OSError, ValueError, KeyError, TypeError, RecursionError, ProfileError):
        pass  # there is none, or it is damaged: it can be measured again
    found = make()
    with contextlib.suppress(StorageError):
        write_whole(path, json.dumps({"about": depends, key: found.to_dict()}).encode())
    return found
