"""The base of all messages between processes: fields that are declared once, and one canonical form in bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, get_type_hints

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError, UnknownMessageError, shown
from fedprune.wire.fields import FieldType, field_type

VERSION = 1
MAX_MESSAGE = 256 * 1024
"""Bytes that no message may exceed."""

_NEWER = "newer"
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
            if value is not None or not f.metadata.get(_NEWER):
                body[f.name] = value
        raw = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, default=BlobRef.to_dict).encode()
        if len(raw) > MAX_MESSAGE:
            raise ProtocolError(
                f"{self.kind}: message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw)
            )
        return raw


def newer(*, compare: bool = True) -> Any:
    """A field that older peers don't know: None by default, and then left out of the JSON."""
    return field(default=None, compare=compare, metadata={_NEWER: True})


def field_types(cls: type[CheckedMessage]) -> Mapping[str, FieldType]:
    """The type of each field of a message, by name and in order."""
    if cls not in _FIELD_TYPES:
        hints = get_type_hints(cls, include_extras=True)
        _FIELD_TYPES[cls] = {f.name: field_type(hints[f.name]) for f in fields(cls)}
    return _FIELD_TYPES[cls]


def required_fields(cls: type[CheckedMessage]) -> list[str]:
    """Names of the fields without a default."""
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
        body = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise ProtocolError(f"{what} is nested too deeply") from error
    except ValueError as error:
        raise ProtocolError(f"{what} is not JSON", got=shown(bytes(raw))) from error
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


def _refuse_constant(word: str) -> float:
    raise ValueError(word)
