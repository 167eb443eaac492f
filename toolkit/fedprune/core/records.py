"""Records: dataclasses whose annotations say which values their fields may have.

`Annotated[int, number_range(0, 100)]` is a whole number from 0 to 100, `Annotated[str, printable_text(256)]` text of
at most 256 printable characters. msgspec checks them as it reads JSON or plain values, and makes their JSON Schema.
A refused value becomes an error of the caller's class, which names the field. Unknown keys are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, TypeVar, cast

import msgspec
from msgspec import Meta

from fedprune.core import validation
from fedprune.core.errors import FedpruneError, error_reason, value_text
from fedprune.core.validation import MAX_INT

Record = TypeVar("Record")

# The end of a text in regular expressions of Python and of JSON Schema alike; `$` also matches before a last line end.
TEXT_END = r"(?![\s\S])"

# Levels of a free-form object: without a limit a peer could exhaust the stack of whatever walks it.
MAX_DEPTH = 8

_MAX_TEXT_LENGTH = 65_536


# msgspec says only in words what it refuses, so its messages are parsed. One that doesn't match is passed on as it is.
_REFUSAL = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_MISSING_FIELD = re.compile(r"Object missing required field `(?P<name>.*)`")
_PATTERN_MISMATCH = re.compile(r"Expected `str` matching regex ['\"](?P<pattern>.*)['\"]", re.DOTALL)
_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "nothing",
}

# Words for a pattern, by the pattern, added by `records.pattern_text`: msgspec's error has only the regular expression.
PATTERN_WORDS: dict[str, str] = {}


def pattern_text(pattern: str, words: str, max_length: int | None = None, *, description: str | None = None) -> Meta:
    """Text that a regular expression matches as a whole; `words` say so in errors."""
    full_pattern = f"^(?:{pattern}){TEXT_END}"
    PATTERN_WORDS[full_pattern] = words
    return Meta(pattern=full_pattern, max_length=max_length, description=description)


def word_of(words: Sequence[str]) -> Meta:
    """One of a few words."""
    return pattern_text("|".join(words), " or ".join(words))


def printable_text(max_length: int) -> Meta:
    """Text without control characters other than line ends and tabs."""
    return pattern_text(
        r"[^\u0000-\u0008\u000b-\u001f\u007f-\u009f]*", f"at most {max_length} printable characters", max_length
    )


def hex_text(low: int, high: int | None = None) -> Meta:
    """From `low` to `high` lower-case hex digits, two for each byte; exactly `low` of them by default."""
    bytes_ = f"{low // 2}" if high is None else f"{low // 2},{high // 2}"
    return pattern_text(f"(?:[0-9a-f]{{2}}){{{bytes_}}}", f"{low if high is None else f'{low} to {high}'} hex digits")


def number_range(low: float | None = None, high: float | None = None, *, description: str | None = None) -> Meta:
    """A number in a range, ends included."""
    return Meta(ge=low, le=high, description=description)


def item_count(max_items: int, min_items: int | None = None) -> Meta:
    """How many items a list or an object has."""
    return Meta(min_length=min_items, max_length=max_items)


WholeNumber = Annotated[int, number_range(-MAX_INT, MAX_INT)]
Digest = Annotated[str, pattern_text(validation.DIGEST_PATTERN, "64 hex digits")]


def check_free_form(value: object, what: str, error: type[FedpruneError], depth: int = MAX_DEPTH) -> None:
    """Refuse a free-form value with more than `depth` levels, numbers that are not finite, integers beyond 64 bits, or
    text that isn't printable."""
    if isinstance(value, str):
        validation.check_text(what, value, _MAX_TEXT_LENGTH, error=error)
    elif isinstance(value, int) and not isinstance(value, bool):
        validation.check_whole(what, value, -MAX_INT, error=error)
    elif isinstance(value, float) and not math.isfinite(value):
        raise error(what, expected="finite numbers", got=value)
    elif isinstance(value, (Mapping, list, tuple)):
        if not depth:
            raise error(what, expected=f"at most {MAX_DEPTH} levels", got="more")
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in entries:
            check_free_form(str(key), f"{what}: key", error)
            check_free_form(inner, what, error, depth - 1)


def encode_record(record: object) -> bytes:
    """Encode a record, or a plain value, as canonical JSON in UTF-8: equal values give equal bytes."""
    return _ENCODER.encode(record)


def decode_record(kind: type[Record], raw: bytes, what: str, error: type[FedpruneError]) -> Record:
    """Read a record from JSON, and check it. Raises `error` if it is no JSON, or a field is missing or wrong; `what`
    and the field's path name it."""
    try:
        record: Record = _decoder(cast("Hashable", kind)).decode(raw)
        return record
    except msgspec.ValidationError as refused:
        raise refusal_error(refused, raw, what, error) from None
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply") from cause
    except ValueError as cause:
        raise error(f"{what} is not JSON of ours ({error_reason(cause)})", got=value_text(raw)) from cause


def convert_record(kind: type[Record], value: object, what: str, error: type[FedpruneError]) -> Record:
    """Build a record from plain values, such as a row of a database, with the checks of `decode_record`. Numbers that
    are not finite are refused, too."""
    try:
        # By json, because msgspec would write NaN and infinities as null.
        raw = json.dumps(value, allow_nan=False, default=_plain_value).encode()
    except (TypeError, ValueError, OverflowError, RecursionError) as cause:
        raise error(f"{what} is no JSON ({error_reason(cause)})", got=value_text(value)) from cause
    return decode_record(kind, raw, what, error)


def _plain_value(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, float):  # of numpy
        return float(value)
    if is_dataclass(value):
        return msgspec.to_builtins(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plain_value, order="sorted")


@cache
def _decoder(kind: type[Record]) -> msgspec.json.Decoder[Record]:
    return msgspec.json.Decoder(kind)


def refusal_error(refused: msgspec.ValidationError, raw: bytes, what: str, error: type[FedpruneError]) -> FedpruneError:
    """The error, of class `error`, for a record that msgspec refused: `raw` is its JSON, `what` its name for people."""
    match = _REFUSAL.fullmatch(str(refused))
    problem, path = (match["what"], match["path"] or "") if match else (str(refused), "")
    if missing_field := _MISSING_FIELD.fullmatch(problem):
        return error(f"{what}: {(path + '.' + missing_field['name']).lstrip('.')}", expected="a value", got="nothing")
    expected = problem.partition(", got ")[0].removeprefix("Expected ")
    if mismatch := _PATTERN_MISMATCH.fullmatch(problem):
        expected = PATTERN_WORDS.get(mismatch["pattern"].replace("\\\\", "\\"), expected)
    elif problem == "Number out of range":
        expected = "a number of 64 bits"
    else:
        expected = re.sub(
            r"`([^`]*)`", lambda m: " or ".join(_TYPE_WORDS.get(w, w) for w in m[1].split(" | ")), expected
        )
    where = ": ".join(name for name in (what, path.lstrip(".")) if name)
    return error(where, expected=expected, got=None if match and match["key"] else _value_at(raw, path))


def _value_at(raw: bytes, path: str) -> str | None:
    """The refused value, as errors show it; None where the path doesn't lead to one, as in an object's keys."""
    try:
        value = msgspec.json.decode(raw)
        for key, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
            value = value[int(index)] if index else value[key]
    except (ValueError, RecursionError, LookupError, TypeError):
        return None
    return None if "[...]" in path else value_text(value)
