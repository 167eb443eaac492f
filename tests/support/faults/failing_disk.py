"""A disk that fails, or a process that dies, at a write of one's choice."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


class Crash(BaseException):
    pass


@contextmanager
def fault(at: int, error: BaseException | None) -> Iterator[list[int]]:
    """The `at`-th write, sync, rename or deletion fails; after a crash every later one, too."""
    count = [0]
    patched = [(os, n) for n in ("fsync", "pwrite", "link", "ftruncate")] + [(Path, n) for n in ("replace", "unlink")]
    # Nothing here cuts the power, so a sync needn't reach the disk: it only counts.
    old = [(lambda _: None) if name == "fsync" else getattr(owner, name) for owner, name in patched]

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if error is not None and (count[0] == at or (count[0] > at and isinstance(error, Crash))):
                raise error
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for (owner, name), function in zip(patched, old, strict=True):
            patch.setattr(owner, name, wrap(function))
        yield count
