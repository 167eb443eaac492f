"""What the local interface is asked and what it answers, whatever carries the two."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedprune.core.errors import DataError, FedpruneError, ModelError, StorageFullError


class RequestError(FedpruneError):
    """A request that can't be answered as it stands.

    Args:
        status: The status code.
        what: What is wrong.
        expected: What would have been right.
        got: What was found.
        hint: What the client can do.
    """

    def __init__(self, status: int, what: str, *, expected: object = None, got: object = None, hint: str = "") -> None:
        super().__init__(what, expected=expected, got=got, hint=hint)
        self.status = status

    @classmethod
    def of(cls, status: int, error: FedpruneError) -> RequestError:
        """An error of something below, with a status of its own."""
        return cls(status, error.what, expected=error.expected, got=error.got, hint=error.hint)


@dataclass(frozen=True)
class Request:
    """A request.

    Attributes:
        method: Its method.
        path: Its path.
        query: What stands behind the question mark.
        headers: Headers by name, in lower case.
        body: Its body.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes = b""

    @property
    def kind(self) -> str:
        """What the body is, as Content-Type says."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()


@dataclass(frozen=True)
class Answer:
    """What is answered: a status, and a body of JSON."""

    body: dict[str, Any]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, error: FedpruneError) -> Answer:
        """An error as an answer: the parts of its message by name."""
        parts = {"what": error.what, "expected": error.expected, "got": error.got, "hint": error.hint or None}
        body = {k: str(v)[:500] for k, v in parts.items() if v is not None}
        status = error.status if isinstance(error, RequestError) else _status(error)
        return cls({"error": body}, status, {"Retry-After": "1"} if status == 503 else {})

    def to_bytes(self) -> bytes:
        """The body as it is sent."""
        return json.dumps(self.body, allow_nan=False).encode() + b"\n"


def _status(error: FedpruneError) -> int:
    if isinstance(error, StorageFullError):
        return 507
    if isinstance(error, DataError):
        return 422
    return 503 if isinstance(error, ModelError) else 500
