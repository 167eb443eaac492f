"""Which files of a folder are samples, and what their labels are."""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, DataError, shape_text
from fedprune.model.lengths import Shape
from fedprune_device.data.boxes import COCO_BYTES, MOST_CLASS, coco_boxes, yolo_boxes
from fedprune_device.data.image_decoding import mask
from fedprune_device.data.labels import Targets, class_counts

NO_LABELS = np.zeros(0, np.float32)
"""The labels of a sample that has none."""

IMAGES = "images"  # the folder of images whose labels are in a folder next to it

IGNORED = 255
"""Places of a mask that count for nothing, where the recipe names such a class."""

LABEL_BYTES = 4 * 2**20  # most bytes of a file with labels


class Layout(Protocol):
    """The arrangement of a folder."""

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        """Files with these endings: a sorted list for each class, or one list."""

    def label_file(self, path: Path) -> Path | None:
        """The file with a sample's labels, if it has one of its own."""

    def check(self, targets: Targets | None) -> None:
        """Refuse a model whose labels no folder of this layout has; raises `DataError`."""

    def version(self, path: Path) -> str:
        """A text that changes when a sample's labels change for another reason than its label file."""

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        """A sample's labels, for a model's input `shape` and the labels that its loss takes, where they are known.

        `NO_LABELS` where they are not. Raises `DataError` if they are damaged or don't fit.
        """


class ClassFolders:
    """`CLASS/file`, where CLASS is a number or one of the names; raises `ConfigError` if a folder is not a class."""

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self._names = names
        self._labels = {folder: self._label(folder) for folder in folders_in(root)}

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        by_class: dict[int, list[Path]] = {}
        for folder, label in self._labels.items():
            by_class.setdefault(label, []).extend(listed(folder, endings))
        return list(by_class.values())

    def label_file(self, path: Path) -> Path | None:
        return None

    def check(self, targets: Targets | None) -> None: ...

    def version(self, path: Path) -> str:
        return str(self._labels[path.parent])

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        return np.array(self._labels[path.parent], np.int64)

    def _label(self, folder: Path) -> int:
        if folder.name in self._names:
            return self._names.index(folder.name)
        if folder.name.isdecimal() and folder.name.isascii() and len(folder.name) < 8:
            return int(folder.name)
        wanted = " or ".join(self._names) or "a number"
        raise ConfigError(
            f"{folder} is not the folder of a class", expected=wanted, got=folder.name,
            hint="Give the classes' names in the order that all boards share: --class-names A,B,C.",
        )  # fmt: skip


class Unlabelled:
    """Files in one folder, without labels."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        return [listed(self._folder, endings)]

    def label_file(self, path: Path) -> Path | None:
        return None

    def check(self, targets: Targets | None) -> None: ...

    def version(self, path: Path) -> str:
        return ""

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        return NO_LABELS


class _Images(Unlabelled):
    """Images in `images/`, with a file of the same name in another folder for each, or one file for all."""

    def __init__(self, root: Path) -> None:
        super().__init__(root / IMAGES)
        self._root = root


class Masks(_Images):
    """`masks/NAME.png`: the class of each pixel, `IGNORED` for none."""

    folder = "masks"

    def label_file(self, path: Path) -> Path | None:
        return self._root / self.folder / f"{path.stem}.png"

    def check(self, targets: Targets | None) -> None:
        if targets is not None and len(targets.shape) != (2 if targets.takes_whole else 3):
            raise DataError(
                f"masks for loss {targets.loss}",
                expected="a model with labels [height, width], or [K, height, width]",
                got=shape_text(*targets.shape),
            )

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        if targets is None:
            return NO_LABELS
        height, width = (
            int(own if isinstance(own, int) else size if isinstance(size, int) else 1)
            for own, size in zip(targets.shape[-2:], shape[-2:], strict=True)
        )
        found = mask(label_bytes, height, width)
        if not targets.takes_whole:
            each = found > 0 if targets.classes == 1 else found == np.arange(targets.classes)[:, None, None]
            return each.reshape(targets.classes, height, width).astype(np.float32)
        if targets.ignored is not None and targets.classes <= IGNORED:
            found[found == IGNORED] = targets.ignored
        if targets.loss != "cross_entropy":
            return found.astype(np.int32)
        class_counts(found, targets.classes, targets.ignored)
        return found.astype(np.uint8 if 0 <= (targets.ignored or 0) <= 255 >= targets.classes else np.int32)


class _Boxes(_Images):
    """Boxes as a model takes them, [most, 5]: class, centre x, centre y, width, height, as shares of the image.

    Unused rows are -1, 0, 0, 0, 0. If there are too many boxes, the largest are kept.
    """

    def check(self, targets: Targets | None) -> None:
        if targets is None:
            return
        most, *rest = targets.shape or (None,)
        if rest != [5] or not isinstance(most, int) or targets.takes_whole:
            raise DataError(
                f"boxes for loss {targets.loss}", expected="labels [most boxes, 5]", got=shape_text(*targets.shape)
            )

    def padded(self, boxes: npt.NDArray[np.float32], targets: Targets | None) -> npt.NDArray[np.float32]:
        if targets is None:
            return NO_LABELS
        out = np.zeros((int(targets.shape[0] or 0), 5), np.float32)
        out[:, 0] = -1
        largest = np.argsort(-boxes[:, 3] * boxes[:, 4], kind="stable")[: len(out)]
        out[: len(largest)] = boxes[np.sort(largest)]
        return out


class YoloBoxes(_Boxes):
    """`labels/NAME.txt` with a line `class cx cy w h` for each box, as YOLO has it; no file for an image without."""

    folder = "labels"

    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        super().__init__(root)
        self._classes = len(names) or MOST_CLASS + 1

    def label_file(self, path: Path) -> Path | None:
        found = self._root / self.folder / f"{path.stem}.txt"
        return found if os.path.lexists(found) else None

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        return self.padded(yolo_boxes(label_bytes, self._classes), targets)


class CocoBoxes(_Boxes):
    """A file in COCO's format; its categories are numbered by the class names or, without any, in the order of their
    ids."""

    def __init__(self, root: Path, path: Path, names: tuple[str, ...]) -> None:
        super().__init__(root)
        with storage_errors(f"can't read {path}"):
            status = path.stat()
        self._path = path
        self._boxes = _coco_boxes(path, names, status.st_size, status.st_mtime_ns)

    def version(self, path: Path) -> str:
        return hashlib.sha256(self._of(path).tobytes()).hexdigest()

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        return self.padded(self._of(path), targets)

    def _of(self, path: Path) -> npt.NDArray[np.float32]:
        if path.name not in self._boxes:
            raise DataError(f"{self._path.name} doesn't list the image")
        return self._boxes[path.name]


def coco_file(root: Path) -> Path | None:
    """`annotations.json`, or the only `.json` in `annotations/`; raises `ConfigError` if there are several."""
    if (path := root / "annotations.json").is_file():
        return path
    found = listed(root / "annotations", (".json",)) if (root / "annotations").is_dir() else []
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise ConfigError(f"{root}/annotations", expected="one .json", got=names, hint="Keep the one with the boxes.")
    return found[0] if found else None


@lru_cache(maxsize=1)
def _coco_boxes(path: Path, names: tuple[str, ...], size: int, changed: int) -> dict[str, npt.NDArray[np.float32]]:
    """A file's boxes. Its size and time of change are arguments, so that the cache parses an unchanged file once."""
    with storage_errors(f"can't read {path}"), path.open("rb") as file:
        body = file.read(COCO_BYTES + 1)
    try:
        return coco_boxes(body, names)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def layout_of(root: Path, names: tuple[str, ...]) -> Layout:
    """The layout of a folder.

    Raises `ConfigError` if a folder or category is no class, `DataError` or `StorageError` if a file about all of its
    samples can't be read.
    """
    if (root / IMAGES).is_dir() and IMAGES not in names:
        if (root / Masks.folder).is_dir():
            return Masks(root)
        if (root / YoloBoxes.folder).is_dir():
            return YoloBoxes(root, names)
        if (path := coco_file(root)) is not None:
            return CocoBoxes(root, path, names)
        return Unlabelled(root / IMAGES)
    return ClassFolders(root, names) if folders_in(root) else Unlabelled(root)


def folders_in(root: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones; raises `StorageError`."""
    with storage_errors(f"can't read {root}"):
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def listed(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Files of a folder by their endings, sorted; raises `StorageError`."""
    with storage_errors(f"can't read {folder}"):
        return sorted(p for p in folder.iterdir() if p.suffix.lower() in endings)
