"""Splits samples into those for training, validation and tests, and keeps the shares of a folder in a file."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from fedprune.core import atomic_file
from fedprune.core.disk import storage_errors
from fedprune.core.errors import ConfigError, StorageError
from fedprune.core.metrics import TEST_SHARE

_FORMAT = "fedprune.samples/1"


@dataclass(frozen=True)
class SplitShares:
    """Shares held out: of all samples for testing, of the rest for validation. Seed and device name choose them."""

    test: float = TEST_SHARE
    validation: float = 0.0
    seed: int = 0
    device: str = ""

    def __post_init__(self) -> None:
        for name in ("test", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"share of samples for {name}", expected="0 to below 1", got=getattr(self, name))

    def split_of(self, name: str) -> str:
        """The part that a sample belongs to, for ever."""
        # Only the name decides, so that no later sample changes it; \x1f stands in no name, so that keys differ.
        text = "\x1f".join([str(self.seed), self.device, "part", name])
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        return self.split_at(number)

    def split_at(self, number: float) -> str:
        """The part that a number from 0 to 1 belongs to."""
        if number < self.test:
            return "test"
        return "val" if number < self.test + (1 - self.test) * self.validation else "train"


def claim_folder(root: Path, shares: SplitShares) -> bytes:
    """The key of the set of samples in a folder; a new set is made if there is none.

    Raises `ConfigError` if the set was made with other shares.
    """
    path, shares_table = root / "set.json", asdict(shares)
    body = atomic_file.read_document(path)
    if body is None:
        with storage_errors(f"can't write {root}"):
            root.mkdir(parents=True, exist_ok=True)
        atomic_file.remove_partial_files(root)
        body = {"format": _FORMAT, "shares": shares_table, "key": os.urandom(16).hex()}
        atomic_file.write_document(path, body)
    if body.get("format") != _FORMAT:
        raise StorageError(f"{path} is of another version", expected=_FORMAT, got=body.get("format"))
    if body["shares"] != shares_table:
        raise ConfigError(
            f"the samples in {root} are divided otherwise",
            expected=json.dumps(body["shares"]),
            got=json.dumps(shares_table),
            hint="Keep --seed, --device and the shares as they were: a test sample must never be trained on.",
        )
    return bytes.fromhex(body["key"])
