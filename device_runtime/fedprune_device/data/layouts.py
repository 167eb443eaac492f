"""Layouts of a folder of samples: which files are samples, and where their labels are. `folder_layout` recognises them.

A folder may be divided into parts for training, validation and testing, as tools of the field write it: `train/` and
`val/` with a layout in each (Roboflow, torchvision), or in `images/` and `labels/` (Ultralytics).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, shape_text
from fedprune.model.lengths import Shape
from fedprune_device.data.folder_listing import files_in, folders_below, folders_in
from fedprune_device.data.image_decoding import ENDINGS, read_mask
from fedprune_device.data.labels import Targets, class_counts

NO_LABELS = np.zeros(0, np.float32)  # the labels of a sample that has none

IMAGES = "images"  # the folder of images whose labels are in a folder next to it
IMAGE_FOLDERS = (IMAGES, "JPEGImages")  # the second one is Pascal VOC's

# The class that masks of Pascal VOC, Cityscapes and their tools give to pixels that count for nothing.
IGNORED_CLASS = 255

MAX_LABEL_BYTES = 4 * 2**20  # most bytes of a file with labels: that of an image

# The parts of a data set by the names that tools give their folders: also train2017 (COCO), obj_train_data (CVAT).
_PART_OF_NAME = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_PART_FOLDER = re.compile(rf"(?:obj_)?({'|'.join(_PART_OF_NAME)})(?:_data|[0-9]{{4}})?")


class Layout:
    """The layout of some folders, by default without labels.

    A folder whose name is in `names` is a class; others may be a split, such as `train`.

    Attributes:
        expected_files: The files that the layout expects, for messages.
        splits: The parts that the folder itself is divided into; empty if it isn't.
        notes: What the layout chose where there was a choice.
    """

    expected_files = ""

    def __init__(self, root: Path, folders: Iterable[Path], names: tuple[str, ...]) -> None:
        self._split_of_folder = {folder: _split_of_path(folder.relative_to(root).parts, names) for folder in folders}
        self.splits = frozenset(split for split in self._split_of_folder.values() if split is not None)
        self.notes: tuple[str, ...] = ()

    def split_of(self, path: Path) -> str | None:
        """The part of a sample, if the folder is divided."""
        return self._split_of_folder[path.parent]

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        """Files with these endings: a sorted list for each class, or one list."""
        return [[path for folder in self._split_of_folder for path in files_in(folder, endings)]]

    def label_file(self, path: Path) -> Path | None:
        """The file with a sample's labels, if it has one of its own."""
        return None

    def missing_label_text(self, path: Path) -> str:
        """Why the file of a sample's labels is missing, without the sample's name."""
        return "it has no file of labels"

    def check(self, targets: Targets | None) -> None:
        """Refuse a model whose labels no folder of this layout has; raises `DataError`."""

    def version(self, path: Path) -> str:
        """A text that changes when a sample's labels change for another reason than its label file."""
        return ""

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        """A sample's labels, for a model's input `shape` and the labels that its loss takes.

        Without `targets` it may be `NO_LABELS`. Raises `DataError` if the labels are damaged or don't fit.
        """
        return NO_LABELS


def _split_of_path(folder: Sequence[str], names: tuple[str, ...]) -> str | None:
    folder = folder[1:] if folder and folder[0] in IMAGE_FOLDERS else folder
    return part_of_folder(folder[0]) if folder and folder[0] not in names else None


def part_of_folder(name: str) -> str | None:
    """The part of a data set, `train`, `val` or `test`, whose samples a folder of this name has; None if it is another
    folder."""
    match = _PART_FOLDER.fullmatch(name.lower())
    return None if match is None else _PART_OF_NAME[match[1]]


class ClassFolders(Layout):
    """`CLASS/file`, also in folders within CLASS. Raises `ConfigError` unless CLASS is a number or one of the names."""

    expected_files = "CLASS/file"

    def __init__(self, root: Path, homes: Iterable[Path], names: tuple[str, ...]) -> None:
        self._names = names
        labels = {folder: self._label(folder) for home in homes for folder in folders_in(home, names)}
        self._labels = {below: label for folder, label in labels.items() for below in folders_below(folder)}
        super().__init__(root, self._labels, names)

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        by_class: dict[int, list[Path]] = {}
        for folder, label in self._labels.items():
            by_class.setdefault(label, []).extend(files_in(folder, endings))
        return list(by_class.values())

    def version(self, path: Path) -> str:
        return str(self._labels[path.parent])

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        return np.array(self._labels[path.parent], np.int64)

    def _label(self, folder: Path) -> int:
        if folder.name in self._names:
            return self._names.index(folder.name)
        if folder.name.isdecimal() and folder.name.isascii() and len(folder.name) < 8:
            return int(folder.name)
        expected = " or ".join(self._names) or "a number"
        hint = "Give the classes' names in the order that all boards share: --class-names A,B,C."
        if (folder / IMAGES).is_dir():
            hint = f"It has {IMAGES} in it: give it as the folder of samples itself."
        elif any(part_of_folder(sibling.name) for sibling in folders_in(folder.parent)):
            hint = "Of a divided folder all folders are parts, such as train, val and test: move the others away."
        raise ConfigError(f"{folder} is not the folder of a class", expected=expected, got=folder.name, hint=hint)


class Unlabelled(Layout):
    """Files in folders, without labels."""

    expected_files = "files without labels"


class SingleFile(Unlabelled):
    """One picture or recording, as a folder of one."""

    def __init__(self, path: Path) -> None:
        super().__init__(path.parent, [path.parent], ())
        self._path = path

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        return [[self._path] if self._path.suffix.lower() in endings else []]


class LabelledImages(Layout):
    """Images in some folders, with a file of the same name in another folder for each.

    `label_folders` has the folder of labels for each folder of images.
    """

    folders: tuple[str, ...] = ()  # names of the folders of labels
    ending = ""

    def __init__(self, root: Path, label_folders: dict[Path, Path], names: tuple[str, ...]) -> None:
        self._label_folders = label_folders
        super().__init__(root, label_folders, names)

    def _label_path(self, path: Path) -> Path:
        return self._label_folders[path.parent] / f"{path.stem}{self.ending}"


class MaskFiles(LabelledImages):
    """`masks/NAME.png`: the class of each pixel, `IGNORED_CLASS` for none."""

    folders = ("masks",)
    ending = ".png"
    expected_files = f"{IMAGES}/NAME.jpg with {folders[0]}/NAME.png"

    def label_file(self, path: Path) -> Path | None:
        return self._label_path(path)

    def missing_label_text(self, path: Path) -> str:
        mask = self._label_path(path)
        ending = next((ending for ending in ENDINGS if mask.with_suffix(ending).exists()), "")
        return (
            f"its mask ends in {ending}, and masks must be PNG files, which keep each pixel's number"
            if ending
            else f"it has no mask {self.folders[0]}/NAME{self.ending}"
        )

    def check(self, targets: Targets | None) -> None:
        if targets is not None and len(targets.shape) != (2 if targets.takes_whole_numbers else 3):
            raise DataError(
                f"masks for loss {targets.loss}",
                expected="a model with labels [height, width], or [K, height, width]",
                got=shape_text(*targets.shape),
            )

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        if targets is None:
            return NO_LABELS
        height, width = (
            int(side if isinstance(side, int) else size if isinstance(size, int) else 1)
            for side, size in zip(targets.shape[-2:], shape[-2:], strict=True)
        )
        classes = read_mask(label_bytes, height, width)
        if not targets.takes_whole_numbers:
            per_class = classes > 0 if targets.classes == 1 else classes == np.arange(targets.classes)[:, None, None]
            return per_class.reshape(targets.classes, height, width).astype(np.float32)
        if targets.ignored is not None and targets.classes <= IGNORED_CLASS:
            classes[classes == IGNORED_CLASS] = targets.ignored
        if targets.loss != "cross_entropy":
            return classes.astype(np.int32)
        class_counts(classes, targets.classes, targets.ignored)
        return classes.astype(np.uint8 if 0 <= (targets.ignored or 0) <= 255 >= targets.classes else np.int32)
