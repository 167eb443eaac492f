"""JSON from people, other programs and other machines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedprune.core.disk import MOST_BYTES, read_file
from fedprune.core.errors import FedpruneError, reason, remedy
from fedprune.core.validation import MAX_INT

# Characters of `MAX_INT` with a sign. Longer integers are not parsed: that takes quadratic time.
_MAX_DIGITS = 20

# Longer integers are refused instead of read as infinity: no float64 has more than 309 digits before its point.
_MOST_DIGITS = 1000


def decode_json(text: str | bytes) -> Any:
    """The value of JSON from a network. Raises `ValueError`, also for NaN and infinities, which aren't JSON, and
    `RecursionError` for one that is nested too deeply.

    A whole number of more than 64 bits, which no database, array or clock could take, is read as infinity, as 1e999 is:
    no check of a number accepts it, and the error of the check names the field.
    """
    return json.loads(text, parse_int=_whole, parse_constant=_refuse)


def _whole(text: str) -> int | float:
    if len(text) <= _MAX_DIGITS and -MAX_INT <= (value := int(text)) <= MAX_INT:
        return value
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return -math.inf if text.startswith("-") else math.inf


def _refuse(word: str) -> float:
    raise ValueError(f"a number that is not finite: {word}")


def read_json(path: Path, error: type[FedpruneError], most: int = MOST_BYTES) -> Any:
    """The value of a JSON file of at most `most` bytes. Raises `error`, which names the file, if it can't be read or is
    no JSON."""
    try:
        return json.loads(read_file(path, most))
    except OSError as cause:
        raise error(f"can't read {path}: {cause.strerror}", hint=remedy(cause)) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON ({reason(cause)})") from cause
