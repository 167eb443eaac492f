"""A request to the local interface and its answer, independent of HTTP."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.core.errors import DataError, FedpruneError, ModelError, StorageFullError
from fedprune_device.data.sample_store import NoSampleError, SampleConflictError

# The first kind that an error is of decides.
_STATUS_OF_ERROR = {
    NoSampleError: 404,
    SampleConflictError: 409,
    DataError: 422,
    ModelError: 503,
    StorageFullError: 507,
}


class RequestError(FedpruneError):
    """A request that can't be answered, with its HTTP status."""

    def __init__(self, status: int, what: str, *, expected: object = None, got: object = None, hint: str = "") -> None:
        super().__init__(what, expected=expected, got=got, hint=hint)
        self.status = status


@dataclass(frozen=True)
class Request:
    """A request; header names are in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def kind(self) -> str:
        """The body's media type, from Content-Type."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class LocalAnswer:
    """An answer: a status, and a body of JSON, or bytes of the media type `kind`."""

    body: dict[str, Any] | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    kind: str = "application/json"

    @classmethod
    def from_error(cls, error: FedpruneError) -> LocalAnswer:
        """An error as an answer: the parts of its message by name."""
        message_parts = {"what": error.what, "expected": error.expected, "got": error.got, "hint": error.hint or None}
        # Values may quote the request: the answer to a wrong one must not be as long as the request.
        body = {k: str(v)[:500] for k, v in message_parts.items() if v is not None}
        status = next((status for kind, status in _STATUS_OF_ERROR.items() if isinstance(error, kind)), 500)
        status = error.status if isinstance(error, RequestError) else status
        return cls({"error": body}, status, {"Retry-After": "1"} if status == 503 else {})

    def to_bytes(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body, allow_nan=False).encode() + b"\n"
