"""Clips an update and adds Gaussian noise to it before it leaves the board (differential privacy).

With Δ = w_trained − w_received over all trained tensors that the board shares, it sends

    w_received + min(1, C/|Δ|)·Δ + s·z,   z ~ N(0, 1) per element,

rounded to float32. C and s are the recipe's `update_clip` and `update_noise`. Batch-norm statistics, which are measured
on the samples and have no bound, come back as they were received.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedprune.core.errors import TrainingError
from fedprune.model.selection import Tensors

# Larger than the error of a norm: a block's sum of squares is off by 2^-37 of itself at most, and their sum is exact.
_MARGIN = 1.0 + 2.0**-30

Array = npt.NDArray[Any]


def add_noise(
    update: Mapping[str, Array],
    received: Mapping[str, Array],
    trained: Collection[str],
    clip: float,
    noise: float,
    source: GaussianNoise,
) -> Tensors:
    """An update as it may leave the board: clipped, and with noise. If nothing is clipped and there is no noise,
    trained tensors keep their bits; tensors that weren't `trained` are returned as they were received. C is `clip`, s
    is `noise`. Raises `TrainingError` if the update is not finite."""
    names = [n for n in update if n in trained]
    size = update_norm(update, received, names)
    if not math.isfinite(size):
        raise TrainingError("the update is not finite", got=size)
    factor = 1.0 if size <= clip else clip / size
    private: Tensors = {}
    for name, value in update.items():
        if name not in trained:
            private[name] = np.array(received[name], np.float32)
        elif factor == 1.0 and not noise:
            private[name] = np.asarray(value)
        else:
            private[name] = _clipped_with_noise(value, received[name], factor, noise, source)
    return private


def update_norm(update: Mapping[str, Array], received: Mapping[str, Array], names: Collection[str]) -> float:
    """An upper bound of |Δ| over some tensors, too large by less than a billionth."""
    # An upper bound, because a norm that is rounded down would let an update exceed what the noise is made for.
    squares = []
    with np.errstate(over="ignore", invalid="ignore"):
        for name in names:
            after, before = np.ravel(update[name]), np.ravel(received[name])
            for start in range(0, after.size, BLOCK_LENGTH):
                block = slice(start, start + BLOCK_LENGTH)
                difference = after[block].astype(np.float64) - before[block]
                squares.append(float(np.dot(difference, difference)))
    total = sum(squares)
    return math.sqrt(math.fsum(squares)) * _MARGIN if math.isfinite(total) else math.inf


def _clipped_with_noise(
    after: Array, before: Array, factor: float, noise: float, source: GaussianNoise
) -> npt.NDArray[np.float32]:
    """before + factor·(after − before) + noise, in blocks."""
    shifted = np.empty(after.shape, np.float32)
    shifted_flat, after_flat, before_flat = shifted.reshape(-1), np.ravel(after), np.ravel(before)
    for start in range(0, shifted_flat.size, BLOCK_LENGTH):
        block = slice(start, start + BLOCK_LENGTH)
        base = before_flat[block].astype(np.float64)
        values = base + factor * (after_flat[block] - base)
        if noise:
            values += noise * source.draw(base.size)
        shifted_flat[block] = values
    return shifted


# Deviates that are drawn at once: 512 KiB, so that a board's memory doesn't have to hold the noise of a whole tensor.
BLOCK_LENGTH = 65_536

_KEY_BYTES = 32

_UNIT = 2.0**-53


class GaussianNoise:
    """Standard normal deviates that nobody can predict without the key of 32 bytes. Equal keys give equal deviates.

    Their bits are the key stream of AES-256 in counter mode, turned into normal deviates by Box and Muller (1958).
    numpy's own generators are made for experiments: their state can be computed from their output. A deviate is at most
    8.6 in magnitude, as a uniform number of 53 bits is at least 2^-53; the missing tail is negligible next to any δ.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != _KEY_BYTES:
            raise ValueError(f"a key of {_KEY_BYTES} bytes was expected, got {len(key)}")
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    @classmethod
    def from_system(cls) -> GaussianNoise:
        """Noise with a key from the operating system's randomness, which is stored nowhere."""
        return cls(secrets.token_bytes(_KEY_BYTES))

    @classmethod
    def from_key(cls, *key: object) -> GaussianNoise:
        """Noise that its key repeats, for simulations, whose runs must be the same every time."""
        return cls(hashlib.sha256("\x1f".join(["noise", *map(str, key)]).encode()).digest())

    def draw(self, count: int) -> npt.NDArray[np.float64]:
        """The next `count` deviates, `BLOCK_LENGTH` at most in one go."""
        pairs = (count + 1) // 2
        bits = np.frombuffer(self._stream.update(bytes(16 * pairs)), "<u8") >> np.uint64(11)
        first, second = bits[:pairs].astype(np.float64), bits[pairs:].astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((first + 1.0) * _UNIT))
        angle = second * (2.0 * np.pi * _UNIT)
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]
