"""Reads boxes around objects in images from the text files of YOLO.

A box is float32 [5]: its class, its centre's x and y, its width and height, the last four as shares of the image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import DataError, error_reason

Boxes = npt.NDArray[np.float32]

MAX_CLASS = 2**24 - 1  # larger numbers are not exact in float32, the type of boxes

_BOX_WORDS, _MIN_OUTLINE = 5, 7  # values in a line of a box, and of the shortest outline: a triangle
_MIN_SIDE = 1e-6  # share of an image's side that a box has at least
_EDGE_TOLERANCE = 0.01  # share by which rounded numbers may lie beyond the image: as much as Ultralytics lets pass


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
