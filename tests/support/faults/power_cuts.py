"""A power supply that fails at a write, rename, sync or deletion of one's choice.

Three kinds of cut: `before` (nothing of the operation happens), `torn` (half of a write happens, and of every file
that wasn't synced only the first half is left) and `lost` (the same, and renames and deletions in folders that weren't
synced are undone). A disk that says it has synced and hasn't is beyond this.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

KINDS = ("before", "torn", "lost")
TURNS = "by turns"
EACH_KIND = (
    pytest.param(TURNS, marks=pytest.mark.once),
    *(pytest.param(kind, marks=pytest.mark.soak) for kind in KINDS),
)
"""The same as parameters of a long test: at every push every second operation is cut in one way, in a soak each in all.

It is no other Python that loses what a disk has not kept.
"""


def cuts(kind: str, names: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Operations, and how to cut there: all in one way, or by turns every second of a name, each in the next way."""
    counts: Counter[str] = Counter()
    for at, name in enumerate(names, 1):
        turn, skipped = divmod(counts[name], 2)
        counts[name] += 1
        if kind != TURNS:
            yield at, kind
        elif not skipped:
            yield at, KINDS[turn % len(KINDS)]


class CutError(BaseException):
    """The power is gone; nothing may catch this as an error of its own."""


class Power:
    """What has been written through it: how many operations so far, and what each of them was."""

    def __init__(self, at: int, kind: str, gap: Callable[[], object]) -> None:
        self.at = at
        self.kind = kind
        self.gap = gap
        self.count = 0
        self.names: list[str] = []
        self.is_off = False
        self._inside = False
        self._unsynced: dict[Path, None] = {}
        self._undo: dict[Path, list[Callable[[], object]]] = {}

    def step(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if self._inside:  # pathlib calls os
            return function(*arguments, **named)
        if self.is_off:
            raise CutError
        if name not in ("fsync", "sync"):
            self.gap()
        self.count += 1
        self.names.append(name)
        self._inside = True
        try:
            if self.count == self.at:
                self._cut_off(name, function, arguments)
                self.is_off = True
                raise CutError
            self._note(name, arguments, named)
            return None if name in ("fsync", "sync") else function(*arguments, **named)
        finally:
            self._inside = False

    def _note(self, name: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        if name in ("write", "pwrite", "ftruncate"):
            self._unsynced[self._path(arguments[0])] = None
        elif name == "fsync":
            path = self._path(arguments[0])
            self._unsynced.pop(path, None)
            self._undo.pop(path, None)
        elif name == "sync":
            self._unsynced.clear()
            self._undo.clear()
        elif name == "replace":
            source, target = Path(arguments[0]), Path(arguments[1])
            source_content, old = _content(source), _content(target)
            self._later(target, lambda: _put(target, old))
            self._later(source, lambda: _put(source, source_content))
            if source in self._unsynced:
                del self._unsynced[source]
                self._unsynced[target] = None
        elif name == "rename":
            source, target = Path(arguments[0]), Path(arguments[1])
            self._later(target, lambda: target.exists() and not source.exists() and target.rename(source))
        elif name == "unlink" and "dir_fd" not in named:
            path = Path(arguments[0])
            if path.exists():
                gone = _content(path)
                self._later(path, lambda: _put(path, gone))

    def _later(self, path: Path, undo: Callable[[], object]) -> None:
        self._undo.setdefault(path.parent, []).append(undo)

    def _path(self, descriptor: int) -> Path:
        return Path(f"/proc/self/fd/{descriptor}").readlink()

    def _cut_off(self, name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        if self.kind == "before":
            return
        if name in ("write", "pwrite"):
            function(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2], *arguments[2:])
            self._unsynced[self._path(arguments[0])] = None
        for path in self._unsynced:
            if path.is_file():
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        if self.kind == "lost":
            for undone in self._undo.values():
                for undo in reversed(undone):
                    undo()


def _content(path: Path) -> tuple[bytes, int] | None:
    """What a file holds, and who may read it."""
    return (path.read_bytes(), path.stat().st_mode) if path.exists() else None


def _put(path: Path, content: tuple[bytes, int] | None) -> None:
    path.unlink(missing_ok=True)  # it may be a hard link, and another name's content is not this one's
    if content is not None and path.parent.is_dir():
        path.write_bytes(content[0])
        path.chmod(content[1])


@contextmanager
def power(at: int = 0, kind: str = "before", gap: Callable[[], object] = lambda: None) -> Iterator[Power]:
    """The `at`-th operation is where the power fails; every later one fails, too. With 0 it never does.

    `gap` is called before each operation but syncs, and may do what another process does there.
    """
    supply = Power(at, kind, gap)
    names = ("write", "pwrite", "ftruncate", "fsync", "sync", "replace", "rename", "unlink", "mkdir", "rmdir")
    patched = [(os, n) for n in names] + [(Path, n) for n in ("replace", "rename", "unlink", "mkdir", "rmdir")]
    real_open = os.open

    def open_file(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        if not flags & (os.O_CREAT | os.O_TRUNC) or supply._inside:
            return real_open(path, flags, *rest, **named)
        return int(supply.step("open", real_open, (path, flags, *rest), named))

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: supply.step(name, function, arguments, named)

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in patched:
            patch.setattr(owner, name, wrap(name, getattr(owner, name)))
        patch.setattr(os, "open", open_file)
        yield supply
