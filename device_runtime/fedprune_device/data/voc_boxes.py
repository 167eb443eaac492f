"""Reads boxes around objects from the XML files of Pascal VOC, without entities or other files that they may name."""

from __future__ import annotations

from collections.abc import Sequence
from xml.parsers import expat

import numpy as np

from fedprune.core.errors import DataError, error_reason
from fedprune_device.data.boxes import Boxes, clipped_box

_SIZE = ("annotation", "size")
_OBJECT = ("annotation", "object")
_BOX = (*_OBJECT, "bndbox")
_SIDES = ("xmin", "ymin", "xmax", "ymax")
_MAX_DEPTH = 32
_MAX_TEXT = 1000  # characters of a name or a number


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
