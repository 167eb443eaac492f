"""Messages between processes: the types of their fields, and one canonical form in bytes.

A message is a record (`fedprune.core.records`): `session: Count`, `reason: Annotated[str, text(4096)]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Annotated, Any, ClassVar, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from fedprune.core import records
from fedprune.core.errors import ProtocolError, UnknownMessageError, shown
from fedprune.core.records import END, items, matching, within
from fedprune.core.validation import MAX_INT
from fedprune.wire.urls import MAX_UPLOAD_URL, MAX_URL, UPLOAD_PATTERN, URL_PATTERN

_NAME = r"(?!\.{1,2}" + END + r")[A-Za-z0-9_.-]{1,64}"
_NAME_IN_WORDS = "a name of 1 to 64 letters, digits, _ . or -"

Name = Annotated[str, matching(_NAME, _NAME_IN_WORDS)]
Device = Annotated[
    str, matching(f"(?!all{END}){_NAME}", f"{_NAME_IN_WORDS}, other than 'all'", description="The device's name.")
]
Job = Annotated[str, matching(f"(?!-{END}){_NAME}", f"{_NAME_IN_WORDS}, other than '-'", description="The job.")]
Count = Annotated[int, within(0, MAX_INT)]
Round = Annotated[int, within(0, MAX_INT, description="The round.")]
Attempt = Annotated[int, within(0, MAX_INT, description="The attempt.")]
MetricName = Annotated[str, matching("[A-Za-z0-9_.:/-]{1,64}", "letters, digits and _.:/-")]
FreeObject = dict[str, Any]
"""An object whose content others check: of at most 8 levels, with printable text and whole numbers of 64 bits."""

Metrics = Annotated[dict[MetricName, float], items(64)]
# Their classes check them: no error may show what an address hides.
WebAddress = Annotated[str, Meta(extra_json_schema={"pattern": f"^(?:{URL_PATTERN}){END}", "maxLength": MAX_URL})]
UploadAddress = Annotated[
    str, Meta(extra_json_schema={"pattern": f"^(?:{UPLOAD_PATTERN}){END}", "maxLength": MAX_UPLOAD_URL})
]

VERSION = 1
MAX_MESSAGE = 256 * 1024
"""Bytes that no message may exceed."""

Sent = TypeVar("Sent", bound="CheckedMessage")


def base64_text(most: int) -> Meta:
    """Up to `most` bytes as text in base64 (RFC 4648, with padding)."""
    pattern = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
    return matching(pattern, f"base64 of at most {most} bytes", 4 * -(-most // 3))


@dataclass(frozen=True)
class CheckedMessage:
    """A message whose fields are checked when it is made, so that whatever is sent can be received. Its type on the
    wire is `kind`."""

    kind: ClassVar[str]

    def __init_subclass__(cls, *, kind: str) -> None:
        cls.kind = kind

    def __post_init__(self) -> None:
        self._fill(records.convert(_form(type(self)), self._body(), self.kind, ProtocolError))

    def check(self) -> None:
        """What the types of fields can't say. Raises `ProtocolError`."""

    def to_bytes(self) -> bytes:
        """Canonical JSON in UTF-8. Raises `ProtocolError` if it is longer than a message may be."""
        raw = records.write({"v": VERSION, "type": self.kind, **self._body()})
        if len(raw) > MAX_MESSAGE:
            raise ProtocolError(
                f"{self.kind}: message is too long", expected=f"at most {MAX_MESSAGE} bytes", got=len(raw)
            )
        return raw

    @classmethod
    def read(cls: type[Sent], raw: bytes) -> Sent:
        """Read its JSON, whose version and type are known."""
        message = object.__new__(cls)
        message._fill(records.read(_form(cls), raw, cls.kind, ProtocolError))
        return message

    def _body(self) -> dict[str, Any]:
        """Its fields, without those that are None by default."""
        rows = ((f, getattr(self, f.name)) for f in fields(self))
        return {f.name: value for f, value in rows if value is not None or f.default is not None}

    def _fill(self, checked: msgspec.Struct) -> None:
        for f in fields(self):
            object.__setattr__(self, f.name, getattr(checked, f.name))
        self.check()


def _form(cls: type[CheckedMessage]) -> type[msgspec.Struct]:
    """What JSON is read into: the fields of a message alone."""
    if cls not in _FORMS:
        hints = get_type_hints(cls, include_extras=True)
        rows: list[Any] = []
        for f in fields(cls):
            default = None if f.default is MISSING else msgspec.field(default=f.default)
            if f.default_factory is not MISSING:
                default = msgspec.field(default_factory=f.default_factory)
            rows.append((f.name, hints[f.name]) if default is None else (f.name, hints[f.name], default))
        _FORMS[cls] = msgspec.defstruct(cls.__name__, rows)
    return _FORMS[cls]


_FORMS: dict[type[CheckedMessage], type[msgspec.Struct]] = {}


class _Header(msgspec.Struct):
    """What tells how a message is to be read."""

    v: Any = None
    type: Any = None


def read_checked(raw: bytes, what: str, types: Mapping[str, type[Sent]]) -> Sent:
    """Read the JSON of a message, and check it by its type; keys that it doesn't know are ignored.

    Args:
        raw: The JSON; the caller has limited its length.
        types: Classes of messages, by the type that they have on the wire.

    Raises:
        UnknownMessageError: It is of an unknown version or type.
        ProtocolError: It is not JSON, or a field is missing or wrong; the error names the field.
    """
    header = records.read(_Header, raw, what, ProtocolError)
    if type(header.v) is not int or header.v != VERSION:
        raise UnknownMessageError(
            f"version of a {what}",
            expected=VERSION,
            got=shown(header.v),
            hint="Run the same major version of fedprune on server and devices.",
        )
    cls = types.get(header.type) if isinstance(header.type, str) else None
    if cls is None:
        raise UnknownMessageError(f"type of a {what}", expected=", ".join(types), got=shown(header.type))
    return cls.read(raw)
