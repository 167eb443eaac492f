"""Reads boxes around objects in images from the text files of YOLO.

A box is float32 [5]: its class, its centre's x and y, its width and height, the last four as shares of the image.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, error_reason

Boxes = npt.NDArray[np.float32]

MAX_CLASS = 2**24 - 1  # larger numbers are not exact in float32, the type of boxes

_MIN_SIDE = 1e-6  # share of an image's side that a box has at least
_EDGE_TOLERANCE = 0.01  # share by which rounded numbers may lie beyond the image: as much as Ultralytics lets pass


def yolo_boxes(body: bytes, classes: int = MAX_CLASS + 1) -> Boxes:
    """The boxes [n, 5] of a text with a line `class cx cy w h` for each; raises `DataError`, which names the line."""
    try:
        lines = body.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError("labels", expected="text", got=error_reason(error)) from error
    boxes = []
    for number, line in enumerate(lines, 1):
        if not (words := line.split()):
            continue
        place = f"line {number} of the labels"
        if len(words) != 5:
            hint = "Boxes are read, outlines are not." if len(words) > 5 else ""
            hint = "A sixth value is a prediction's confidence: save labels without it." if len(words) == 6 else hint
            raise DataError(place, expected="class cx cy w h", got=f"{len(words)} values", hint=hint)
        kind, *sides = map(_parsed_number, words)
        if not (0 <= kind < classes and kind % 1 == 0):
            raise DataError(place, expected=f"a class from 0 to {classes - 1}", got="something else")
        if not all(-_EDGE_TOLERANCE <= v <= 1 + _EDGE_TOLERANCE for v in sides) or min(sides[2:]) < _MIN_SIDE:
            raise DataError(place, expected="shares of the image, from 0 to 1", got="something else")
        boxes.append([kind, *(min(max(v, 0.0), 1.0) for v in sides)])
    return np.array(boxes, np.float32).reshape(-1, 5)


def _parsed_number(text: str) -> float:
    """The number of a text; NaN if it has none."""
    try:
        return math.nan if "_" in text else float(text)  # Python reads 1_2 as 12
    except ValueError:
        return math.nan
