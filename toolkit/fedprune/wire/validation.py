"""Checks of message fields: each takes what JSON gave and returns the value, or says what it expected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from fedprune.blobs.blob_ref import MAX_BLOB, BlobRef, is_digest
from fedprune.core.errors import ProtocolError, shown
from fedprune.wire.schema import Schema, defined, described, schema_of
from fedprune.wire.topics import check_device, check_job, check_name, check_tag

Check = Callable[[str, object], Any]
"""Takes the field's full name for the error and the value; returns the checked value."""

MAX_INT = 2**63 - 1
MAX_DEPTH = 8
"""Nesting that a free-form object may have."""

MAX_METRICS = 64

_HEX = re.compile(r"[0-9a-f]*")
_METRIC = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_PRINTABLE = r"^[^\u0000-\u0008\u000b-\u001f\u007f-\u009f]*$"
_LONGEST_KEY = 256
_LONGEST_TEXT = 65_536


def _list_of(item: Schema, most: int, least: int = 0) -> Schema:
    return {"type": "array", "items": item, "minItems": least, "maxItems": most}


def _object_of(value: Schema, most: int | None = None, key: Schema | None = None) -> Schema:
    names = {"maxLength": _LONGEST_KEY, "pattern": _PRINTABLE} if key is None else key
    limit = {} if most is None else {"maxProperties": most}
    return {"type": "object", "propertyNames": names, "additionalProperties": value, **limit}


@described(defined("device"))
def device(where: str, value: object) -> str:
    """A device's name."""
    return check_device(value, where)


@described({"type": "string", "pattern": "^[0-9a-f]{16}$"})
def tag(where: str, value: object) -> str:
    """The tag of a receiver."""
    return check_tag(value, where)


@described(defined("name"))
def name(where: str, value: object) -> str:
    """A name, such as a site's."""
    return check_name(value, where)


@described(defined("job"))
def job(where: str, value: object) -> str:
    """A job's name."""
    return check_job(value, where)


def whole(low: int = 0, high: int = MAX_INT) -> Check:
    """A whole number in a range."""

    @described({"type": "integer", "minimum": low, "maximum": high})
    def check(where: str, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ProtocolError(where, expected=f"a whole number from {low} to {high}", got=shown(value))
        return value

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Check:
    """A finite number in a range."""
    span = "" if (low, high) == (-math.inf, math.inf) else f" from {low:g} to {high:g}"
    ends = {"minimum": low, "maximum": high}

    @described({"type": "number", **{word: end for word, end in ends.items() if math.isfinite(end)}})
    def check(where: str, value: object) -> float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                real = float(value)
            except OverflowError:
                real = math.inf
            if math.isfinite(real) and low <= real <= high:
                return real
        raise ProtocolError(where, expected=f"a finite number{span}", got=shown(value))

    return check


def text(limit: int) -> Check:
    """Text without control characters other than line ends and tabs."""

    @described({"type": "string", "maxLength": limit, "pattern": _PRINTABLE})
    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or len(value) > limit or any(_unprintable(ord(c)) for c in value):
            raise ProtocolError(where, expected=f"text of at most {limit} printable characters", got=shown(value))
        return value

    return check


def _unprintable(code: int) -> bool:
    """Control characters of ASCII and Latin-1 but line ends and tabs, and halves of surrogate pairs."""
    return (code < 32 and code not in (9, 10)) or 0x7F <= code < 0xA0 or 0xD800 <= code < 0xE000


def choice(*options: str) -> Check:
    """One of a few words."""

    @described({"enum": list(options)})
    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or value not in options:
            raise ProtocolError(where, expected=" or ".join(options), got=shown(value))
        return value

    return check


@described(defined("digest"))
def digest(where: str, value: object) -> str:
    """A sha256 as hex."""
    if not isinstance(value, str) or not is_digest(value):
        raise ProtocolError(where, expected="64 hex digits", got=shown(value))
    return value


def hexadecimal(low: int, high: int | None = None) -> Check:
    """From `low` to `high` lower-case hex digits; exactly `low` of them by default."""
    most = low if high is None else high
    span = f"{low}" if most == low else f"{low} to {most}"

    @described({"type": "string", "minLength": low, "maxLength": most, "pattern": "^([0-9a-f]{2})*$"})
    def check(where: str, value: object) -> str:
        if not isinstance(value, str) or not low <= len(value) <= most or not _HEX.fullmatch(value) or len(value) % 2:
            raise ProtocolError(where, expected=f"{span} hex digits", got=shown(value))
        return value

    return check


@described(defined("blob"))
def blob(where: str, value: object) -> BlobRef:
    """A blob reference."""
    if isinstance(value, BlobRef):
        return value
    try:
        return BlobRef.from_dict(value)
    except ProtocolError as error:
        raise ProtocolError(f"{where}: {error.what}", expected=error.expected, got=error.got) from error


def blobs(limit: int) -> Check:
    """Blob references by a short name."""

    @described(_object_of(defined("blob"), limit, defined("name")))
    def check(where: str, value: object) -> dict[str, BlobRef]:
        if not isinstance(value, Mapping) or len(value) > limit:
            raise ProtocolError(where, expected=f"an object of at most {limit} blobs", got=shown(value))
        return {check_name(key, f"{where}: key"): blob(f"{where}.{key}", item) for key, item in _keys(where, value)}

    return check


def list_of(one: Check, what: str, most: int, least: int = 0) -> Check:
    """A list of values that a check takes.

    Args:
        one: Checks a value.
        what: The values' noun, for the error.
        most: Most values.
        least: Fewest.
    """
    expected = f"a list of {f'{least} to' if least else 'at most'} {most} {what}"

    @described(_list_of(schema_of(one), most, least))
    def check(where: str, value: object) -> tuple[Any, ...]:
        if not isinstance(value, (list, tuple)) or not least <= len(value) <= most:
            raise ProtocolError(where, expected=expected, got=shown(value))
        return tuple(one(f"{where}[{i}]", item) for i, item in enumerate(value))

    return check


def blob_list(limit: int) -> Check:
    """A list of at least one blob reference."""
    return list_of(blob, "blobs", limit, least=1)


def wholes(limit: int, low: int, high: int) -> Check:
    """A list of whole numbers."""
    return list_of(whole(low, high), "numbers", limit)


def digests(limit: int) -> Check:
    """A list of at least one sha256 as hex."""
    return list_of(digest, "digests", limit, least=1)


def names(limit: int) -> Check:
    """A list of short names of what a peer knows, which may be more than this version does."""
    return list_of(name, "names", limit)


def successions(limit: int) -> Check:
    """A list of successions of a signing key as hex digits (`fedprune.security.succession`), the oldest first."""
    return list_of(hexadecimal(256), "successions", limit)


@described({"const": True})
def true(where: str, value: object) -> bool:
    """The word true: what isn't so is left out."""
    if value is not True:
        raise ProtocolError(where, expected="true", got=shown(value))
    return True


def optional(check: Check) -> Check:
    """What `check` takes, or null."""

    @described(lambda: {"anyOf": [schema_of(check), {"type": "null"}]})
    def checked(where: str, value: object) -> Any:
        return None if value is None else check(where, value)

    return checked


@described(
    {
        "type": "object",
        "maxProperties": MAX_METRICS,
        "propertyNames": {"pattern": f"^{_METRIC.pattern}$"},
        "additionalProperties": {"type": "number"},
    }
)
def metrics(where: str, value: object) -> dict[str, float]:
    """Finite numbers by name."""
    if not isinstance(value, Mapping) or len(value) > MAX_METRICS:
        raise ProtocolError(where, expected=f"an object of at most {MAX_METRICS} numbers", got=shown(value))
    one = number()
    for name in value:
        if not isinstance(name, str) or not _METRIC.fullmatch(name):
            raise ProtocolError(f"{where}: name of a metric", expected="letters, digits and _.:/-", got=shown(name))
    return {name: one(f"{where}[{name}]", item) for name, item in value.items()}


@described(defined("object"))
def plain(where: str, value: object) -> dict[str, Any]:
    """An object of plain JSON values, of bounded depth, with finite numbers."""
    if not isinstance(value, Mapping):
        raise ProtocolError(where, expected="an object", got=shown(value))
    return {key: _plain(where, item, MAX_DEPTH) for key, item in _keys(where, value)}


@described(
    {
        "type": "object",
        "required": ["job", "round", "attempt"],
        "properties": {"job": defined("job"), "round": defined("count"), "attempt": defined("count")},
    }
)
def assignment(where: str, value: object) -> dict[str, Any]:
    """Which job, round and attempt a device holds."""
    if not isinstance(value, Mapping):
        raise ProtocolError(where, expected="an object with job, round and attempt", got=shown(value))
    checks: dict[str, Check] = {"job": job, "round": whole(), "attempt": whole()}
    for key in checks:
        if key not in value:
            raise ProtocolError(f"{where}.{key}", expected="a value", got="nothing")
    return {key: check(f"{where}.{key}", value[key]) for key, check in checks.items()}


def _plain(where: str, value: object, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return whole(-MAX_INT)(where, value)
    if isinstance(value, float):
        return number()(where, value)
    if isinstance(value, str):
        return text(_LONGEST_TEXT)(where, value)
    if depth <= 1:
        raise ProtocolError(where, expected=f"at most {MAX_DEPTH} levels", got="more")
    if isinstance(value, (list, tuple)):
        return [_plain(where, item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(where, item, depth - 1) for key, item in _keys(where, value)}
    raise ProtocolError(where, expected="a JSON value", got=shown(value))


def _keys(where: str, value: Mapping[Any, object]) -> list[tuple[str, object]]:
    rows = []
    for key, item in value.items():
        if not isinstance(key, str) or len(key) > _LONGEST_KEY:
            raise ProtocolError(f"{where}: key", expected=f"text of at most {_LONGEST_KEY} characters", got=shown(key))
        rows.append((text(_LONGEST_KEY)(f"{where}: key", key), item))
    return rows


def _definitions() -> dict[str, Schema]:
    """What several fields take, by name; plain values by the levels that they may have."""
    digits = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
    plain: Schema = {"type": ["null", "boolean", "number", "string"], "maxLength": _LONGEST_TEXT, "pattern": _PRINTABLE}
    found: dict[str, Schema] = {
        "name": {"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,64}$"},
        "device": {"$ref": "#/$defs/name", "not": {"const": "all"}},
        "job": {"$ref": "#/$defs/name", "not": {"const": "-"}},
        "count": {"type": "integer", "minimum": 0, "maximum": MAX_INT},
        "digest": digits,
        "blob": {
            "type": "object",
            "required": ["sha256", "size", "leaves"],
            "properties": {
                "sha256": defined("digest"),
                "size": {"type": "integer", "minimum": 0, "maximum": MAX_BLOB},
                "leaves": defined("digest"),
            },
        },
    }
    for level in range(1, MAX_DEPTH + 1):
        found[f"plain{level}"] = plain
        inner = defined(f"plain{level}")
        plain = {"anyOf": [defined("plain1"), {"type": "array", "items": inner}, _object_of(inner)]}
    found["object"] = _object_of(defined(f"plain{MAX_DEPTH}"))
    return found


DEFINITIONS = _definitions()
"""What descriptions of checks refer to as `#/$defs/...`."""
