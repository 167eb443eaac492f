"""What all messages between devices and server share: checked fields, and one canonical form in bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from fedprune.blobs.blob_ref import BlobRef
from fedprune.core.errors import ProtocolError, UnknownMessageError, shown
from fedprune.wire.validation import Check

VERSION = 1
MAX_MESSAGE = 256 * 1024
"""Bytes that no message may exceed."""


@dataclass(frozen=True)
class CheckedMessage:
    """A message whose fields are checked when it is made.

    Attributes:
        kind: Its type on the wire.
        checks: One entry per field.
        newer: Fields that older peers don't know: one that is None is left out.
    """

    kind: ClassVar[str]
    checks: ClassVar[Mapping[str, Check]]
    newer: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        for name, checked in self.checks.items():
            value = checked(f"{self.kind}: field {name}", getattr(self, name))
            object.__setattr__(self, name, value)

    def to_bytes(self) -> bytes:
        """Canonical JSON in UTF-8.

        Raises:
            ProtocolError: It is longer than a message may be.
        """
        body: dict[str, Any] = {"v": VERSION, "type": self.kind}
        for name in self.checks:
            value = getattr(self, name)
            if value is None and name in self.newer:
                continue
            body[name] = value
        raw = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False, default=BlobRef.to_dict).encode()
        if len(raw) > MAX_MESSAGE:
            raise ProtocolError(
                f"{self.kind}: message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw)
            )
        return raw


def read_checked(raw: bytes, what: str, types: Mapping[str, type[Any]]) -> Any:
    """Read the JSON of a message, and check it by its type.

    Args:
        raw: The JSON; how long it may be is the caller's to say.
        what: What it is, for errors.
        types: Classes of messages, by the type that they have on the wire.

    Returns:
        A message of one of the types. Keys that it doesn't know are ignored.

    Raises:
        UnknownMessageError: It is of an unknown version or type.
        ProtocolError: It is not JSON, or a field is missing or wrong; the error names the field.
    """
    try:
        body = json.loads(raw, parse_constant=_constant)
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
    values = {}
    for f in fields(cls):
        if f.name in body:
            values[f.name] = body[f.name]
        elif f.default is MISSING and f.default_factory is MISSING:
            raise ProtocolError(f"{kind}: field {f.name}", expected="a value", got="nothing")
    return cls(**values)


def _constant(word: str) -> float:
    raise ValueError(word)
