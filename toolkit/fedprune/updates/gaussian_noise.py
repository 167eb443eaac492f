"""Gaussian noise that nobody can foretell who doesn't have its key.

Its bits are the key stream of AES-256 in counter mode, turned into normal deviates by Box and Muller (1958): numpy's
own generators are made for experiments, and can be told from their output. A deviate is at most 8.6 in magnitude, as a
uniform number of 53 bits is at least 2^-53: what that leaves out is nothing beside any δ.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

BLOCK = 65_536
"""Deviates that are drawn at once, 512 KiB of them."""

_KEY_BYTES = 32
_UNIT = 2.0**-53


class GaussianNoise:
    """Standard normal deviates; the same 32 bytes of key always give the same ones."""

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key of {_KEY_BYTES} bytes was expected, got {len(key)}")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def secret(cls) -> GaussianNoise:
        """Noise with a key of the operating system's randomness, which nobody keeps."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def keyed(cls, *key: object) -> GaussianNoise:
        """Noise that whoever knows its key can repeat: for simulations, where runs must be the same every time."""
        return cls(hashlib.sha256("\x1f".join(["noise", *map(str, key)]).encode()).digest())

    def draw(self, count: int) -> npt.NDArray[np.float64]:
        """The next `count` deviates, `BLOCK` at most in one go."""
        pairs = (count + 1) // 2
        bits = np.frombuffer(self._stream.update(bytes(16 * pairs)), "<u8") >> np.uint64(11)
        first, second = bits[:pairs].astype(np.float64), bits[pairs:].astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((first + 1.0) * _UNIT))
        angle = second * (2.0 * np.pi * _UNIT)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
