"""Objects under a bucket's prefix: blobs, the job's first model, and the owner."""

from __future__ import annotations

import json
from dataclasses import dataclass

from fedprune.core.errors import StorageError
from fedprune.core.validation import is_digest

BLOBS = "blobs/"
OWNER = "job.json"
MODEL = "model.onnx"
FORMAT = "fedprune.blobs/1"
OWNER_LIMIT = 2**16
"""Bytes that `OWNER` may have."""

_NAMED = 200


def digest_of(key: str) -> str | None:
    """The digest in an object's key; None for a foreign key."""
    if not key.startswith(BLOBS):
        return None
    digest, dot, nonce = key.removeprefix(BLOBS).partition(".")
    return digest if is_digest(digest) and dot and len(nonce) == 16 and nonce.isalnum() else None


@dataclass(frozen=True)
class Owner:
    """The job that owns the blobs under a prefix, and the number by which its settings know them."""

    number: str
    job: str

    def to_bytes(self) -> bytes:
        return json.dumps({"format": FORMAT, "id": self.number, "job": self.job[:_NAMED]}).encode()

    @classmethod
    def parse(cls, raw: bytes, where: str) -> Owner:
        """Read what `to_bytes` wrote. Raises `StorageError` if it is damaged, or of another version."""
        try:
            said = json.loads(raw)
        except (ValueError, RecursionError):
            said = None
        texts = [said.get(k) for k in ("format", "id", "job")] if isinstance(said, dict) else []
        if not texts or not all(isinstance(t, str) and t and len(t) <= _NAMED and t.isprintable() for t in texts):
            raise StorageError(f"{where} is damaged", hint="Write it again, or delete it.")
        if texts[0] != FORMAT:
            raise StorageError(f"{where} is of another version", expected=FORMAT, got=texts[0])
        return cls(str(texts[1]), str(texts[2]))
