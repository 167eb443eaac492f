"""Identities of the swarm's devices: keys that follow from a device's number, and the envelopes of its messages."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedprune.security.keys import SigningKey
from fedprune.security.signed_channel import seal


@dataclass(frozen=True)
class ServerKeys:
    """What devices know of their server: id of its signing key, and pins of its authorities."""

    signing: str
    authorities: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "authorities", tuple(self.authorities))  # JSON has lists


def signing_key(index: int, seed: int) -> SigningKey:
    """A device's key, which driver and swarm both make, so that no file with a hundred thousand of them is needed."""
    return SigningKey(Ed25519PrivateKey.from_private_bytes(hashlib.sha256(f"swarm {seed} {index}".encode()).digest()))


class Signer:
    """Signs a device's messages, in epochs that no disk remembers: the device never restarts."""

    __slots__ = ("_counter", "_epoch", "_key")

    def __init__(self, key: SigningKey) -> None:
        self._key, self._epoch, self._counter = key, time.time_ns() // 1_000_000, 0

    def renew(self) -> None:
        """Begin an epoch, with each birth."""
        self._epoch, self._counter = self._epoch + 1, 0

    def seal(self, topic: str, body: bytes) -> bytes:
        self._counter += 1
        return seal(self._key, topic, self._epoch, self._counter, body)
