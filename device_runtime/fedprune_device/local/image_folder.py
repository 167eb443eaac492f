"""A folder per class, which the application fills with images: new ones are noticed at the next round."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fedprune.disk import storage_errors
from fedprune.errors import ConfigError, DataError
from fedprune_device.data import LocalData, Shape
from fedprune_device.local.images import ENDINGS, MAX_BYTES, TYPES, Pixels
from fedprune_device.local.shares import Shares

_LOG = logging.getLogger("fedprune.device")

_MOST_FILES = 200_000
"""Files that are looked at, of each class as many as there are, or a fair share."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Image:
    path: Path
    label: int
    name: str
    """sha256 of the file: what a sample's part and place in line depend on."""


class ImageFolder:
    """A board's samples as image files.

    Args:
        root: The folder; `CLASS/image.jpg` in it, where CLASS is a number or one of the names.
        pixels: How the model takes images.
        shares: What is held out.
        most: Images that a round takes at most: as many of each class as there are, or a fair share. Their digests say
            which ones: as good as at random, and always the same.
        class_names: Names of the classes, in their order.

    Raises:
        ConfigError: A folder is no class.
        StorageError: The folder can't be read.
    """

    def __init__(
        self, root: Path, pixels: Pixels, shares: Shares, most: int, class_names: tuple[str, ...] = ()
    ) -> None:
        self._root, self._pixels, self._shares, self._most = root, pixels, shares, most
        self._names = class_names
        self._known: dict[tuple[Path, int, int], str] = {}
        self._chosen: list[_Image] = []
        self._training = 0
        self._look()

    @property
    def samples(self) -> int:
        """Training images, as of the last look."""
        return self._training

    def snapshot(self, shape: Shape | None = None) -> LocalData:
        """The images that are there now. One that can't be read, or isn't written to its end, is left out by name.

        Args:
            shape: The model's input, [1, height, width] or [3, height, width].

        Raises:
            DataError: There is nothing to train on, or the model takes no images.
            StorageError: The folder can't be read.
        """
        if shape is None:
            raise DataError("the size of images", expected="a model's input")
        self._look()
        parts: dict[str, list[tuple[int, Any]]] = {"train": [], "val": [], "test": []}
        for image in self._chosen:
            try:
                x = self._pixels.read(_content(image.path), tuple(TYPES.values()), shape)
            except (OSError, DataError) as error:
                _LOG.warning("%s is left out: %s", image.path, error)
                continue
            parts[self._shares.part(image.name)].append((image.label, x))
        if not parts["train"]:
            raise DataError(f"{self._root} has nothing to train on", expected="CLASS/image.jpg", got="no image")
        like = parts["train"][0][1]
        arrays = []
        for part in ("train", "test", "val"):
            xs = [x for _, x in parts[part]]
            arrays += [np.stack(xs) if xs else like[None][:0], np.array([c for c, _ in parts[part]], np.int64)]
        return LocalData(*arrays)

    def _look(self) -> None:
        """Find the images, and choose."""
        by_class: dict[int, list[_Image]] = {}
        known = {}
        with storage_errors(f"can't read {self._root}"):
            folders = sorted(p for p in self._root.iterdir() if p.is_dir() and not p.name.startswith("."))
            labels = {f: self._label(f) for f in folders}
            files = [sorted(p for p in f.iterdir() if p.suffix.lower() in ENDINGS) for f in folders]
        if (count := sum(map(len, files))) > _MOST_FILES:
            _LOG.warning("%s holds %d images; %d are looked at, of every class", self._root, count, _MOST_FILES)
        for path in islice(_in_turn(files), _MOST_FILES):
            try:
                status = path.lstat()
                key = path, status.st_size, status.st_mtime_ns
                known[key] = self._known.get(key) or hashlib.sha256(_content(path)).hexdigest()
            except FileNotFoundError:
                continue  # it was deleted, or renamed, since it was listed
            except (OSError, DataError) as error:
                _LOG.warning("%s is left out: %s", path, error)
                continue
            label = labels[path.parent]
            by_class.setdefault(label, []).append(_Image(path, label, known[key]))
        self._known = known
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
    """One of each line in turn, until all are over."""
    return (one for turn in zip_longest(*lines) for one in turn if one is not None)


def _content(path: Path) -> bytes:
    """An image's bytes.

    Raises:
        DataError: It is no plain file, or larger than an image may be.
        OSError: It can't be read; ELOOP for a symbolic link.
    """
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
