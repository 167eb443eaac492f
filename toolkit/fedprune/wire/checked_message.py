"""What all messages between devices and server share: checked fields, and one canonical form in bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fedprune.errors import ProtocolError
from fedprune.wire.blob_ref import BlobRef
from fedprune.wire.fields import Check

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
