"""Layouts of images with boxes around objects: YOLO's text files, and Pascal VOC's XML files.

A model takes boxes as [most, 5]: class, centre x, centre y, width, height, as shares of the image. Unused rows are
-1, 0, 0, 0, 0. If there are too many boxes, the largest are kept.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple
from xml.parsers import expat

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, error_reason, shape_text
from fedprune.model.lengths import Shape
from fedprune_device.data.labels import Targets
from fedprune_device.data.layouts import IMAGES, NO_LABELS, LabelledImages
from fedprune_device.data.part_lists import (
    PartLists,
    read_text,
    read_yolo_settings,
    voc_part_lists,
    yaml_files,
    yaml_names,
    yolo_part_lists,
)

Boxes = npt.NDArray[np.float32]

MAX_CLASS = 2**24 - 1  # larger numbers are not exact in float32, the type of boxes

_BOX_WORDS, _MIN_OUTLINE = 5, 7  # values in a line of a box, and of the shortest outline: a triangle
_MIN_SIDE = 1e-6  # share of an image's side that a box has at least
_EDGE_TOLERANCE = 0.01  # share by which rounded numbers may lie beyond the image: as much as Ultralytics lets pass

_OUTLINES_NOTE = "outlines of objects become the boxes around them"
_UNLISTED_NOTE = "images that no list or folder of a part has are left out"
_KEYPOINTS_NOTE = "keypoints of objects are left out: their boxes are read"


_CLASS_TEXTS = ("classes.txt", "obj.names")  # a name in each line: Label Studio, LabelImg; darknet, CVAT
_CLASS_NOTES = "notes.json"  # Label Studio's, which has the numbers, too


_SIZE = ("annotation", "size")
_OBJECT = ("annotation", "object")
_BOX = (*_OBJECT, "bndbox")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_MAX_DEPTH = 32
_MAX_TEXT = 1000  # characters of a name or a number


def takes_boxes(targets: Targets) -> bool:
    """Whether a model's labels are boxes, [most boxes, 5]."""
    max_boxes, *rest = targets.shape or (None,)
    return rest == [5] and isinstance(max_boxes, int) and not targets.takes_whole_numbers


class _BoxFiles(LabelledImages):
    """Images with a file of boxes for each. Lists of the images of each part may divide them."""

    def __init__(self, root: Path, label_folders: dict[Path, Path], names: tuple[str, ...]) -> None:
        super().__init__(root, label_folders, names)
        self._parts = PartLists()

    def check(self, targets: Targets | None) -> None:
        if targets is not None and not takes_boxes(targets):
            raise DataError(
                f"boxes for loss {targets.loss}",
                expected="labels [most boxes, 5]",
                got=shape_text(*targets.shape),
                hint="Export the model with a loss that takes boxes (fedprune-export --loss, docs/export.md).",
            )

    def split_of(self, path: Path) -> str | None:
        return self._parts.part_of(path) or super().split_of(path)

    def files(self, endings: tuple[str, ...]) -> list[list[Path]]:
        all_files = super().files(endings)
        files = [[path for path in paths if self._parts.has(path)] for paths in all_files]
        if files != all_files:
            self.notes += (_UNLISTED_NOTE,)
        return files

    def _divide(self, parts: PartLists) -> None:
        """Take the parts that files of the data set itself name, before those of the folders' names."""
        self._parts = parts
        if parts:
            self.splits = self.splits | parts.names
            self.notes += parts.notes


class YoloBoxes(_BoxFiles):
    """`labels/NAME.txt` with a line `class cx cy w h` for each box, as YOLO has it; no file for an image without.

    Where the tool that wrote it lists the names of classes, its numbers become those of `names`.
    """

    folders = ("labels",)
    ending = ".txt"
    expected_files = f"{IMAGES}/NAME.jpg with {folders[0]}/NAME.txt"

    def __init__(self, root: Path, label_folders: dict[Path, Path], names: tuple[str, ...]) -> None:
        super().__init__(root, label_folders, names)
        below = [folder for pair in label_folders.items() for folder in (*pair, pair[1].parent)]
        folders = dict.fromkeys([root, *(folder for folder in below if root in folder.parents)])
        listed_names = find_class_list(folders) if names else ()
        settings = read_yolo_settings(folders)
        self._numbers = [names.index(name) if name in names else -1 for name in listed_names]
        self._classes = len(listed_names) or len(names) or MAX_CLASS + 1
        self._has_keypoints = settings.has_keypoints
        self._labelled: set[Path] = set()
        if self._has_keypoints:
            self.notes += (_KEYPOINTS_NOTE,)
        self._divide(yolo_part_lists(root, self._split_of_folder, settings))

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
        return f"{path.parent in self._labelled} {self._numbers} {self._has_keypoints}"

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
        labels = yolo_boxes(label_bytes, self._classes, has_keypoints=self._has_keypoints)
        boxes = labels.boxes
        if labels.has_outlines and _OUTLINES_NOTE not in self.notes:
            self.notes += (_OUTLINES_NOTE,)
        if self._numbers:
            boxes[:, 0] = np.array(self._numbers, np.float32)[boxes[:, 0].astype(int)]
            if (boxes[:, 0] < 0).any():
                raise DataError(
                    "the class of a box",
                    expected="one of --class-names",
                    got="another one in the list of the folder's classes",
                )
        return _pad_boxes(boxes, targets)


class VocBoxes(_BoxFiles):
    """`Annotations/NAME.xml` for `JPEGImages/NAME.jpg`, as Pascal VOC has it, also in `annotations/` and `images/`."""

    folders = ("Annotations", "annotations")
    ending = ".xml"
    expected_files = f"JPEGImages/NAME.jpg with {folders[0]}/NAME.xml"

    def __init__(self, root: Path, label_folders: dict[Path, Path], names: tuple[str, ...]) -> None:
        super().__init__(root, label_folders, names)
        self._names = names
        self._divide(voc_part_lists(root, label_folders))

    def check(self, targets: Targets | None) -> None:
        super().check(targets)
        if targets is not None and not self._names:
            raise DataError(
                "boxes of Pascal VOC",
                expected="names of the classes, whose order all boards share",
                got="none",
                hint="Give them: --class-names A,B,C.",
            )

    def label_file(self, path: Path) -> Path | None:
        return self._label_path(path)

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        return NO_LABELS if targets is None else _pad_boxes(voc_boxes(label_bytes, self._names), targets)


class YoloBeside(YoloBoxes):
    """`NAME.jpg` with `NAME.txt` beside it, as LabelImg and darknet write it. Only models of boxes get the labels."""

    expected_files = "NAME.jpg with NAME.txt"

    def check(self, targets: Targets | None) -> None: ...

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        if targets is None or not takes_boxes(targets):
            return NO_LABELS
        return super().label(path, label_bytes, shape, targets)


class VocBeside(VocBoxes):
    """`NAME.jpg` with `NAME.xml` beside it, as LabelImg and Roboflow write it. Only models of boxes get the labels."""

    expected_files = "NAME.jpg with NAME.xml"

    def check(self, targets: Targets | None) -> None:
        if targets is not None and takes_boxes(targets):
            super().check(targets)

    def label_file(self, path: Path) -> Path | None:
        label_path = self._label_path(path)
        return label_path if os.path.lexists(label_path) else None

    def label(self, path: Path, label_bytes: bytes, shape: Shape, targets: Targets | None) -> npt.NDArray[Any]:
        if targets is None or not takes_boxes(targets):
            return NO_LABELS
        if not label_bytes:
            raise DataError("labels of an image", expected="a file NAME.xml, also without objects", got="none")
        return super().label(path, label_bytes, shape, targets)


def _pad_boxes(boxes: npt.NDArray[np.float32], targets: Targets | None) -> npt.NDArray[np.float32]:
    if targets is None:
        return NO_LABELS
    out = np.zeros((int(targets.shape[0] or 0), 5), np.float32)
    out[:, 0] = -1
    largest_boxes = np.argsort(-boxes[:, 3] * boxes[:, 4], kind="stable")[: len(out)]
    out[: len(largest_boxes)] = boxes[np.sort(largest_boxes)]
    return out


def find_class_list(folders: Iterable[Path]) -> tuple[str, ...]:
    """The names in the first of these files in one of the folders, in the order of their numbers; empty without one.

    Raises `ConfigError` if a file can't be understood, `StorageError` if it can't be read.
    """
    candidates = (
        [*(folder / name for name in _CLASS_TEXTS), *yaml_files(folder), folder / _CLASS_NOTES] for folder in folders
    )
    for path in chain.from_iterable(candidates):
        if not path.is_file():
            continue
        text = read_text(path)
        if path.name in _CLASS_TEXTS:
            return tuple(filter(None, map(str.strip, text.splitlines())))
        names = _categories(text) if path.name == _CLASS_NOTES else yaml_names(text)
        if names is None:
            raise ConfigError(
                f"names in {path}",
                expected="a list, or a mapping of the numbers from 0",
                got="something else",
                hint=f"Or write {_CLASS_TEXTS[0]} beside it, with a name in each line.",
            )
        if names:
            return names
    return ()


def _categories(text: str) -> tuple[str, ...] | None:
    """The names in `notes.json`; empty if it is another tool's file, None if they aren't numbered from 0."""
    try:
        categories = json.loads(text)["categories"]
        names = {category["id"]: category["name"] for category in categories}
    except (ValueError, TypeError, KeyError, RecursionError):
        return ()
    is_list = list(names) == list(range(len(categories))) and all(isinstance(name, str) for name in names.values())
    return tuple(names.values()) if is_list else None


class _Annotation:
    """What a parser has read: the image's width and height, and texts of each object."""

    def __init__(self) -> None:
        self.size: dict[str, str] = {}
        self.objects: list[dict[str, str]] = []
        self._path: list[str] = []
        self._text = ""

    def on_start(self, tag: str, _attributes: object) -> None:
        self._path.append(tag)
        self._text = ""
        if len(self._path) > _MAX_DEPTH:
            raise DataError("labels", expected=f"elements of at most {_MAX_DEPTH} levels", got="more")
        if tuple(self._path) == _OBJECT:
            self.objects.append({})

    def on_text(self, text: str) -> None:
        self._text = (self._text + text)[:_MAX_TEXT]

    def on_end(self, tag: str) -> None:
        parent = tuple(self._path[:-1])
        if parent == _SIZE:
            self.size[tag] = self._text.strip()
        elif parent == _BOX or (parent == _OBJECT and tag == "name"):
            self.objects[-1][tag] = self._text.strip()
        self._path.pop()
        self._text = ""

    def on_doctype(self, *_: object) -> None:
        # A few lines of entities can unfold to gigabytes, or name any file of the board.
        raise DataError("labels", expected="XML without a DOCTYPE", got="one")


def voc_boxes(body: bytes, names: Sequence[str]) -> Boxes:
    """The boxes [n, 5] of an annotation, with the numbers of their names in `names`.

    Pixels count from 1, and a box has its last ones; those of tools that count from 0 begin at most a pixel earlier.
    Raises `DataError`, which names the object by its number.
    """
    annotation = _Annotation()
    parser = expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = annotation.on_start, annotation.on_end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = annotation.on_text, annotation.on_doctype
    try:
        parser.Parse(body, True)
    except (expat.ExpatError, ValueError, LookupError) as error:
        raise DataError("labels", expected="XML of Pascal VOC", got=error_reason(error)) from error
    width, height = (_number(annotation.size.get(name, "")) for name in ("width", "height"))
    if not (width >= 1 and height >= 1):
        raise DataError("labels", expected="<size> with the image's width and height", got="none")
    boxes = []
    for number, texts in enumerate(annotation.objects, 1):
        place = f"object {number} of the labels"
        if texts.get("name", "") not in names:
            raise DataError(place, expected="a name of --class-names", got="another one")
        left, top, right, bottom = (_number(texts.get(side, "")) for side in _SIDES)
        left, top = (side - 1 if side >= 1 else min(side, 0.0) for side in (left, top))
        centre = (left + right) / 2 / width, (top + bottom) / 2 / height
        sides = (*centre, (right - left) / width, (bottom - top) / height)
        boxes.append([names.index(texts["name"]), *clipped_box(sides, place)])
    return np.array(boxes, np.float32).reshape(-1, 5)


def _number(text: str) -> float:
    """The number of a text; NaN if it has none."""
    try:
        return float(text) if "_" not in text else float("nan")
    except ValueError:
        return float("nan")


class YoloLabels(NamedTuple):
    """The boxes [n, 5] of a file, and whether some of them are those around outlines."""

    boxes: Boxes
    has_outlines: bool


def yolo_boxes(body: bytes, classes: int = MAX_CLASS + 1, *, has_keypoints: bool = False) -> YoloLabels:
    """The boxes of a text with a line `class cx cy w h`, or `class x1 y1 x2 y2 x3 y3 ...` for an outline, for each.

    With `has_keypoints` what follows a box are keypoints. Raises `DataError`, which names the line.
    """
    try:
        lines = body.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("labels", expected="text", got=error_reason(error)) from error
    boxes, has_outlines = [], False
    for number, line in enumerate(lines, 1):
        if not (words := line.split()):
            continue
        place = f"line {number} of the labels"
        is_outline = len(words) >= _MIN_OUTLINE and len(words) % 2 == 1 and not has_keypoints
        if not (len(words) == _BOX_WORDS or is_outline or (has_keypoints and len(words) > _BOX_WORDS)):
            hint = "A sixth value is a prediction's confidence: save labels without it." if len(words) == 6 else ""
            raise DataError(
                place, expected="class cx cy w h, or an outline of x and y", got=f"{len(words)} values", hint=hint
            )
        kind, *numbers = map(_parsed_number, words)
        if not (0 <= kind < classes and kind % 1 == 0):
            raise DataError(place, expected=f"a class from 0 to {classes - 1}", got="something else")
        if is_outline:  # of points x1 y1 x2 y2 ...: numpy's least and largest are NaN if one of them is
            points = np.reshape(numbers, (-1, 2))
            low, high = points.min(0), points.max(0)
            numbers = [*((low + high) / 2).tolist(), *(high - low).tolist()]
        boxes.append([kind, *clipped_box(numbers[:4], place)])
        has_outlines |= is_outline
    return YoloLabels(np.array(boxes, np.float32).reshape(-1, 5), has_outlines)


def clipped_box(sides: Sequence[float], place: str) -> list[float]:
    """Centre x and y, width and height of a box within the image. Raises `DataError`, which names the `place`, if they
    are no shares of it."""
    _, _, width, height = sides
    if not all(-_EDGE_TOLERANCE <= v <= 1 + _EDGE_TOLERANCE for v in sides) or min(width, height) < _MIN_SIDE:
        raise DataError(place, expected="shares of the image, from 0 to 1", got="something else")
    return [min(max(v, 0.0), 1.0) for v in sides]


def _parsed_number(text: str) -> float:
    """The number of a text; NaN if it has none."""
    try:
        return math.nan if "_" in text else float(text)  # Python reads 1_2 as 12
    except ValueError:
        return math.nan
