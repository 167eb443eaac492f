"""Records: dataclasses whose annotations say which values their fields may have.

`Annotated[int, within(0, 100)]` is a whole number in a range, `Annotated[str, text(256)]` printable text. msgspec
checks them as it reads JSON or plain values, and makes their JSON Schema; what it refuses becomes an error of ours,
which names the field. Unknown keys are ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import is_dataclass
from functools import cache
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from fedprune.core import validation
from fedprune.core.errors import FedpruneError, reason, shown
from fedprune.core.validation import MAX_INT

Record = TypeVar("Record")

# The end of a text in regular expressions of Python and of JSON Schema alike; `$` also matches before a last line end.
END = r"(?![\s\S])"

# Levels of a free-form object: without a limit a peer could exhaust the stack of whatever walks it.
MAX_DEPTH = 8

_LONGEST_TEXT = 65_536

# msgspec tells what it refuses only in words, so its messages are parsed. What doesn't match is passed on as it is.
_PLACE = re.compile(r"(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<name>.*)`")
_PATTERN = re.compile(r"Expected `str` matching regex ['\"](?P<pattern>.*)['\"]", re.DOTALL)
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "nothing",
}

# Words for a pattern, by the pattern: msgspec's error has nothing but the regular expression.
_IN_WORDS: dict[str, str] = {}


def matching(pattern: str, words: str, most: int | None = None, *, description: str | None = None) -> Meta:
    """Text that a regular expression matches as a whole; `words` say so in errors."""
    full_pattern = f"^(?:{pattern}){END}"
    _IN_WORDS[full_pattern] = words
    return Meta(pattern=full_pattern, max_length=most, description=description)


def one_of(words: Sequence[str]) -> Meta:
    """One of a few words."""
    return matching("|".join(words), " or ".join(words))


def text(most: int) -> Meta:
    """Text without control characters other than line ends and tabs."""
    return matching(r"[^\u0000-\u0008\u000b-\u001f\u007f-\u009f]*", f"at most {most} printable characters", most)


def hexadecimal(low: int, high: int | None = None) -> Meta:
    """From `low` to `high` lower-case hex digits, two for each byte; exactly `low` of them by default."""
    bytes_ = f"{low // 2}" if high is None else f"{low // 2},{high // 2}"
    return matching(f"(?:[0-9a-f]{{2}}){{{bytes_}}}", f"{low if high is None else f'{low} to {high}'} hex digits")


def within(low: float | None = None, high: float | None = None, *, description: str | None = None) -> Meta:
    """A number in a range, ends included."""
    return Meta(ge=low, le=high, description=description)


def items(most: int, least: int | None = None) -> Meta:
    """How many items a list or an object has."""
    return Meta(min_length=least, max_length=most)


Whole = Annotated[int, within(-MAX_INT, MAX_INT)]
Digest = Annotated[str, matching(validation.DIGEST, "64 hex digits")]


def check_free(value: object, what: str, error: type[FedpruneError], depth: int = MAX_DEPTH) -> None:
    """Refuse a free-form value with more than `depth` levels, numbers that are not finite, integers beyond 64 bits, or
    text that isn't printable."""
    if isinstance(value, str):
        validation.text(what, value, _LONGEST_TEXT, error=error)
    elif isinstance(value, int) and not isinstance(value, bool):
        validation.whole(what, value, -MAX_INT, error=error)
    elif isinstance(value, float) and not math.isfinite(value):
        raise error(what, expected="finite numbers", got=value)
    elif isinstance(value, (Mapping, list, tuple)):
        if not depth:
            raise error(what, expected=f"at most {MAX_DEPTH} levels", got="more")
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in entries:
            check_free(str(key), f"{what}: key", error)
            check_free(inner, what, error, depth - 1)


def write(record: object) -> bytes:
    """Encode a record, or a plain value, as canonical JSON in UTF-8: equal values give equal bytes."""
    return _ENCODER.encode(record)


def read(kind: type[Record], raw: bytes, what: str, error: type[FedpruneError]) -> Record:
    """Read a record from JSON, and check it.

    Raises:
        error: It is no JSON, or a field is missing or wrong; `what` and the field's path name it.
    """
    try:
        record: Record = _decoder(cast("Hashable", kind)).decode(raw)
        return record
    except msgspec.ValidationError as refused:
        raise _refusal(refused, raw, what, error) from None
    except RecursionError as cause:
        raise error(f"{what} is nested too deeply") from cause
    except ValueError as cause:
        raise error(f"{what} is not JSON of ours ({reason(cause)})", got=shown(raw)) from cause


def convert(kind: type[Record], value: object, what: str, error: type[FedpruneError]) -> Record:
    """Build a record from plain values, such as a row of a database, with the checks of `read`. Numbers that are not
    finite are refused, too."""
    try:
        # By json, because msgspec would write NaN and infinities as null.
        raw = json.dumps(value, allow_nan=False, default=_plainly).encode()
    except (TypeError, ValueError, OverflowError, RecursionError) as cause:
        raise error(f"{what} is no JSON ({reason(cause)})", got=shown(value)) from cause
    return read(kind, raw, what, error)


def schemas(kinds: list[type[Any]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """References to the JSON Schemas (draft 2020-12) of records, and the definitions that they refer to, by name."""
    references, definitions = msgspec.json.schema_components(kinds, ref_template="#/$defs/{name}")
    return list(references), definitions


def _refusal(refused: msgspec.ValidationError, raw: bytes, what: str, error: type[FedpruneError]) -> FedpruneError:
    """msgspec's refusal as our error: the field, what it may be, and what it is."""
    match = _PLACE.fullmatch(str(refused))
    problem, path = (match["what"], match["path"] or "") if match else (str(refused), "")
    if missing_field := _MISSING.fullmatch(problem):
        return error(f"{what}: {(path + '.' + missing_field['name']).lstrip('.')}", expected="a value", got="nothing")
    expected = problem.partition(", got ")[0].removeprefix("Expected ")
    if mismatch := _PATTERN.fullmatch(problem):
        expected = _IN_WORDS.get(mismatch["pattern"].replace("\\\\", "\\"), expected)
    elif problem == "Number out of range":
        expected = "a number of 64 bits"
    else:
        expected = re.sub(r"`([^`]*)`", lambda m: " or ".join(_KINDS.get(w, w) for w in m[1].split(" | ")), expected)
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
    return None if "[...]" in path else shown(value)


def _plainly(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, float):  # of numpy
        return float(value)
    if is_dataclass(value):
        return msgspec.to_builtins(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


_ENCODER = msgspec.json.Encoder(enc_hook=_plainly, order="sorted")


@cache
def _decoder(kind: type[Record]) -> msgspec.json.Decoder[Record]:
    return msgspec.json.Decoder(kind)
