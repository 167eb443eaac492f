"""Boxes around objects in images: the text files of YOLO, and COCO's JSON.

A box is float32 [5]: its class, its centre's x and y, its width and height, the last four as shares of the image.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ConfigError, DataError, reason, shown

Boxes = npt.NDArray[np.float32]

MOST_CLASS = 2**24 - 1

COCO_BYTES = 16 * 2**20  # what is parsed of it takes several times as much

_LEAST = 1e-6  # share of an image's side that a box has at least
_EDGE = 0.01  # share by which numbers may lie beyond the image, for rounding: as much as Ultralytics lets pass


def yolo_boxes(body: bytes, classes: int = MOST_CLASS + 1) -> Boxes:
    """The boxes [n, 5] of a text with a line `class cx cy w h` for each; raises `DataError`, which names the line."""
    try:
        lines = body.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("labels", expected="text", got=reason(error)) from error
    out = []
    for number, line in enumerate(lines, 1):
        if not (parts := line.split()):
            continue
        where = f"line {number} of the labels"
        if len(parts) != 5:
            hint = "Boxes are read, outlines are not." if len(parts) > 5 else ""
            hint = "A sixth value is a prediction's confidence: save labels without it." if len(parts) == 6 else hint
            raise DataError(where, expected="class cx cy w h", got=f"{len(parts)} values", hint=hint)
        kind, *sides = map(_parsed_number, parts)
        if not (0 <= kind < classes and kind % 1 == 0):
            raise DataError(where, expected=f"a class from 0 to {classes - 1}", got="something else")
        if not all(-_EDGE <= v <= 1 + _EDGE for v in sides) or min(sides[2:]) < _LEAST:
            raise DataError(where, expected="shares of the image, from 0 to 1", got="something else")
        out.append([kind, *(min(max(v, 0.0), 1.0) for v in sides)])
    return np.array(out, np.float32).reshape(-1, 5)


def _parsed_number(text: str) -> float:
    """The number of a text; NaN if it has none."""
    try:
        return math.nan if "_" in text else float(text)  # Python reads 1_2 as 12
    except ValueError:
        return math.nan


def coco_boxes(body: bytes, names: Sequence[str] = ()) -> dict[str, Boxes]:
    """The boxes [n, 5] of each image in a COCO file, by the image's name.

    Crowds (`iscrowd`) are left out, boxes cut at the image's edges. Raises `DataError` if the file is damaged,
    `ConfigError` if a category is not among `names`.
    """
    if len(body) > COCO_BYTES:
        raise DataError("size", expected=f"at most {COCO_BYTES} bytes", got="more", hint="Leave segmentations out.")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise DataError("not COCO", expected="JSON", got=reason(error)) from error
    if not isinstance(found, dict):
        raise DataError("not COCO", expected="an object with images, annotations, categories", got=type(found).__name__)
    classes = _classes(_entries(found, "categories"), names)
    sizes: dict[int, tuple[str, float, float]] = {}
    boxes: dict[str, list[list[float]]] = {}
    for where, image in _entries(found, "images"):
        name = image.get("file_name")
        if not isinstance(name, str) or name in boxes:
            raise DataError(
                f"{where}.file_name",
                expected="a name of its own",
                got="another's" if isinstance(name, str) else _kind(name),
            )
        boxes[name] = []
        width, height = (_number(f"{where}.{side}", image.get(side)) for side in ("width", "height"))
        if min(width, height) < 1:
            raise DataError(f"size of {where}", expected="at least 1 x 1", got=f"{width:g} x {height:g}")
        sizes[_id(f"{where}.id", image.get("id"))] = name, width, height
    for where, one in _entries(found, "annotations"):
        if one.get("iscrowd"):
            continue
        of, category = (_id(f"{where}.{n}", one.get(n)) for n in ("image_id", "category_id"))
        if of not in sizes or category not in classes:
            raise DataError(where, expected="an image and a category of the file", got="another id")
        name, width, height = sizes[of]
        box = one.get("bbox")
        if not isinstance(box, list) or len(box) != 4:
            raise DataError(f"{where}.bbox", expected="[x, y, width, height]", got=_kind(box))
        x, y, w, h = (_number(f"{where}.bbox", v) for v in box)
        edges = x / width, y / height, (x + w) / width, (y + h) / height
        left, top, right, bottom = (min(max(v, 0.0), 1.0) for v in edges)
        if right - left >= _LEAST and bottom - top >= _LEAST:
            sides = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
            boxes[name].append([float(classes[category]), *sides])
    return {name: np.array(some, np.float32).reshape(-1, 5) for name, some in boxes.items()}


def _classes(categories: list[tuple[str, dict[str, Any]]], names: Sequence[str]) -> dict[int, int]:
    """The class of each category by its id."""
    of = {_id(f"{where}.id", one.get("id")): one.get("name") for where, one in categories}
    if not names:
        return {key: number for number, key in enumerate(sorted(of))}
    unknown = [name for name in of.values() if name not in names]
    if unknown:
        raise ConfigError(
            "a category is no class", expected=" or ".join(names), got=shown(unknown[0]),
            hint="Give the categories' names in the order that all boards share: --class-names A,B,C.",
        )  # fmt: skip
    return {key: names.index(str(name)) for key, name in of.items()}


def _entries(found: dict[str, Any], name: str) -> list[tuple[str, dict[str, Any]]]:
    entries = found.get(name)
    if not isinstance(entries, list) or not all(isinstance(one, dict) for one in entries):
        raise DataError(name, expected="a list of objects", got=_kind(entries))
    return [(f"{name}[{number}]", one) for number, one in enumerate(entries)]


def _id(where: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(where, expected="a whole number", got=_kind(value))
    return value


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 2**31:
        raise DataError(where, expected="a number", got=_kind(value))
    return float(value)


def _kind(value: object) -> str:
    """The kind of a value, without the value itself: a message may be sent to the server."""
    if isinstance(value, (list, dict)):
        return f"{type(value).__name__} of length {len(value)}"
    return "nothing" if value is None else f"another {type(value).__name__}"
