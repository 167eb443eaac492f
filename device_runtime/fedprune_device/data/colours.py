"""Colours that settings name; reading them loads no numpy."""

from __future__ import annotations

import re

Colour = tuple[int, int, int]  # red, green and blue, from 0 to 255
WHITE = (255, 255, 255)
COLOUR_FORM = "white, black or #RRGGBB"

_NAMES = {"white": WHITE, "black": (0, 0, 0)}


def parse_colour(text: object) -> Colour | None:
    """The colour of a text in `COLOUR_FORM`; None if it is none."""
    if not isinstance(text, str):
        return None
    if text in _NAMES:
        return _NAMES[text]
    match = re.fullmatch("#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", text)
    return None if match is None else (int(match[1], 16), int(match[2], 16), int(match[3], 16))
