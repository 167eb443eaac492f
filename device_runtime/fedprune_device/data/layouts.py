"""Recognises the layout of a folder of samples: which files are samples, and where their labels are.

A folder may be divided into parts for training, validation and testing, as tools of the field write it: `train/` and
`val/` with a layout in each (Roboflow, torchvision), or in `images/` and `labels/` (Ultralytics).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, shape_text
from fedprune.model.lengths import Shape
from fedprune_device.data.boxes import MAX_CLASS, yolo_boxes
from fedprune_device.data.class_lists import find_class_list
from fedprune_device.data.folder_listing import files_in, folders_below, folders_in
from fedprune_device.data.image_decoding import ENDINGS, read_mask
from fedprune_device.data.labels import Targets, class_counts

NO_LABELS = np.zeros(0, np.float32)  # the labels of a sample that has none

IMAGES = "images"  # the folder of images whose labels are in a folder next to it

# The class that masks of Pascal VOC, Cityscapes and their tools give to pixels that count for nothing.
IGNORED_CLASS = 255

MAX_LABEL_BYTES = 4 * 2**20  # most bytes of a file with labels: that of an image

# The parts of a data set by the names that tools give their folders.
_PART_OF_FOLDER = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class Layout:
    """The layout of some folders, by default without labels.

    A folder whose name is in `names` is a class; others may be a split, such as `train`.

    Attributes:
        expected_files: The files that the layout expects, for messages.
        splits: The parts that the folder itself is divided into; empty if it isn't.
    """

    expected_files = ""

    def __init__(self, root: Path, folders: Iterable[Path], names: tuple[str, ...]) -> None:
        self._split_of_folder = {folder: _split_of_path(folder.relative_to(root).parts, names) for folder in folders}
        self.splits = frozenset(split for split in self._split_of_folder.values() if split is not None)

    def split_of(self, path: Path) -> str | None:
        """The part of a sample, if the folder is divided."""
        return self._split_of_folder[path.parent]

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        """Files with these endings: a sorted list for each class, or one list."""
        return [[path for folder in self._split_of_folder for path in files_in(folder, endings)]]

    def label_file(self, path: Path) -> Path | None:
        """The file with a sample's labels, if it has one of its own."""
        return None

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
    folder = folder[1:] if folder[:1] == (IMAGES,) else folder
    return _PART_OF_FOLDER.get(folder[0].lower()) if folder and folder[0] not in names else None


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
        elif any(sibling.name.lower() in _PART_OF_FOLDER for sibling in folders_in(folder.parent)):
            hint = "Of a divided folder all folders are parts, such as train, val and test: move the others away."
        raise ConfigError(f"{folder} is not the folder of a class", expected=expected, got=folder.name, hint=hint)


class Unlabelled(Layout):
    """Files in folders, without labels."""

    expected_files = "files without labels"


class _Images(Layout):
    """Images in some folders, with a file of the same name in another folder for each.

    `label_folders` has the folder of labels for each folder of images.
    """

    folder = ""
    ending = ""

    def __init__(self, root: Path, label_folders: dict[Path, Path], names: tuple[str, ...]) -> None:
        self._label_folders = label_folders
        super().__init__(root, label_folders, names)

    def _label_path(self, path: Path) -> Path:
        return self._label_folders[path.parent] / f"{path.stem}{self.ending}"


class MaskFiles(_Images):
    """`masks/NAME.png`: the class of each pixel, `IGNORED_CLASS` for none."""

    folder = "masks"
    ending = ".png"
    expected_files = f"{IMAGES}/NAME.jpg with {folder}/NAME.png"

    def label_file(self, path: Path) -> Path | None:
        return self._label_path(path)

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


def takes_boxes(targets: Targets) -> bool:
    """Whether a model's labels are boxes, [most boxes, 5]."""
    max_boxes, *rest = targets.shape or (None,)
    return rest == [5] and isinstance(max_boxes, int) and not targets.takes_whole_numbers


class YoloBoxes(_Images):
    """`labels/NAME.txt` with a line `class cx cy w h` for each box, as YOLO has it; no file for an image without.

    A model takes boxes as [most, 5]: class, centre x, centre y, width, height, as shares of the image. Unused rows are
    -1, 0, 0, 0, 0. If there are too many boxes, the largest are kept.

    Where the tool that wrote it lists the names of classes, its numbers become those of `names`.
    """

    folder = "labels"
    ending = ".txt"
    expected_files = f"{IMAGES}/NAME.jpg with {folder}/NAME.txt"

    def __init__(self, root: Path, label_folders: dict[Path, Path], names: tuple[str, ...]) -> None:
        super().__init__(root, label_folders, names)
        below = [folder for pair in label_folders.items() for folder in (*pair, pair[1].parent)]
        folders = dict.fromkeys([root, *(folder for folder in below if root in folder.parents)])
        listed_names = find_class_list(folders) if names else ()
        self._numbers = [names.index(name) if name in names else -1 for name in listed_names]
        self._classes = len(listed_names) or len(names) or MAX_CLASS + 1
        self._labelled: set[Path] = set()

    def check(self, targets: Targets | None) -> None:
        if targets is not None and not takes_boxes(targets):
            raise DataError(
                f"boxes for loss {targets.loss}", expected="labels [most boxes, 5]", got=shape_text(*targets.shape)
            )

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        files = super().files(endings)
        for path in files[0]:
            if path.parent not in self._labelled and self.label_file(path) is not None:
                self._labelled.add(path.parent)
        return files

    def label_file(self, path: Path) -> Path | None:
        label_path = self._label_path(path)
        return label_path if os.path.lexists(label_path) else None

    def version(self, path: Path) -> str:
        return f"{path.parent in self._labelled} {self._numbers}"

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        if targets is not None and path.parent not in self._labelled:
            # If no image of a folder has a label file, the label folder is probably missing: refuse, rather than learn
            # that there are no objects anywhere.
            raise DataError(
                f"labels of a folder of {IMAGES}",
                expected=self.expected_files,
                got="none for any of its images",
                hint="Give an image without objects an empty file.",
            )
        boxes = yolo_boxes(label_bytes, self._classes)
        if self._numbers:
            boxes[:, 0] = np.array(self._numbers, np.float32)[boxes[:, 0].astype(int)]
            if (boxes[:, 0] < 0).any():
                raise DataError(
                    "the class of a box",
                    expected="one of --class-names",
                    got="another one in the list of the folder's classes",
                )
        return _pad_boxes(boxes, targets)


def _pad_boxes(boxes: npt.NDArray[np.float32], targets: Targets | None) -> npt.NDArray[np.float32]:
    if targets is None:
        return NO_LABELS
    out = np.zeros((int(targets.shape[0] or 0), 5), np.float32)
    out[:, 0] = -1
    largest_boxes = np.argsort(-boxes[:, 3] * boxes[:, 4], kind="stable")[: len(out)]
    out[: len(largest_boxes)] = boxes[np.sort(largest_boxes)]
    return out


class BoxesBeside(YoloBoxes):
    """`NAME.jpg` with `NAME.txt` beside it, as LabelImg and darknet write it. Only models of boxes get the labels."""

    expected_files = "NAME.jpg with NAME.txt"

    def check(self, targets: Targets | None) -> None: ...

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        if targets is None or not takes_boxes(targets):
            return NO_LABELS
        return super().label(path, label_bytes, shape, targets)


def layout_of(root: Path, names: tuple[str, ...]) -> Layout:
    """The layout of a folder. Raises `ConfigError` if a folder is no class, `DataError` or `StorageError` if a file
    about all of its samples can't be read."""
    folders = folders_in(root, names)
    folder_splits = [_PART_OF_FOLDER.get(folder.name.lower()) for folder in folders if folder.name not in names]
    is_divided = len(folder_splits) == len(folders) and "train" in folder_splits and all(folder_splits)
    homes = folders if is_divided else [root]
    homes_of_images = [home for home in homes if IMAGES not in names and (home / IMAGES).is_dir()]
    if homes_of_images:
        for kind in (MaskFiles, YoloBoxes):
            if any((home / kind.folder).is_dir() for home in homes_of_images):
                return kind(root, _label_folders(homes_of_images, kind.folder), names)
        folders = [folder for home in homes_of_images for folder in folders_below(home / IMAGES)]
    elif any(folders_in(home, names) for home in homes):
        return ClassFolders(root, homes, names)
    else:
        folders = homes
    if any(map(_has_labels_beside, folders)):
        return BoxesBeside(root, {folder: folder for folder in folders}, names)
    return Unlabelled(root, folders, names)


def _label_folders(homes: Iterable[Path], name: str) -> dict[Path, Path]:
    """The folders in `images/` of each home, and the same below its folder `name`."""
    return {
        folder: home / name / folder.relative_to(home / IMAGES)
        for home in homes
        for folder in folders_below(home / IMAGES)
    }


def _has_labels_beside(folder: Path) -> bool:
    texts = {path.stem for path in files_in(folder, (YoloBoxes.ending,))}
    return bool(texts) and any(path.stem in texts for path in files_in(folder, ENDINGS))
