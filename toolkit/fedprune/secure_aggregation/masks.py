"""Vectors of whole numbers modulo 2^32 and 2^64, and the masks that are added to them.

A mask is uniform to anyone without its key: the key stream of AES-128 in counter mode (NIST SP 800-38A), read as
little-endian numbers. A key is used for one mask only. Its 128 bits are what X25519 gives, too.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedprune.core.errors import ProtocolError
from fedprune.secure_aggregation.session import SecureSumSession

MASK_KEY_BYTES = 16
_BLOCK_BYTES = 65_536  # bytes: a mask is added while it is in the cache
_ZEROS = bytes(_BLOCK_BYTES)

Narrow = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]


class Vector:
    """Numbers modulo 2^32, then numbers modulo 2^64; signed ones are in two's complement."""

    __slots__ = ("narrow", "wide")

    def __init__(self, narrow: Narrow, wide: Wide) -> None:
        self.narrow, self.wide = narrow, wide

    @classmethod
    def zeros(cls, session: SecureSumSession) -> Vector:
        return cls(np.zeros(session.narrow, "<u4"), np.zeros(session.wide, "<u8"))

    @classmethod
    def from_bytes(cls, raw: bytes, session: SecureSumSession) -> Vector:
        """Read what `to_bytes` gives, of a session's length. Raises `ProtocolError` for another length."""
        if len(raw) != session.size:
            raise ProtocolError("bytes of a masked vector", expected=session.size, got=len(raw))
        edge = 4 * session.narrow
        return cls(np.frombuffer(raw[:edge], "<u4"), np.frombuffer(raw[edge:], "<u8"))

    def to_bytes(self) -> bytes:
        return self.narrow.astype("<u4").tobytes() + self.wide.astype("<u8").tobytes()

    def copy(self) -> Vector:
        return Vector(self.narrow.astype("<u4"), self.wide.astype("<u8"))

    def add(self, addend: Vector) -> None:
        self.narrow += addend.narrow
        self.wide += addend.wide

    def add_mask(self, key: bytes, *, negative: bool = False) -> None:
        """Add the mask of a key, or subtract it."""
        stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
        for block in self._blocks():
            mask = np.frombuffer(stream.update(memoryview(_ZEROS)[: block.nbytes]), block.dtype)
            if negative:
                block -= mask
            else:
                block += mask

    def _blocks(self) -> Iterable[npt.NDArray[np.unsignedinteger]]:
        for numbers in (self.narrow, self.wide):
            step = _BLOCK_BYTES // numbers.itemsize
            for start in range(0, numbers.size, step):
                yield numbers[start : start + step]
