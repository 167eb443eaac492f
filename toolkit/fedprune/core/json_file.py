"""Reads JSON from files and from the network, with limits, and with errors that name the problem."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from fedprune.core.disk import MAX_READ_BYTES, read_file
from fedprune.core.errors import FedpruneError, error_reason, path_remedy
from fedprune.core.validation import MAX_INT

# Characters of `MAX_INT` with a sign. A longer integer is read as infinity: parsing it would take quadratic time.
_MAX_INT_DIGITS = 20

# An integer with more digits than this is refused: no float64 has more than 309 digits before its point.
_MAX_NUMBER_DIGITS = 1000


def decode_json(text: str | bytes) -> Any:
    """The value of JSON from a network. Raises `ValueError`, also for NaN and infinities, which aren't JSON, and
    `RecursionError` for one that is nested too deeply.

    A whole number of more than 64 bits, which no database, array or clock could take, is read as infinity, as 1e999 is:
    no check of a number accepts it, and the error of the check names the field.
    """
    return json.loads(text, parse_int=_int_or_infinity, parse_constant=_refuse_constant)


def _int_or_infinity(text: str) -> int | float:
    if len(text) <= _MAX_INT_DIGITS and -MAX_INT <= (value := int(text)) <= MAX_INT:
        return value
    if len(text) > _MAX_NUMBER_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return -math.inf if text.startswith("-") else math.inf


def _refuse_constant(word: str) -> float:
    raise ValueError(f"a number that is not finite: {word}")


def read_json(path: Path, error: type[FedpruneError], max_bytes: int = MAX_READ_BYTES) -> Any:
    """The value of a JSON file of at most `max_bytes` bytes. Raises `error`, which names the file, if it can't be read
    or is no JSON."""
    try:
        return json.loads(read_file(path, max_bytes))
    except OSError as cause:
        raise error(f"can't read {path}: {cause.strerror}", hint=path_remedy(cause)) from cause
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not JSON ({error_reason(cause)})") from cause
