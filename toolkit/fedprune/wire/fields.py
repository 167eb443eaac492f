"""Messages between processes: the types of their fields, and one canonical form in bytes.

A message is a record (`fedprune.core.records`): `session: Count`, `reason: Annotated[str, text(4096)]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

import msgspec
from msgspec import Meta

from fedprune.core import records
from fedprune.core.errors import ProtocolError
from fedprune.core.records import TEXT_END, item_count, number_range, pattern_text
from fedprune.core.validation import MAX_INT
from fedprune.wire.topics import EVERYONE, NAME_DESCRIPTION, NAME_PATTERN, NO_JOB
from fedprune.wire.urls import MAX_UPLOAD_URL, MAX_URL, UPLOAD_PATTERN, URL_PATTERN

Name = Annotated[str, pattern_text(NAME_PATTERN, NAME_DESCRIPTION)]
Device = Annotated[
    str,
    pattern_text(
        f"(?!{EVERYONE}{TEXT_END}){NAME_PATTERN}",
        f"{NAME_DESCRIPTION}, other than '{EVERYONE}'",
        description="The device's name.",
    ),
]
Job = Annotated[
    str,
    pattern_text(
        f"(?!{NO_JOB}{TEXT_END}){NAME_PATTERN}", f"{NAME_DESCRIPTION}, other than '{NO_JOB}'", description="The job."
    ),
]
Count = Annotated[int, number_range(0, MAX_INT)]
Round = Annotated[int, number_range(0, MAX_INT, description="The round.")]
Attempt = Annotated[int, number_range(0, MAX_INT, description="The attempt.")]
MetricName = Annotated[str, pattern_text("[A-Za-z0-9_.:/-]{1,64}", "letters, digits and _.:/-")]
# An object whose content is checked elsewhere. Here it is limited to 8 levels, printable text and integers of 64 bits.
FreeObject = dict[str, Any]

Metrics = Annotated[dict[MetricName, float], item_count(64)]
# Their own classes check them: msgspec's error would show the value, and an address may hold a secret.
WebAddress = Annotated[str, Meta(extra_json_schema={"pattern": f"^(?:{URL_PATTERN}){TEXT_END}", "maxLength": MAX_URL})]
UploadAddress = Annotated[
    str, Meta(extra_json_schema={"pattern": f"^(?:{UPLOAD_PATTERN}){TEXT_END}", "maxLength": MAX_UPLOAD_URL})
]

# Bytes that no message may exceed.
MAX_MESSAGE_BYTES = 256 * 1024


def base64_text(max_bytes: int) -> Meta:
    """Up to `max_bytes` bytes as text in base64 (RFC 4648, with padding)."""
    pattern = "(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?"
    return pattern_text(pattern, f"base64 of at most {max_bytes} bytes", 4 * -(-max_bytes // 3))


SomeMessage = TypeVar("SomeMessage", bound="CheckedMessage")


class _TypeTag:
    """The type of a message on the wire, as its class and each message say it."""

    def __get__(self, message: object, cls: type[CheckedMessage]) -> str:
        return str(cls.__struct_config__.tag)


class CheckedMessage(msgspec.Struct, frozen=True, omit_defaults=True, tag_field="type"):
    """A message whose fields are checked when it is written and when it is read, so that whatever is sent is
    accepted."""

    kind: ClassVar[_TypeTag] = _TypeTag()

    def __post_init__(self) -> None:
        self.check()

    @classmethod
    def from_dict(cls: type[SomeMessage], values: Mapping[str, object]) -> SomeMessage:
        """A message from plain values. Raises `ProtocolError`, which names a missing or wrong field."""
        return records.convert_record(cls, {**values, "type": cls.kind}, cls.kind, ProtocolError)

    def check(self) -> None:
        """Check what the types of fields can't express. Raises `ProtocolError`."""

    def to_bytes(self) -> bytes:
        """Canonical JSON in UTF-8. Raises `ProtocolError` if a field is wrong, or it is longer than a message may
        be."""
        raw = records.encode_record(self)
        if len(raw) > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"{self.kind}: message is too long", expected=f"at most {MAX_MESSAGE_BYTES} bytes", got=len(raw)
            )
        records.decode_record(type(self), raw, self.kind, ProtocolError)
        return raw


class MessageHeader(msgspec.Struct):
    """The field of a message that decides how the others are read."""

    type: Any = None
