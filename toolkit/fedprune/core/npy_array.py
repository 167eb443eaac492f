"""One array in NumPy's own format (.npy), of a type and shape that are known beforehand."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from fedprune.core.errors import ProtocolError, shown

_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def float32_array(raw: bytes, shape: Sequence[int], what: str) -> npt.NDArray[np.float32]:
    """The array of this shape in the bytes of a `.npy` file; nothing is unpickled, or larger than the bytes. Raises
    `ProtocolError` if they are no such array; the message names `what`."""
    file = io.BytesIO(raw)
    try:
        read = _HEADERS[npy.read_magic(file)]
        found, fortran, dtype = read(file)
    except Exception as error:  # numpy's parser of others' headers raises whatever its parts raise
        raise ProtocolError(f"{what} is no array in NumPy's format ({type(error).__name__})") from error
    if dtype.newbyteorder("<") != np.dtype("<f4"):
        raise ProtocolError(f"type of {what}", expected="float32", got=shown(str(dtype)))
    if tuple(found) != tuple(shape):
        raise ProtocolError(f"shape of {what}", expected=tuple(shape), got=shown(str(tuple(found))))
    data = memoryview(raw)[file.tell() :]
    if len(data) != 4 * int(np.prod(shape, dtype=np.int64)):
        raise ProtocolError(f"{what} is cut short or too long", expected=tuple(shape), got=f"{len(data)} bytes")
    flat = np.frombuffer(data, dtype)
    return np.array(flat.reshape(shape, order="F" if fortran else "C"), np.float32, order="C")
