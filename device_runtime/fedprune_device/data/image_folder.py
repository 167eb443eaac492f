"""A folder per class, which the application fills with images: new ones are noticed at the next round."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors, write_all
from fedprune.core.errors import ConfigError, DataError
from fedprune_device.data.dataset import LocalData, Shape
from fedprune_device.data.image_decoding import ENDINGS, MAX_BYTES, TYPES, Pixels
from fedprune_device.data.splits import SplitShares
from fedprune_device.data.stored_array import Copy, StoredArray

INDEX = "images.index"  # the name of the index in a board's state folder

_Entry = tuple[int, int, str]


class FileIndex:
    """Digests by path, valid while a file's size and modification time stay the same; without a path only in memory.

    The index has a line of JSON per digest and only grows, until more than half of its lines are stale: then it is
    rewritten. A damaged line is skipped, and its file read again.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._entries: dict[str, _Entry] = {}
        self._seen: set[str] = set()
        self._new: list[str] = []
        self._lines = 0
        self._ends = True
        if path is not None:
            with suppress(FileNotFoundError), storage_errors(f"can't read {path}", missing=True):
                self._read(path)

    @contextmanager
    def updating(self) -> Iterator[FileIndex]:
        """Look every file up in the body; entries of the others are dropped, and new ones written at its end."""
        self._seen = set()
        yield self
        self._entries = {key: self._entries[key] for key in self._seen}
        if self._path is None or not (self._new or self._lines > 2 * len(self._entries) + 100):
            return
        whole = self._lines + len(self._new) > 2 * len(self._entries) + 100
        lines = [_line(key, entry) for key, entry in self._entries.items()] if whole else self._new
        with storage_errors(f"can't write {self._path}"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            target = self._path.with_suffix(".new") if whole else self._path
            with target.open("w" if whole else "a", encoding="ascii") as file:
                file.write(("" if whole or self._ends else "\n") + "".join(lines))
            if whole:
                target.replace(self._path)
        self._lines = len(lines) + (0 if whole else self._lines)
        self._new, self._ends = [], True

    def known(self, key: str, status: os.stat_result) -> str | None:
        size, changed, digest = self._entries.get(key, (-1, -1, ""))
        if (size, changed) != (status.st_size, status.st_mtime_ns):
            return None
        self._seen.add(key)
        return digest

    def add(self, key: str, status: os.stat_result, digest: str) -> str:
        self._entries[key] = (status.st_size, status.st_mtime_ns, digest)
        self._seen.add(key)
        self._new.append(_line(key, self._entries[key]))
        return digest

    def _read(self, path: Path) -> None:
        with path.open(encoding="ascii", errors="replace") as file:
            for line in file:
                self._lines += 1
                self._ends = line.endswith("\n")
                with suppress(ValueError, TypeError, RecursionError):
                    key, size, changed, digest = json.loads(line)
                    if isinstance(key, str) and isinstance(digest, str) and len(digest) == 64:
                        self._entries[key] = (int(size), int(changed), digest)


def _line(key: str, entry: _Entry) -> str:
    return json.dumps([key, *entry]) + "\n"


class RoomError(DataError):
    """Decoded images have no more room."""


class DecodedImages:
    """A file without a name that holds at most `room` bytes of images in the size that a model takes.

    Without `folder` it is in the system's folder for temporary files.
    """

    def __init__(self, pixels: Pixels, shape: Shape, folder: Path | None, room: int) -> None:
        self._pixels, self._shape, self._room = pixels, shape, room
        self._rows: dict[str, int] = {}
        self._sample: tuple[int, ...] = ()
        with storage_errors("can't make a file for decoded images"):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as file:
                self._file = Copy(os.dup(file.fileno()))

    def serves(self, shape: Shape, wanted: Collection[str]) -> bool:
        """Whether it has this shape, at least half of its images are wanted, and room for all that are."""
        useless = sum(name not in wanted for name in self._rows)
        lacking = sum(name not in self._rows for name in wanted)
        fits = (len(self._rows) + lacking) * prod(self._sample) <= self._room
        return self._shape == shape and 2 * useless <= len(self._rows) and (fits or not useless)

    def row(self, name: str, read: Callable[[], bytes]) -> int:
        """An image's row, decoded if it is new; raises `RoomError` without room, `DataError` if it can't be decoded."""
        if name in self._rows:
            return self._rows[name]
        if self._sample and (len(self._rows) + 1) * prod(self._sample) > self._room:
            raise RoomError("room for decoded images", expected=f"at most {self._room} bytes", got="more")
        decoded = self._pixels.decoded(read(), tuple(TYPES.values()), self._shape)
        self._sample = decoded.shape
        with storage_errors("can't write decoded images"):
            write_all(self._file.fileno(), decoded.tobytes(), len(self._rows) * decoded.size)
        self._rows[name] = len(self._rows)
        return self._rows[name]

    def samples(self, rows: npt.NDArray[np.int64]) -> StoredArray:
        """Some images as samples, [n, colours, height, width]."""
        height, width, colours = self._sample
        return StoredArray(
            self._file,
            None,
            0,
            np.dtype(np.uint8),
            (len(self._rows), *self._sample),
            rows,
            checked=True,
            convert=self._pixels.numbers,
            sample=(colours, height, width),
        )


_LOG = logging.getLogger("fedprune.device")

_MOST_FILES = 200_000  # files that are looked at, of each class as many as there are, or a fair share

_T = TypeVar("_T")


_HASHED_AT_START = 1000
"""Files that are read at the start if the index doesn't know them; a round reads the others, so that a board with many
new files is ready at once."""

PIXEL_BYTES = 2**30  # room on the disk for decoded images


@dataclass(frozen=True)
class _Image:
    path: Path
    label: int
    name: str  # sha256 of the file, which decides the sample's part and whether it is among the chosen ones


class ImageFolder:
    """A board's samples as image files, `CLASS/image.jpg`, where CLASS is a number or one of the names.

    A round's images are decoded once, into a file without a name of at most `room` bytes; batches are read from there.
    A round takes at most `most` images: a fair share per class, chosen by their digests, always the same. `state` is a
    folder for the index and decoded images; without it temporary files are used. Raises `ConfigError` if a folder is
    not a class.
    """

    def __init__(
        self,
        root: Path,
        pixels: Pixels,
        shares: SplitShares,
        most: int,
        class_names: tuple[str, ...] = (),
        state: Path | None = None,
        room: int = PIXEL_BYTES,
    ) -> None:
        self._root, self._pixels, self._shares, self._most = root, pixels, shares, most
        self._names, self._state, self._room = class_names, state, room
        self._index = FileIndex(None if state is None else state / INDEX)
        self._decoded: DecodedImages | None = None
        self._chosen: list[_Image] = []
        self._training = 0
        self._look(_HASHED_AT_START)

    @property
    def samples(self) -> int:
        """Training images, as of the last look."""
        return self._training

    def snapshot(self, shape: Shape | None = None) -> LocalData:
        """The images that exist now; unreadable ones are logged and left out. Raises `DataError` if none is left."""
        if shape is None:
            raise DataError("the size of images", expected="a model's input")
        self._look()
        parts: dict[str, list[tuple[int, int]]] = {"train": [], "val": [], "test": []}
        decoded = self._decoded_for(shape)
        for image in self._chosen:
            try:
                row = decoded.row(image.name, partial(_content, image.path))
            except RoomError:
                _LOG.warning("images of %s are left out: decoded ones may take %d bytes", self._root, self._room)
                break
            except (OSError, DataError) as error:
                _LOG.warning("%s is left out: %s", image.path, error)
                continue
            parts[self._shares.part(image.name)].append((image.label, row))
        if not parts["train"]:
            raise DataError(f"{self._root} has nothing to train on", expected="CLASS/image.jpg", got="no image")
        arrays: list[Any] = []
        for part in ("train", "test", "val"):
            rows = np.array([r for _, r in parts[part]], np.int64)
            arrays += [decoded.samples(rows), np.array([c for c, _ in parts[part]], np.int64)]
        return LocalData(*arrays)

    def _decoded_for(self, shape: Shape) -> DecodedImages:
        """Decoded images of earlier rounds, unless they have another shape or too many are no longer chosen."""
        wanted = {image.name for image in self._chosen}
        if self._decoded is None or not self._decoded.serves(shape, wanted):
            self._decoded = None
            self._decoded = DecodedImages(self._pixels, shape, self._state, self._room)
        return self._decoded

    def _look(self, most_new: int = _MOST_FILES) -> None:
        """Find the images, and choose; of those that the index doesn't know read at most `most_new`."""
        by_class: dict[int, list[_Image]] = {}
        with storage_errors(f"can't read {self._root}"):
            folders = sorted(p for p in self._root.iterdir() if p.is_dir() and not p.name.startswith("."))
            labels = {f: self._label(f) for f in folders}
            files = [sorted(p for p in f.iterdir() if p.suffix.lower() in ENDINGS) for f in folders]
        if (count := sum(map(len, files))) > _MOST_FILES:
            _LOG.warning("%s holds %d images; %d are looked at, of every class", self._root, count, _MOST_FILES)
        with self._index.updating() as index:
            for path in islice(_in_turn(files), _MOST_FILES):
                try:
                    status, key = path.lstat(), str(path.relative_to(self._root))
                    name = index.known(key, status)
                    if name is None:
                        if not most_new:
                            continue
                        most_new -= 1
                        name = index.add(key, status, hashlib.sha256(_content(path)).hexdigest())
                except FileNotFoundError:
                    continue  # it was deleted, or renamed, since it was listed
                except (OSError, DataError) as error:
                    _LOG.warning("%s is left out: %s", path, error)
                    continue
                label = labels[path.parent]
                by_class.setdefault(label, []).append(_Image(path, label, name))
        # The same files count once.
        lines = [sorted({i.name: i for i in found}.values(), key=lambda i: i.name) for found in by_class.values()]
        self._chosen = list(islice(_in_turn(lines), self._most))
        self._training = sum(self._shares.part(i.name) == "train" for i in self._chosen)

    def _label(self, folder: Path) -> int:
        if folder.name in self._names:
            return self._names.index(folder.name)
        if folder.name.isdecimal() and folder.name.isascii() and len(folder.name) < 8:
            return int(folder.name)
        wanted = " or ".join(self._names) or "a number"
        raise ConfigError(
            f"{folder} is no class", expected=wanted, got=folder.name,
            hint="Give the classes' names in the order that all boards share: --class-names A,B,C.",
        )  # fmt: skip


def _in_turn(lines: Iterable[list[_T]]) -> Iterable[_T]:
    return (one for turn in zip_longest(*lines) for one in turn if one is not None)


def _content(path: Path) -> bytes:
    """An image's bytes; raises `DataError` unless it is a plain file of at most `MAX_BYTES`, or `OSError`."""
    with open(path, "rb", opener=_opened) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError("an image", expected="a plain file", got="something else")
        content = b"" if status.st_size > MAX_BYTES else file.read(MAX_BYTES + 1)  # it may be growing
    if max(status.st_size, len(content)) > MAX_BYTES:
        raise DataError("size of an image", expected=f"at most {MAX_BYTES} bytes", got="more")
    return content


def _opened(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe would be waited for
