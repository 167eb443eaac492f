"""Weights for devices in fewer bytes: as their difference to those that the device holds, or whole, as float16.

Server and device decode with the same code, and the server continues from what it decoded, so that both have the same
bits. What a codec leaves out is sent later, in the difference to the next weights, so that errors never add up.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from fedprune.core.errors import ProtocolError
from fedprune.updates import packing, update
from fedprune.updates.codecs import DOWNLOAD_CODECS, HALF_CODEC, Codec

Tensors = dict[str, npt.NDArray[np.float32]]


def encode(
    codec: Codec, weights: Mapping[str, npt.NDArray[Any]], base: Tensors | None, trained: Collection[str]
) -> bytes:
    """Encode weights, in the order of their file. Raises `ProtocolError` if they can't be coded.

    Args:
        codec: One of `DOWNLOAD_CODECS`, for differences.
        base: What the device holds, with the same names and shapes; None if the weights travel whole.
        trained: Names of the tensors that are coded; the others travel as they are.
    """
    if base is None:
        codec, base = HALF_CODEC, {n: np.zeros_like(v) for n, v in weights.items()}
    raw, _ = update.encode(codec, weights, base, trained)
    return raw


def decode(codec: Codec, raw: bytes, base: Tensors | None, size: int) -> Tensors:
    """Decode weights, in the order of their file. `size`, the bytes of that file, bounds what is unpacked. Raises
    `ProtocolError` if they are damaged, or of other weights than the base."""
    if codec.name not in DOWNLOAD_CODECS:
        raise ProtocolError("codec of weights", expected=" or ".join(DOWNLOAD_CODECS), got=codec)
    stored = packing.unpack_tensors(raw, 2 * size + 4096)  # names may be longer than the numbers of tiny tensors
    if base is None:
        codec = HALF_CODEC
        base = {n.removesuffix(update.HALF_SUFFIX): np.zeros(v.shape, np.float32) for n, v in stored.items()}
    return update.decode_parts(codec, stored, base, {n for n in base if n not in stored})
