"""Errors for records that msgspec refuses: they name the field, the values that it may have, and the value that it has.

msgspec says only in words what it refuses, so its messages are parsed here, for `core.records`.
"""

from __future__ import annotations

import re

import msgspec

from fedprune.core.errors import FedpruneError, value_text

# A message that doesn't match is passed on as it is.
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
