"""Messages between processes: fields that are declared once, and one canonical form in bytes.

A message declares its fields with types that check what JSON gave, and describe it as JSON Schema (draft 2020-12):
`session: Count`, `reason: Annotated[str, text(4096)]`. `bool`, `X | None`, `Annotated[tuple[X, ...], Items(64,
"names")]`, `Annotated[dict[K, X], Items(8, "blobs")]` and a `TypedDict`, all of whose keys are required, need no more
than that. A schema may accept more than its check where JSON Schema has no word for the difference, never less.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from types import UnionType
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin, get_type_hints, is_typeddict

from fedprune.blobs.blob_ref import MAX_BLOB, BlobRef
from fedprune.core import validation
from fedprune.core.errors import ProtocolError, UnknownMessageError, reason, shown
from fedprune.core.json_file import decode_json
from fedprune.core.validation import MAX_INT
from fedprune.wire.topics import check_device, check_job, check_name
from fedprune.wire.urls import MAX_UPLOAD_URL, MAX_URL, UPLOAD_PATTERN, URL_PATTERN, BlobUrl, UploadUrl

Schema = dict[str, Any]

MAX_DEPTH = 8
"""Nesting that a free-form object may have."""

MAX_METRICS = 64

_BASE64 = re.compile(r"([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?")
_METRIC = re.compile(r"[A-Za-z0-9_.:/-]{1,64}")
_PRINTABLE = r"^[^\u0000-\u0008\u000b-\u001f\u007f-\u009f]*$"
_LONGEST_KEY = 256
_LONGEST_TEXT = 65_536


@dataclass(frozen=True, eq=False)
class FieldType:
    """A check and its schema.

    `check` takes the field's name for the error and the value, and returns the value as the message has it or raises a
    `ProtocolError`; `#/$defs/...` in the schema are `DEFINITIONS`.
    """

    check: Callable[[str, Any], Any]
    schema: Schema


@dataclass(frozen=True)
class Items:
    """How many items the list or object of a field may have, with their noun for errors."""

    most: int
    noun: str = "items"
    least: int = 0


def field_type(hint: Any) -> FieldType:
    """The field type that an annotation declares. Raises `TypeError` if it declares none."""
    notes = getattr(hint, "__metadata__", ())
    for note in notes:
        if isinstance(note, FieldType):
            return note
    limit = next((note for note in notes if isinstance(note, Items)), None)
    plain = hint.__origin__ if notes else hint
    origin, inner = get_origin(plain), get_args(plain)
    if origin in (Union, UnionType):
        (one,) = (arg for arg in inner if arg is not type(None))
        return _optional(field_type(one))
    if origin is tuple and limit is not None:
        return _list(field_type(inner[0]), limit)
    if origin is dict and limit is not None:
        return _object(field_type(inner[0]), field_type(inner[1]), limit)
    if plain is bool:
        return _TRUTH
    if is_typeddict(plain):
        return record(plain)
    raise TypeError(f"the annotation {hint!r} declares no field type: see fedprune.wire.fields")


def whole(low: int = 0, high: int = MAX_INT) -> FieldType:
    def check(where: str, value: object) -> int:
        return validation.whole(where, value, low, high, error=ProtocolError)

    return FieldType(check, {"type": "integer", "minimum": low, "maximum": high})


def number(low: float = -math.inf, high: float = math.inf) -> FieldType:
    """A finite number in a range."""
    ends = {"minimum": low, "maximum": high}

    def check(where: str, value: object) -> float:
        return validation.number(where, value, low, high, error=ProtocolError)

    return FieldType(check, {"type": "number", **{key: end for key, end in ends.items() if math.isfinite(end)}})


def text(limit: int) -> FieldType:
    """Text without control characters other than line ends and tabs."""

    def check(where: str, value: object) -> str:
        return validation.text(where, value, limit, error=ProtocolError)

    return FieldType(check, {"type": "string", "maxLength": limit, "pattern": _PRINTABLE})


def choice(*options: str) -> FieldType:
    """One of a few words."""

    def check(where: str, value: object) -> str:
        return validation.word(where, value, options, error=ProtocolError)

    return FieldType(check, {"enum": list(options)})


def hexadecimal(low: int, high: int | None = None) -> FieldType:
    """From `low` to `high` lower-case hex digits; exactly `low` of them by default."""
    most = low if high is None else high

    def check(where: str, value: object) -> str:
        return validation.hexadecimal(where, value, low, most, error=ProtocolError)

    pattern = "^([0-9a-f]{2})*$"
    return FieldType(check, {"type": "string", "minLength": low, "maxLength": most, "pattern": pattern})


def base64_bytes(most: int) -> FieldType:
    """Bytes as text in base64 (RFC 4648, with padding), up to a limit."""
    longest = 4 * -(-most // 3)

    def check(where: str, value: object) -> str:
        found = validation.text(where, value, longest, error=ProtocolError)
        return validation.matching(where, found, _BASE64, "base64", error=ProtocolError)

    schema = {"type": "string", "maxLength": longest, "pattern": f"^{_BASE64.pattern}$", "contentEncoding": "base64"}
    return FieldType(check, schema)


def _optional(one: FieldType) -> FieldType:
    def check(where: str, value: object) -> Any:
        return None if value is None else one.check(where, value)

    return FieldType(check, {"anyOf": [one.schema, {"type": "null"}]})


def _list(item: FieldType, limit: Items) -> FieldType:
    def check(where: str, value: object) -> tuple[Any, ...]:
        found = validation.items(where, value, limit.most, limit.noun, least=limit.least, error=ProtocolError)
        return tuple(item.check(f"{where}[{i}]", each) for i, each in enumerate(found))

    schema = {"type": "array", "items": item.schema, "minItems": limit.least, "maxItems": limit.most}
    return FieldType(check, schema)


def _object(key: FieldType, item: FieldType, limit: Items) -> FieldType:
    def check(where: str, value: object) -> dict[str, Any]:
        found = validation.table(where, value, error=ProtocolError)
        if len(found) > limit.most:
            raise ProtocolError(where, expected=f"an object of at most {limit.most} {limit.noun}", got=shown(value))
        return {key.check(f"{where}: key", k): item.check(f"{where}[{k}]", each) for k, each in found.items()}

    return FieldType(check, _object_schema(item.schema, key.schema, {"maxProperties": limit.most}))


def _object_schema(item: Schema, key: Schema, limit: Schema) -> Schema:
    return {"type": "object", "propertyNames": key, "additionalProperties": item, **limit}


def record(shape: Any) -> FieldType:
    """An object with the keys of a `TypedDict`; other keys are left out."""
    types = {key: field_type(hint) for key, hint in get_type_hints(shape, include_extras=True).items()}

    def check(where: str, value: object) -> dict[str, Any]:
        body = validation.record(where, value, types, error=ProtocolError)
        return {key: each.check(f"{where}.{key}", body[key]) for key, each in types.items()}

    properties = {key: each.schema for key, each in types.items()}
    return FieldType(check, {"type": "object", "properties": properties, "required": list(types)})


def _defined(name: str, check: Callable[[str, Any], Any], description: str = "") -> FieldType:
    return FieldType(check, {**({"description": description} if description else {}), "$ref": f"#/$defs/{name}"})


def _check_blob(where: str, value: object) -> BlobRef:
    if isinstance(value, BlobRef):
        return value
    try:
        return BlobRef.from_dict(value)
    except ProtocolError as error:
        raise ProtocolError(f"{where}: {error.what}", expected=error.expected, got=error.got) from error


def _check_metric_name(where: str, value: object) -> str:
    return validation.matching(where, value, _METRIC, "letters, digits and _.:/-", error=ProtocolError)


def _check_free_object(where: str, value: object) -> dict[str, Any]:
    return _free_items(where, validation.table(where, value, error=ProtocolError), MAX_DEPTH)


def _free_items(where: str, body: Mapping[Any, object], depth: int) -> dict[str, Any]:
    check_key = validation.text
    return {
        check_key(f"{where}: key", key, _LONGEST_KEY, error=ProtocolError): _free(where, item, depth)
        for key, item in body.items()
    }


def _free(where: str, value: object, depth: int) -> Any:
    """A JSON value of at most `depth` levels."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return validation.whole(where, value, -MAX_INT, error=ProtocolError)
    if isinstance(value, float):
        return validation.number(where, value, error=ProtocolError)
    if isinstance(value, str):
        return validation.text(where, value, _LONGEST_TEXT, error=ProtocolError)
    if depth <= 1:
        raise ProtocolError(where, expected=f"at most {MAX_DEPTH} levels", got="more")
    if isinstance(value, (list, tuple)):
        return [_free(where, item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        return _free_items(where, value, depth - 1)
    raise ProtocolError(where, expected="a JSON value", got=shown(value))


def _definitions() -> dict[str, Schema]:
    key = text(_LONGEST_KEY).schema
    free: Schema = {"type": ["null", "boolean", "number", "string"], "maxLength": _LONGEST_TEXT, "pattern": _PRINTABLE}
    found: dict[str, Schema] = {
        "name": {"type": "string", "pattern": r"^(?!\.{1,2}$)[A-Za-z0-9_.-]{1,64}$"},
        "device": {"$ref": "#/$defs/name", "not": {"const": "all"}},
        "job": {"$ref": "#/$defs/name", "not": {"const": "-"}},
        "count": whole().schema,
        "digest": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        "blob": {
            "type": "object",
            "required": ["sha256", "size", "leaves"],
            "properties": {
                "sha256": {"$ref": "#/$defs/digest"},
                "size": whole(0, MAX_BLOB).schema,
                "leaves": {"$ref": "#/$defs/digest"},
            },
        },
    }
    for level in range(1, MAX_DEPTH + 1):
        found[f"plain{level}"] = free
        inner = {"$ref": f"#/$defs/plain{level}"}
        array = {"type": "array", "items": inner}
        free = {"anyOf": [{"$ref": "#/$defs/plain1"}, array, _object_schema(inner, key, {})]}
    found["object"] = _object_schema({"$ref": f"#/$defs/plain{MAX_DEPTH}"}, key, {})
    return found


DEFINITIONS = _definitions()
"""The shared definitions of schemas; free-form values by the levels that they may have."""

_TRUTH = FieldType(lambda where, value: validation.truth(where, value, error=ProtocolError), {"type": "boolean"})

Device = Annotated[str, _defined("device", lambda where, value: check_device(value, where), "The device's name.")]
Job = Annotated[str, _defined("job", lambda where, value: check_job(value, where), "The job.")]
Name = Annotated[str, _defined("name", lambda where, value: check_name(value, where))]
Digest = Annotated[str, _defined("digest", lambda where, value: validation.digest(where, value, error=ProtocolError))]
Count = Annotated[int, whole()]
Round = Annotated[int, _defined("count", whole().check, "The round.")]
Attempt = Annotated[int, _defined("count", whole().check, "The attempt.")]
Real = Annotated[float, number()]
Blob = Annotated[BlobRef, _defined("blob", _check_blob)]
MetricName = Annotated[str, FieldType(_check_metric_name, {"pattern": f"^{_METRIC.pattern}$"})]
Metrics = Annotated[dict[MetricName, Real], Items(MAX_METRICS, "numbers")]
FreeObject = Annotated[dict[str, Any], _defined("object", _check_free_object)]
WebAddress = Annotated[
    str,
    FieldType(
        lambda where, value: str(BlobUrl.parse(value, where)),
        {"type": "string", "maxLength": MAX_URL, "pattern": URL_PATTERN},
    ),
]
UploadAddress = Annotated[
    str,
    FieldType(
        lambda where, value: UploadUrl.parse(value, where).whole,
        {"type": "string", "maxLength": MAX_UPLOAD_URL, "pattern": UPLOAD_PATTERN},
    ),
]


VERSION = 1
MAX_MESSAGE = 256 * 1024
"""Bytes that no message may exceed."""

_FIELD_TYPES: dict[type[Any], Mapping[str, FieldType]] = {}


@dataclass(frozen=True)
class CheckedMessage:
    """A message whose fields are checked when it is made, by the types that annotate them (`fedprune.wire.fields`). Its
    type on the wire is `kind`."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kind = kind

    def __post_init__(self) -> None:
        for name, declared in field_types(type(self)).items():
            object.__setattr__(self, name, declared.check(f"{self.kind}: field {name}", getattr(self, name)))

    def to_bytes(self) -> bytes:
        """Canonical JSON in UTF-8. Raises `ProtocolError` if it is longer than a message may be."""
        body: dict[str, Any] = {"v": VERSION, "type": self.kind}
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None or f.default is not None:
                body[f.name] = value
        raw = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, default=BlobRef.to_dict).encode()
        if len(raw) > MAX_MESSAGE:
            raise ProtocolError(
                f"{self.kind}: message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw)
            )
        return raw


def field_types(cls: type[CheckedMessage]) -> Mapping[str, FieldType]:
    """The type of each field of a message, by name and in order."""
    if cls not in _FIELD_TYPES:
        hints = get_type_hints(cls, include_extras=True)
        _FIELD_TYPES[cls] = {f.name: field_type(hints[f.name]) for f in fields(cls)}
    return _FIELD_TYPES[cls]


def required_fields(cls: type[CheckedMessage]) -> list[str]:
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def read_checked(raw: bytes, what: str, types: Mapping[str, type[Any]]) -> Any:
    """Read the JSON of a message, and check it by its type; keys that it doesn't know are ignored.

    Args:
        raw: The JSON; the caller has limited its length.
        types: Classes of messages, by the type that they have on the wire.

    Raises:
        UnknownMessageError: It is of an unknown version or type.
        ProtocolError: It is not JSON, or a field is missing or wrong; the error names the field.
    """
    try:
        # UTF-8 alone: `json` would recognise other encodings, in which no one finds a type without parsing.
        body = decode_json(str(raw, "utf-8"))
    except RecursionError as error:
        raise ProtocolError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ProtocolError(f"{what} is not JSON of ours ({reason(error)})", got=shown(bytes(raw))) from error
    if not isinstance(body, dict):
        raise ProtocolError(what, expected="a JSON object", got=shown(body))
    version = body.get("v")
    if version != VERSION or isinstance(version, bool):
        raise UnknownMessageError(
            f"version of a {what}",
            expected=VERSION,
            got=shown(version),
            hint="Run the same major version of fedprune on server and devices.",
        )
    kind = body.get("type")
    cls = types.get(kind) if isinstance(kind, str) else None
    if cls is None:
        raise UnknownMessageError(f"type of a {what}", expected=", ".join(types), got=shown(kind))
    for name in required_fields(cls):
        if name not in body:
            raise ProtocolError(f"{kind}: field {name}", expected="a value", got="nothing")
    return cls(**{name: body[name] for name in field_types(cls) if name in body})
